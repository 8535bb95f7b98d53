//! Loading a checkpoint: the count tree's index and the catalog. Counts and map pages come later, on first use.

use super::catalog::identity;
use crate::device::{BlockBuf, Device};
use crate::error::{Error, Result};
use crate::format::catalog::{
    CATALOG_INDEX_ENTRIES, SLOTS_PER_PAGE, decode_index, decode_page, level_sizes,
};
use crate::format::counts;
use crate::format::layout::{INDEX_LEVELS, index_slot};
use crate::format::page::{PageIdentity, PageKind, PagePtr};
use crate::format::superblock::Superblock;
use crate::journal::read_page;
use crate::map::MapStore;
use crate::metadata::{Catalog, Metadata};
use crate::space::SpaceMap;
use crate::units::VolumeId;
use std::ops::Range;

/// What of a checkpoint cannot be read.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    /// Pages of the count index: the regions below, and why.
    pub(crate) counts: Vec<(Range<u64>, Error)>,
    /// Pages of the catalog: the slots that they held, and why.
    pub(crate) catalog: Vec<(Range<usize>, Error)>,
    /// Holds on what is no snapshot, by number, and why. None where what they are on may be lost with the catalog.
    pub(crate) holds: Vec<(VolumeId, Error)>,
}

impl Losses {
    /// The first of them, for those who need all.
    fn into_first(self) -> Option<Error> {
        let counts = self.counts.into_iter().map(|(_, error)| error);
        counts
            .chain(self.catalog.into_iter().map(|(_, error)| error))
            .chain(self.holds.into_iter().map(|(_, error)| error))
            .next()
    }
}

/// The metadata of the checkpoint that `superblock` names, all of it.
pub(crate) async fn load<D: Device>(device: &D, superblock: &Superblock) -> Result<Metadata> {
    let (metadata, losses) = load_readable(device, superblock).await?;
    match losses.into_first() {
        None => Ok(metadata),
        Some(error) => Err(error),
    }
}

/// What can be read of the metadata of the checkpoint that `superblock` names, and what cannot. Where something of
/// the count index is lost, the regions below look as if they had never been written.
pub(crate) async fn load_readable<D: Device>(
    device: &D,
    superblock: &Superblock,
) -> Result<(Metadata, Losses)> {
    let (mut metadata, mut losses) = load_index(device, superblock).await?;
    load_catalog(device, superblock, &mut metadata, &mut losses).await?;
    Ok((metadata, losses))
}

/// The first part of [`load_readable`]: the count tree's index, which the next checkpoint but one overwrites.
pub(crate) async fn load_index<D: Device>(
    device: &D,
    superblock: &Superblock,
) -> Result<(Metadata, Losses)> {
    let mut metadata = Metadata {
        id: superblock.id,
        page_id: superblock.metadata_id,
        space: SpaceMap::new(superblock.blocks, superblock.journal),
        map: MapStore::new(superblock.generation.next()),
        catalog: Catalog::new(superblock.name.clone(), superblock.next_id),
        catalog_places: Vec::new(),
    };
    let mut losses = Losses::default();
    load_space(device, superblock, &mut metadata.space, &mut losses).await?;
    Ok((metadata, losses))
}

async fn load_space<D: Device>(
    device: &D,
    superblock: &Superblock,
    space: &mut SpaceMap,
    losses: &mut Losses,
) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(1);
    space.load_top(&superblock.counts)?;
    for level in (1..=INDEX_LEVELS).rev() {
        for (index, slot, generation) in space.index_places(level) {
            let pba = index_slot(level, index, slot);
            let page = read_page(device, pba, &mut buffer).await;
            let identity = PageIdentity {
                metadata: superblock.metadata_id,
                kind: PageKind::CountsIndex,
                level,
                ptr: PagePtr { pba, generation },
            };
            let loaded = page
                .and_then(|page| counts::decode_index(&page, identity))
                .and_then(|entries| space.load_index(level, index, &entries));
            if let Err(error) = loaded {
                let regions = space.regions_below(level, index);
                losses.counts.push((regions, error));
            }
        }
    }
    Ok(())
}

/// The second part of [`load_readable`]: the catalog.
pub(crate) async fn load_catalog<D: Device>(
    device: &D,
    superblock: &Superblock,
    metadata: &mut Metadata,
    losses: &mut Losses,
) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(1);
    let bounds = metadata.space.bounds();
    let slots = usize::try_from(superblock.catalog_slots).unwrap_or(usize::MAX);
    let sizes: Vec<usize> = level_sizes(slots).collect();
    let is_consistent = sizes.len().saturating_sub(1) == usize::from(superblock.catalog_level)
        && sizes.is_empty() == superblock.catalog.is_none();
    if !is_consistent {
        return Err(Error::corrupt(
            "superblock: its catalog is of a size that cannot be",
        ));
    }
    let mut places = vec![superblock.catalog.into_iter().map(Some).collect::<Vec<_>>()];
    for level in (1..sizes.len()).rev() {
        let mut below = Vec::new();
        // The slots below a page of this level.
        let span = SLOTS_PER_PAGE * CATALOG_INDEX_ENTRIES.pow(u32::try_from(level).unwrap_or(0));
        for (index, ptr) in (0..).zip(places.last().into_iter().flatten()) {
            let lost = (index * span).min(slots)..((index + 1) * span).min(slots);
            let children = match ptr {
                // Below a page that is lost: said already.
                None => Ok(vec![None; CATALOG_INDEX_ENTRIES]),
                Some(ptr) => {
                    let page = read_page(device, ptr.pba, &mut buffer).await;
                    page.and_then(|page| {
                        let identity = identity(metadata, level, *ptr);
                        let children = decode_index(&page, identity, bounds)?;
                        let needed = lost.len().div_ceil(span / CATALOG_INDEX_ENTRIES);
                        if children.iter().take(needed).any(Option::is_none) {
                            let fact = "catalog index page: a page is missing";
                            return Err(Error::corrupt(fact).at_pba(ptr.pba));
                        }
                        Ok(children)
                    })
                }
            };
            match children {
                Ok(children) => below.extend(children),
                Err(error) => {
                    losses.catalog.push((lost, error));
                    below.extend([None; CATALOG_INDEX_ENTRIES]);
                }
            }
        }
        below.truncate(sizes[level - 1]);
        places.push(below);
    }
    places.truncate(sizes.len());
    places.reverse();
    for (index, ptr) in (0..).zip(places.first().into_iter().flatten()) {
        let held = (index * SLOTS_PER_PAGE).min(slots)..((index + 1) * SLOTS_PER_PAGE).min(slots);
        let entries = match ptr {
            None => Ok(vec![None; SLOTS_PER_PAGE]),
            Some(ptr) => {
                let page = read_page(device, ptr.pba, &mut buffer).await;
                page.and_then(|page| {
                    let entries = decode_page(&page, identity(metadata, 0, *ptr), bounds)?;
                    let is_young = |root: PagePtr| root.generation > superblock.generation;
                    let mut roots = entries.iter().flatten().filter_map(|entry| entry.root.ptr);
                    if roots.any(is_young) {
                        let fact = "catalog page: a map younger than the checkpoint";
                        return Err(Error::corrupt(fact).at_pba(ptr.pba));
                    }
                    Ok(entries)
                })
            }
        };
        let entries = entries.unwrap_or_else(|error| {
            losses.catalog.push((held.clone(), error));
            vec![None; SLOTS_PER_PAGE]
        });
        for (slot, entry) in held.zip(entries) {
            if let Err(error) = metadata.catalog.insert_loaded(entry) {
                losses.catalog.push((slot..slot + 1, error));
            }
        }
    }
    metadata.catalog_places = places;
    if losses.catalog.is_empty() {
        losses.holds = metadata.catalog.stray_holds();
    }
    Ok(())
}
