//! Looking up: what a read finds, and what a write may do.

use super::{MapStore, child_index, leaf_index, level_matches, span_end};
use crate::error::{Error, Result};
use crate::format::catalog::Root;
use crate::format::map_page::{LEAF_ENTRIES, Node, span_blocks};
use crate::format::page::PagePtr;
use crate::space::{Fault, SpaceMap};
use crate::units::{Extent, Lba, Pba};

/// What a run of logical blocks reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// So many blocks of zeros.
    Hole(u64),
    /// A run of the pool's blocks.
    Mapped(Extent),
}

/// What a write to a run of logical blocks may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nothing is mapped: allocate.
    Hole(u64),
    /// Nobody else has these blocks: write in place.
    Exclusive(Extent),
    /// Somebody else has at least the first of so many blocks: redirect.
    Shared(u64),
}

impl MapStore {
    /// The leaf for `lba` and whether every page on the way has one owner; none for a hole, with its end.
    fn leaf(
        &self,
        root: Root,
        lba: Lba,
        mut see_count: impl FnMut(PagePtr) -> Result<(), Fault>,
    ) -> Result<Result<&[Pba; LEAF_ENTRIES], Lba>, Fault> {
        level_matches(root.level)?;
        let mut level = root.level;
        if lba.0 >= span_blocks(level) {
            return Ok(Err(Lba(u64::MAX)));
        }
        let Some(mut ptr) = root.ptr else {
            return Ok(Err(span_end(level, lba)));
        };
        loop {
            see_count(ptr)?;
            match &self.page(ptr, level)?.node {
                Node::Leaf(entries) => return Ok(Ok(entries)),
                Node::Inner(children) => {
                    let child = children[child_index(level, lba)];
                    level -= 1;
                    match child {
                        Some(child) => ptr = child,
                        None => return Ok(Err(span_end(level, lba))),
                    }
                }
            }
        }
    }

    /// What up to `max` blocks from `lba` read as.
    pub(crate) fn resolve(&self, root: Root, lba: Lba, max: u64) -> Result<Resolved, Fault> {
        let entries = match self.leaf(root, lba, |_| Ok(()))? {
            Err(end) => return Ok(Resolved::Hole((end.0 - lba.0).min(max))),
            Ok(entries) => &entries[leaf_index(lba)..],
        };
        let first = entries[0];
        let run = contiguous(entries, max);
        Ok(match first {
            Pba(0) => Resolved::Hole(run),
            start => Resolved::Mapped(Extent::new(start, run)),
        })
    }

    /// What a write to up to `max` blocks from `lba` may do.
    pub(crate) fn lookup(
        &self,
        space: &SpaceMap,
        root: Root,
        lba: Lba,
        max: u64,
    ) -> Result<Mapping, Fault> {
        let mut path_is_shared = false;
        let leaf = self.leaf(root, lba, |ptr| {
            path_is_shared |=
                !path_is_shared && (space.referenced(ptr.pba)? > 1 || !space.is_settled(ptr.pba));
            Ok(())
        })?;
        let entries = match leaf {
            Err(end) => return Ok(Mapping::Hole((end.0 - lba.0).min(max))),
            Ok(entries) => &entries[leaf_index(lba)..],
        };
        let is_shared = |entry: Pba| -> Result<bool, Fault> {
            Ok(path_is_shared || space.referenced(entry)? > 1 || !space.is_settled(entry))
        };
        let first = entries[0];
        if first.0 != 0 && !path_is_shared {
            let run = contiguous(entries, max);
            match space.exclusive(Extent::new(first, run))? {
                0 => {}
                alone => return Ok(Mapping::Exclusive(Extent::new(first, alone))),
            }
        }
        // The first is a hole or shared; so many more are.
        let first_is_hole = first.0 == 0;
        let mut run = 1;
        for (_, entry) in (1..max).zip(&entries[1..]) {
            if (entry.0 == 0) != first_is_hole || !(first_is_hole || is_shared(*entry)?) {
                break;
            }
            run += 1;
        }
        Ok(if first_is_hole {
            Mapping::Hole(run)
        } else {
            Mapping::Shared(run)
        })
    }

    /// What the `count` blocks from `first` are mapped to, all of which one leaf has; none where there is no leaf.
    pub(crate) fn neighbours(
        &self,
        root: Root,
        first: Lba,
        count: usize,
    ) -> Result<Option<&[Pba]>, Fault> {
        let leaf = self.leaf(root, first, |_| Ok(()))?.ok();
        Ok(leaf.and_then(|entries| entries[leaf_index(first)..].get(..count)))
    }

    /// How many of the `count` blocks from `lba`, all of which one leaf has, are holes.
    pub(crate) fn holes(&self, root: Root, lba: Lba, count: u64) -> Result<u64, Fault> {
        let length = usize::try_from(count).unwrap_or(usize::MAX);
        let entries = self.neighbours(root, lba, length)?;
        let mapped = entries.map_or(0, |entries| {
            entries.iter().filter(|entry| entry.0 != 0).count()
        });
        Ok(count - mapped as u64)
    }

    /// Logical blocks that a map holds.
    pub(crate) fn mapped(&self, root: Root) -> Result<u64, Fault> {
        root.ptr
            .map_or(Ok(0), |ptr| Ok(self.page(ptr, root.level)?.mapped))
    }

    /// The page of `level` that spans `lba`, if there is one.
    pub(crate) fn page_at(
        &self,
        root: Root,
        lba: Lba,
        level: u8,
    ) -> Result<Option<PagePtr>, Fault> {
        if level > root.level {
            return Err(Error::corrupt("a page above its root was asked for").into());
        }
        if lba.0 >= span_blocks(root.level) {
            return Ok(None);
        }
        let mut at = root.level;
        let mut found = root.ptr;
        while at > level {
            let Some(ptr) = found else { return Ok(None) };
            if let Node::Inner(children) = &self.page(ptr, at)?.node {
                found = children[child_index(at, lba)];
            }
            at -= 1;
        }
        Ok(found)
    }
}

/// How many of up to `max` entries go on as the first begins: one block after the other, or all of them holes.
fn contiguous(entries: &[Pba], max: u64) -> u64 {
    let first = entries[0];
    let goes_on = |&(index, entry): &(u64, &Pba)| {
        *entry
            == if first.0 == 0 {
                first
            } else {
                first.plus(index)
            }
    };
    (0..max).zip(entries).take_while(goes_on).count() as u64
}
