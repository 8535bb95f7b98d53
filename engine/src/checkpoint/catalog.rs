//! The catalog's pages: which stand where, and which a checkpoint writes anew.

use crate::format::catalog::{CATALOG_INDEX_ENTRIES, encode_index, encode_page, level_sizes};
use crate::format::page::{PageBytes, PageIdentity, PageKind, PagePtr};
use crate::metadata::Metadata;
use crate::space::Fault;
use std::collections::BTreeSet;

/// The pages of a level, as a header names them.
pub(super) fn identity(metadata: &Metadata, level: usize, ptr: PagePtr) -> PageIdentity {
    PageIdentity {
        metadata: metadata.page_id,
        kind: if level == 0 {
            PageKind::Catalog
        } else {
            PageKind::CatalogIndex
        },
        level: u8::try_from(level).unwrap_or(u8::MAX),
        ptr,
    }
}

/// Gives every catalog page that changed, and those above it, a new place and encodes it.
pub(super) fn shadow(metadata: &mut Metadata) -> Result<Vec<(PagePtr, PageBytes)>, Fault> {
    let sizes: Vec<usize> = level_sizes(metadata.catalog.slot_count()).collect();
    let size = |level: usize| sizes.get(level).copied().unwrap_or(0);
    let mut dirty: Vec<BTreeSet<usize>> = Vec::new();
    let mut gone: Vec<PagePtr> = Vec::new();
    let mut pages = metadata.catalog.dirty_pages().clone();
    for level in 0..sizes.len().max(metadata.catalog_places.len()) {
        let places = metadata
            .catalog_places
            .get(level)
            .map_or(&[][..], Vec::as_slice);
        let kept = size(level).min(places.len());
        gone.extend(places[kept..].iter().flatten());
        pages.extend(kept..places.len());
        let above = pages
            .iter()
            .map(|page| page / CATALOG_INDEX_ENTRIES)
            .collect();
        pages.retain(|page| *page < size(level));
        for old in pages
            .iter()
            .filter_map(|page| places.get(*page).copied().flatten())
        {
            metadata.space.referenced(old.pba)?;
        }
        dirty.push(std::mem::replace(&mut pages, above));
    }
    for ptr in &gone {
        metadata.space.referenced(ptr.pba)?;
    }
    let count: usize = dirty.iter().map(BTreeSet::len).sum();
    metadata.space.set_aside_last(count as u64)?;

    // From here on nothing can be missing.
    metadata.catalog.take_dirty_pages();
    for ptr in gone {
        metadata.space.release_page(ptr, None);
    }
    metadata.catalog_places.resize(sizes.len(), Vec::new());
    for (places, size) in metadata.catalog_places.iter_mut().zip(&sizes) {
        places.resize(*size, None);
    }
    let mut encoded = Vec::with_capacity(count);
    for (level, pages) in dirty.into_iter().enumerate() {
        for page in pages {
            let ptr = PagePtr {
                pba: metadata.space.take_metadata(),
                generation: metadata.map.generation(),
            };
            if let Some(old) = metadata.catalog_places[level][page].replace(ptr) {
                metadata.space.release_page(old, None);
            }
            let identity = identity(metadata, level, ptr);
            let bytes = if level == 0 {
                encode_page(metadata.catalog.page_slots(page), identity)
            } else {
                let below = &metadata.catalog_places[level - 1];
                let first = page * CATALOG_INDEX_ENTRIES;
                let children = &below[first..below.len().min(first + CATALOG_INDEX_ENTRIES)];
                encode_index(children, identity)
            };
            encoded.push((ptr, bytes));
        }
    }
    Ok(encoded)
}
