//! Checking: every reference is counted and held against the count that the pool keeps.
//!
//! What is checked is what stands on disk. A pool open for writing first writes a checkpoint and writes none while it
//! is read back; one open read-only is checked with its journal replayed in memory.

use super::Pool;
use super::open::load_current;
use super::report::CheckReport;
use crate::checkpoint::load;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::catalog::{CatalogEntry, Role};
use crate::format::layout::{REGION_BLOCKS, is_fixed, region_count};
use crate::format::map_page::{Node, span_blocks};
use crate::format::page::PagePtr;
use crate::metadata::{Metadata, blocks_of};
use crate::space::Fault;
use crate::units::{Generation, Lba, Pba};
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// Map pages kept in memory while checking.
const PAGES_KEPT: usize = 1 << 16;
/// Of each kind of damage, at most this many lines are reported.
const DAMAGE_LINES_MAX: usize = 1000;

struct Check<'a, D> {
    device: &'a D,
    metadata: Metadata,
    durable: Generation,
    /// How many references to each block were found.
    found: FxHashMap<u64, Box<[u32]>>,
    report: CheckReport,
    total: u64,
}

/// A page to visit: where it stands in its map, and from where on its blocks still count.
struct Visit {
    ptr: PagePtr,
    level: u8,
    base: Lba,
    cursor: Lba,
}

impl Pool {
    /// Holds every reference against every count. Reads all metadata; the pool may be open read-only. `progress` is
    /// called with how many blocks are accounted for, and of how many.
    pub async fn check<D: Device>(
        &self,
        device: &D,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        let _alone = self.control.lock().await;
        if !self.is_read_only {
            self.checkpoint(device).await?;
        }
        let superblock = self.checkpoints.hold().await;
        let metadata = if self.is_read_only {
            load_current(
                device,
                &superblock,
                superblock.is_clean,
                &self.ring,
                &mut Vec::new(),
            )
            .await?
            .0
        } else {
            load(device, &superblock).await?
        };
        let mut check = Check {
            device,
            total: metadata.space.used_blocks(),
            metadata,
            durable: superblock.generation,
            found: FxHashMap::default(),
            report: CheckReport::default(),
        };
        check.catalog();
        let entries: Vec<CatalogEntry> = check
            .metadata
            .catalog
            .entries()
            .into_iter()
            .cloned()
            .collect();
        for entry in &entries {
            check.map(entry, progress).await;
        }
        check.counts().await;
        Ok(check.report)
    }
}

impl<D: Device> Check<'_, D> {
    fn damage(&mut self, line: String) {
        if self.report.damage.len() < DAMAGE_LINES_MAX {
            self.report.damage.push(line);
        }
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

    fn catalog(&mut self) {
        let pages: Vec<PagePtr> = self
            .metadata
            .catalog_places
            .iter()
            .flatten()
            .flatten()
            .copied()
            .collect();
        for ptr in pages {
            self.refer(ptr.pba);
            self.report.pages += 1;
        }
    }

    async fn map(&mut self, entry: &CatalogEntry, progress: &mut dyn FnMut(u64, u64)) {
        let path = self.metadata.catalog.path(entry.id);
        let name = path.map_or_else(
            || format!("removed volume number {}", entry.id.0),
            |path| path.to_string(),
        );
        let cursor = match entry.role {
            Role::Reclaiming { cursor } => cursor,
            Role::Volume { .. } | Role::Snapshot { .. } => Lba(0),
        };
        if span_blocks(entry.root.level) < blocks_of(entry.bytes) {
            self.damage(format!("{name}: its map is too small for its size"));
        }
        let root = entry.root.ptr.map(|ptr| Visit {
            ptr,
            level: entry.root.level,
            base: Lba(0),
            cursor,
        });
        let mut visits: Vec<Visit> = root.into_iter().collect();
        while let Some(visit) = visits.pop() {
            if self.refer(visit.ptr.pba) > 1 {
                continue;
            }
            self.report.pages += 1;
            match self.page(&visit).await {
                Ok((mapped, node)) => {
                    let is_root = entry.root.ptr == Some(visit.ptr);
                    if is_root
                        && mapped != entry.mapped_blocks
                        && !matches!(entry.role, Role::Reclaiming { .. })
                    {
                        let says = entry.mapped_blocks;
                        self.damage(format!(
                            "{name}: maps {mapped} blocks, the catalog says {says}"
                        ));
                    }
                    self.below(&visit, &node, &mut visits);
                }
                Err(error) => self.damage(format!("{name}: {error}")),
            }
            self.metadata.map.evict(self.durable, PAGES_KEPT);
            progress(self.report.pages + self.report.data_blocks, self.total);
        }
    }

    async fn page(&mut self, visit: &Visit) -> Result<(u64, Arc<Node>)> {
        let device = self.device;
        self.metadata
            .with_supply(device, |metadata| {
                let page = metadata.map.page(visit.ptr, visit.level)?;
                Ok::<_, Fault>((page.mapped, Arc::clone(&page.node)))
            })
            .await
    }

    fn below(&mut self, visit: &Visit, node: &Node, visits: &mut Vec<Visit>) {
        match node {
            Node::Leaf(entries) => {
                for entry in entries.iter().filter(|entry| entry.0 != 0) {
                    if self.refer(*entry) == 1 {
                        self.report.data_blocks += 1;
                    }
                }
            }
            Node::Inner(children) => {
                let span = span_blocks(visit.level - 1);
                for (index, child) in (0..).zip(children.iter()) {
                    let base = visit.base.plus(index * span);
                    // What a reclaim has passed is returned already, although the page still names it.
                    if let Some(ptr) = child.filter(|_| base.plus(span) > visit.cursor) {
                        visits.push(Visit {
                            ptr,
                            level: visit.level - 1,
                            base,
                            cursor: visit.cursor,
                        });
                    }
                }
            }
        }
    }

    /// Holds the references found against the counts.
    async fn counts(&mut self) {
        let blocks = self.metadata.space.blocks();
        let journal = self.metadata.space.bounds().journal;
        for region in 0..region_count(blocks) {
            let found = self.found.remove(&region);
            if found.is_none() && self.metadata.space.region_place(region).is_none() {
                continue;
            }
            let start = region * REGION_BLOCKS;
            for pba in (start..blocks.min(start + REGION_BLOCKS)).map(Pba) {
                if is_fixed(pba, journal) {
                    continue;
                }
                let device = self.device;
                let counted = self
                    .metadata
                    .with_supply(device, |metadata| metadata.space.count(pba))
                    .await;
                let counted = match counted {
                    Ok(counted) => counted,
                    Err(error) => {
                        self.damage(format!(
                            "counts of {REGION_BLOCKS} blocks from {}: {error}",
                            Pba(start)
                        ));
                        break;
                    }
                };
                let offset = usize::try_from(pba.0 - start).unwrap_or(0);
                let found = found.as_ref().map_or(0, |found| found[offset]);
                if found < counted {
                    self.report.leaked_blocks += 1;
                } else if found > counted {
                    let error =
                        Error::corrupt(format!("{found} references, counted are {counted}"))
                            .at_pba(pba);
                    self.damage(error.to_string());
                }
            }
        }
    }
}
