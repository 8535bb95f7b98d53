//! Loading a checkpoint: the count tree's index and the catalog. Counts and map pages come later, on first use.

use super::catalog::identity;
use crate::device::{BlockBuf, Device};
use crate::error::{Error, Result};
use crate::format::catalog::{decode_index, decode_page, level_sizes};
use crate::format::counts;
use crate::format::layout::{INDEX_LEVELS, index_slot};
use crate::format::page::{PageIdentity, PageKind, PagePtr};
use crate::format::superblock::Superblock;
use crate::journal::read_page;
use crate::map::MapStore;
use crate::metadata::{Catalog, Metadata};
use crate::space::SpaceMap;

/// The metadata of the checkpoint that `superblock` names.
pub(crate) async fn load<D: Device>(device: &D, superblock: &Superblock) -> Result<Metadata> {
    let mut metadata = Metadata {
        id: superblock.id,
        space: SpaceMap::new(superblock.blocks, superblock.journal),
        map: MapStore::new(superblock.generation.next()),
        catalog: Catalog::new(superblock.name.clone(), superblock.next_id),
        catalog_places: Vec::new(),
    };
    load_space(device, superblock, &mut metadata.space).await?;
    load_catalog(device, superblock, &mut metadata).await?;
    Ok(metadata)
}

async fn load_space<D: Device>(
    device: &D,
    superblock: &Superblock,
    space: &mut SpaceMap,
) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(1);
    space.load_top(&superblock.counts)?;
    for level in (1..=INDEX_LEVELS).rev() {
        for (index, slot, generation) in space.index_places(level) {
            let pba = index_slot(level, index, slot);
            let page = read_page(device, pba, &mut buffer).await?;
            let identity = PageIdentity {
                pool: superblock.id,
                kind: PageKind::CountsIndex,
                level,
                ptr: PagePtr { pba, generation },
            };
            space.load_index(level, index, &*counts::decode_index(&page, identity)?)?;
        }
    }
    Ok(())
}

async fn load_catalog<D: Device>(
    device: &D,
    superblock: &Superblock,
    metadata: &mut Metadata,
) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(1);
    let bounds = metadata.space.bounds();
    let slots = usize::try_from(superblock.catalog_slots).unwrap_or(usize::MAX);
    let sizes = level_sizes(slots);
    let is_consistent = sizes.len().saturating_sub(1) == usize::from(superblock.catalog_level)
        && sizes.is_empty() == superblock.catalog.is_none();
    if !is_consistent {
        return Err(Error::corrupt(
            "superblock: its catalog is of a size that cannot be",
        ));
    }
    let lost = || Error::corrupt("catalog index page: a page is missing");
    let mut places = vec![superblock.catalog.into_iter().map(Some).collect::<Vec<_>>()];
    for level in (1..sizes.len()).rev() {
        let mut below = Vec::new();
        for ptr in places.last().into_iter().flatten() {
            let ptr = ptr.ok_or_else(lost)?;
            let page = read_page(device, ptr.pba, &mut buffer).await?;
            below.extend(decode_index(&page, identity(metadata, level, ptr), bounds)?);
        }
        below.truncate(sizes[level - 1]);
        places.push(below);
    }
    places.truncate(sizes.len());
    places.reverse();
    let mut left = slots;
    for ptr in places.first().into_iter().flatten() {
        let ptr = ptr.ok_or_else(lost)?;
        let page = read_page(device, ptr.pba, &mut buffer).await?;
        for entry in decode_page(&page, identity(metadata, 0, ptr), bounds)? {
            let is_young = |ptr: PagePtr| ptr.generation > superblock.generation;
            if entry
                .as_ref()
                .is_some_and(|entry| entry.root.ptr.is_some_and(is_young))
            {
                return Err(
                    Error::corrupt("catalog page: a map younger than the checkpoint")
                        .at_pba(ptr.pba),
                );
            }
            if left > 0 {
                metadata.catalog.insert_loaded(entry)?;
                left -= 1;
            }
        }
    }
    metadata.catalog_places = places;
    Ok(())
}
