//! A page of a volume's map: a leaf of 512 mapped blocks, or an inner page of 256 pointers to pages.
//! A leaf spans 2 MiB, an inner page of level 1 512 MiB, of level 2 128 GiB, of level 3 32 TiB, of level 4 8 PiB.

use super::layout::Bounds;
use super::page::{BODY_BYTES, PageBytes, PageIdentity, PagePtr, body_mut, seal, verify};
use crate::error::{Error, Result};
use crate::units::{BLOCK_LEN, Generation, Pba};
use triomphe::Arc;

/// Blocks that a leaf maps.
pub(crate) const LEAF_ENTRIES: usize = 512;
/// Children of an inner page.
pub(crate) const INNER_ENTRIES: usize = 256;
/// The highest level of a page.
pub(crate) const LEVEL_MAX: u8 = 4;
const LEAF_ENTRY_BYTES: usize = 6;
const INNER_ENTRY_BYTES: usize = 12;
const MAPPED_BYTES: usize = 8;
const _: () = assert!(MAPPED_BYTES + LEAF_ENTRIES * LEAF_ENTRY_BYTES <= BODY_BYTES);
const _: () = assert!(MAPPED_BYTES + INNER_ENTRIES * INNER_ENTRY_BYTES <= BODY_BYTES);

/// The entries of a map page; a clone shares them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// The block that each logical block maps to; block 0 says none.
    Leaf(Arc<[Pba; LEAF_ENTRIES]>),
    /// The children.
    Inner(Arc<[Option<PagePtr>; INNER_ENTRIES]>),
}

/// Logical blocks that a page of `level` spans.
pub(crate) fn span_blocks(level: u8) -> u64 {
    (LEAF_ENTRIES as u64) << (8 * u32::from(level))
}

/// The lowest level whose page spans `blocks`.
pub(crate) fn level_for(blocks: u64) -> u8 {
    (0..LEVEL_MAX)
        .find(|&level| span_blocks(level) >= blocks)
        .unwrap_or(LEVEL_MAX)
}

/// The page as it goes to disk; `mapped` is how many logical blocks it and the pages below it map.
pub(crate) fn encode(node: &Node, mapped: u64, identity: PageIdentity) -> PageBytes {
    let mut page = [0; BLOCK_LEN];
    let mut writer = body_mut(&mut page);
    writer.u64(mapped);
    match node {
        Node::Leaf(entries) => {
            for pba in entries.iter() {
                writer.u48(pba.0);
            }
        }
        Node::Inner(children) => {
            for child in children.iter() {
                let (pba, generation) = child.map_or((0, 0), |ptr| (ptr.pba.0, ptr.generation.0));
                writer.u48(pba);
                writer.u48(generation);
            }
        }
    }
    seal(&mut page, identity);
    page
}

/// The node in `page` and how many logical blocks it maps, if it is the page that `identity` names and everything it
/// points to lies in the pool.
pub(crate) fn decode(
    page: &PageBytes,
    identity: PageIdentity,
    bounds: Bounds,
) -> Result<(u64, Node)> {
    let mut reader = verify(page, identity)?;
    let mapped = reader.u64()?;
    if mapped > span_blocks(identity.level) {
        return Err(Error::corrupt("map page: maps more than it spans").at_pba(identity.ptr.pba));
    }
    let outside =
        || Error::corrupt("map page: names a block that it cannot have").at_pba(identity.ptr.pba);
    if identity.level == 0 {
        let mut entries = [Pba(0); LEAF_ENTRIES];
        for entry in &mut entries {
            *entry = Pba(reader.u48()?);
            if entry.0 != 0 && !bounds.contain(*entry) {
                return Err(outside());
            }
        }
        if entries.iter().filter(|entry| entry.0 != 0).count() as u64 != mapped {
            return Err(
                Error::corrupt("map page: maps another number of blocks than it says")
                    .at_pba(identity.ptr.pba),
            );
        }
        return Ok((mapped, Node::Leaf(Arc::new(entries))));
    }
    let mut children = [None; INNER_ENTRIES];
    for child in &mut children {
        let (pba, generation) = (Pba(reader.u48()?), Generation(reader.u48()?));
        if pba.0 != 0 && !bounds.contain(pba) {
            return Err(outside());
        }
        // A child is never younger than its parent: whoever changes a page changes every page above it.
        if generation > identity.ptr.generation {
            return Err(Error::corrupt("map page: names a page younger than itself")
                .at_pba(identity.ptr.pba));
        }
        *child = (pba.0 != 0).then_some(PagePtr { pba, generation });
    }
    Ok((mapped, Node::Inner(Arc::new(children))))
}
