//! Reachability: every reference to every block, found by walking the catalog and all maps, and which maps lead to
//! pages that cannot be read.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::catalog::{CatalogEntry, Own, Role};
use crate::format::layout::REGION_BLOCKS;
use crate::format::map_page::{Node, span_blocks};
use crate::format::page::PagePtr;
use crate::metadata::{Metadata, blocks_of};
use crate::space::Fault;
use crate::units::{Generation, Lba, Pba, VolumeId};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Map pages kept in memory while walking.
const PAGES_KEPT: usize = 1 << 16;

/// What a walk over all maps found.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// How many references to each block there are, by region.
    found: FxHashMap<u64, Box<[u32]>>,
    /// Which map page names which.
    edges: Vec<(Pba, Pba)>,
    /// Metadata pages read and verified.
    pub(super) pages: u64,
    /// Blocks that some map names, each once.
    pub(super) data_blocks: u64,
    /// Map pages that cannot be read.
    pub(super) unreadable: BTreeMap<Pba, Error>,
    /// Entries whose root maps another number of blocks than the catalog says, and that number.
    pub(super) miscounted: Vec<(VolumeId, u64)>,
    /// Entries whose map is too small for their size.
    pub(super) too_small: Vec<VolumeId>,
    /// What each volume and snapshot owns alone, going by the counts.
    pub(super) own: FxHashMap<VolumeId, Own>,
}

/// A page to visit: where it stands in its map, and from where on its blocks still count.
#[derive(Clone, Copy)]
struct Visit {
    ptr: PagePtr,
    level: u8,
    base: Lba,
    cursor: Lba,
    /// Whether nobody else has a page above it.
    is_alone: bool,
}

impl Visit {
    fn root(entry: &CatalogEntry) -> Option<Self> {
        let cursor = match entry.role {
            Role::Reclaiming { cursor } => cursor,
            Role::Volume { .. } | Role::Snapshot { .. } | Role::Hold { .. } => Lba(0),
        };
        entry.root.ptr.map(|ptr| Self {
            ptr,
            level: entry.root.level,
            base: Lba(0),
            cursor,
            is_alone: true,
        })
    }

    /// The pages below. What a reclaim has passed is returned already, although the page still names it.
    fn children(self, node: &Node) -> impl Iterator<Item = Self> {
        let children = match node {
            Node::Inner(children) => &children[..],
            Node::Leaf(_) => &[],
        };
        let level = self.level.saturating_sub(1);
        let span = span_blocks(level);
        (0..).zip(children).filter_map(move |(index, child)| {
            let base = self.base.plus(index * span);
            let ptr = child.filter(|_| base.plus(span) > self.cursor)?;
            Some(Self {
                ptr,
                level,
                base,
                cursor: self.cursor,
                is_alone: self.is_alone,
            })
        })
    }
}

/// Whether a block is counted as having one owner. What cannot be read has not.
async fn is_owned_once<D: Device>(device: &D, metadata: &mut Metadata, pba: Pba) -> bool {
    let counted = metadata
        .with_supply(device, |metadata| metadata.space.count(pba))
        .await;
    matches!(counted, Ok(1))
}

async fn page<D: Device>(device: &D, metadata: &mut Metadata, visit: Visit) -> Result<(u64, Node)> {
    metadata
        .with_supply(device, |metadata| {
            let page = metadata.map.page(visit.ptr, visit.level)?;
            Ok::<_, Fault>((page.mapped, page.node.clone()))
        })
        .await
}

impl Reach {
    /// Walks everything but the entries in `without`. `durable`: pages up to this generation can be read again.
    pub(super) async fn walk<D: Device>(
        device: &D,
        metadata: &mut Metadata,
        durable: Generation,
        without: &BTreeSet<VolumeId>,
        progress: &mut dyn FnMut(u64),
    ) -> Self {
        metadata.map.set_durable(durable);
        metadata.map.limit(PAGES_KEPT);
        let mut reach = Self::default();
        for ptr in metadata.catalog_places.iter().flatten().flatten() {
            reach.refer(ptr.pba);
            reach.pages += 1;
        }
        let entries: Vec<CatalogEntry> = metadata.catalog.entries().into_iter().cloned().collect();
        for entry in entries.iter().filter(|entry| !without.contains(&entry.id)) {
            reach.map(device, metadata, entry, progress).await;
        }
        reach
    }

    /// How many references to the block at `offset` of a region there are.
    pub(super) fn count(&self, region: u64, offset: usize) -> u32 {
        self.found.get(&region).map_or(0, |found| found[offset])
    }

    /// Whether something names a block of the region.
    pub(super) fn touches(&self, region: u64) -> bool {
        self.found.contains_key(&region)
    }

    /// The regions of which something names a block.
    pub(super) fn regions(&self) -> impl Iterator<Item = u64> {
        self.found.keys().copied()
    }

    /// One more reference to a block; how many there are now.
    fn refer(&mut self, pba: Pba) -> u32 {
        let region = self
            .found
            .entry(pba.0 / REGION_BLOCKS)
            .or_insert_with(|| vec![0; usize::try_from(REGION_BLOCKS).unwrap_or(0)].into());
        let found = &mut region[usize::try_from(pba.0 % REGION_BLOCKS).unwrap_or(0)];
        *found = found.saturating_add(1);
        *found
    }

    async fn map<D: Device>(
        &mut self,
        device: &D,
        metadata: &mut Metadata,
        entry: &CatalogEntry,
        progress: &mut dyn FnMut(u64),
    ) {
        if span_blocks(entry.root.level) < blocks_of(entry.bytes) {
            self.too_small.push(entry.id);
        }
        let mut visits: Vec<Visit> = Visit::root(entry).into_iter().collect();
        let mut own = Own::default();
        while let Some(mut visit) = visits.pop() {
            let is_known = self.refer(visit.ptr.pba) > 1;
            if is_known && entry.root.ptr != Some(visit.ptr) {
                continue;
            }
            let (mapped, node) = match page(device, metadata, visit).await {
                Ok(page) => page,
                Err(error) => {
                    self.unreadable.entry(visit.ptr.pba).or_insert(error);
                    continue;
                }
            };
            let is_removed = matches!(entry.role, Role::Reclaiming { .. });
            if entry.root.ptr == Some(visit.ptr) && mapped != entry.mapped_blocks && !is_removed {
                self.miscounted.push((entry.id, mapped));
            }
            if is_known {
                continue;
            }
            self.pages += 1;
            visit.is_alone &= is_owned_once(device, metadata, visit.ptr.pba).await;
            own.pages += u64::from(visit.is_alone);
            if let Node::Leaf(entries) = &node {
                for data in entries.iter().filter(|data| data.0 != 0) {
                    if self.refer(*data) == 1 {
                        self.data_blocks += 1;
                    }
                    let is_own = visit.is_alone && is_owned_once(device, metadata, *data).await;
                    own.data += u64::from(is_own);
                }
            }
            for child in visit.children(&node) {
                self.edges.push((child.ptr.pba, visit.ptr.pba));
                visits.push(child);
            }
            metadata.map.evict();
            progress(self.pages + self.data_blocks);
        }
        self.own.insert(entry.id, own);
    }

    /// Pages at or above one that cannot be read.
    fn tainted(&self) -> FxHashSet<Pba> {
        let mut parents: FxHashMap<Pba, Vec<Pba>> = FxHashMap::default();
        for (child, parent) in &self.edges {
            parents.entry(*child).or_default().push(*parent);
        }
        let mut tainted = FxHashSet::default();
        let mut open: Vec<Pba> = self.unreadable.keys().copied().collect();
        while let Some(pba) = open.pop() {
            if tainted.insert(pba) {
                open.extend(parents.get(&pba).into_iter().flatten());
            }
        }
        tainted
    }

    /// For each entry that reaches pages which cannot be read: the logical blocks below each of those.
    pub(super) async fn unreadable_blocks<D: Device>(
        &self,
        device: &D,
        metadata: &mut Metadata,
    ) -> BTreeMap<VolumeId, Vec<(Pba, Range<u64>)>> {
        let mut lost: BTreeMap<VolumeId, Vec<(Pba, Range<u64>)>> = BTreeMap::new();
        if self.unreadable.is_empty() {
            return lost;
        }
        let tainted = self.tainted();
        let entries: Vec<CatalogEntry> = metadata.catalog.entries().into_iter().cloned().collect();
        for entry in &entries {
            let end = blocks_of(entry.bytes);
            // A map that names a page twice is damaged, and would be walked as often as it has ways down.
            let mut seen = FxHashSet::default();
            let mut visits: Vec<Visit> = Visit::root(entry).into_iter().collect();
            while let Some(visit) = visits.pop() {
                let (pba, base) = (visit.ptr.pba, visit.base.0);
                if !tainted.contains(&pba) || !seen.insert(pba) {
                    continue;
                }
                if let Ok((_, node)) = page(device, metadata, visit).await {
                    visits.extend(visit.children(&node));
                } else {
                    let blocks = base.min(end)..(base + span_blocks(visit.level)).min(end);
                    lost.entry(entry.id).or_default().push((pba, blocks));
                }
            }
        }
        for ranges in lost.values_mut() {
            ranges.sort_by_key(|(_, blocks)| blocks.start);
        }
        lost
    }
}
