//! Walking maps in steps, each from the root down to where the last one ended, so that no pointer is held between
//! steps: differences between two maps, blocks that only one map has, and the return of a removed map's space.

use super::{MapStore, child_index, leaf_index, level_matches, span_end};
use crate::error::Result;
use crate::format::catalog::{Own, Root};
use crate::format::map_page::{LEAF_ENTRIES, Node, span_blocks};
use crate::format::page::PagePtr;
use crate::space::{Fault, SpaceMap};
use crate::units::{Lba, Pba, Seq};
use triomphe::Arc;

/// What one step of a diff found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Where the next step begins.
    pub(crate) next: Lba,
    /// Blocks that differ, in order, and whether the newer side maps them.
    pub(crate) blocks: Vec<(Lba, bool)>,
}

/// How far one step of a reclaim came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReclaimStep {
    /// Where the next step begins; none when all is returned.
    pub(crate) next: Option<Lba>,
    /// References dropped.
    pub(crate) released: u64,
    /// Logical blocks that the map held where the step went, as far as that is known without reading more.
    pub(crate) passed: u64,
}

impl MapStore {
    /// Where `newer` differs from `older` in the leaf at `from`, or how far neither can.
    pub(crate) fn diff(&self, older: Root, newer: Root, from: Lba) -> Result<Difference, Fault> {
        level_matches(older.level)?;
        level_matches(newer.level)?;
        let nothing = |next| {
            Ok(Difference {
                next,
                blocks: Vec::new(),
            })
        };
        let at = |root: Root, level: u8| -> Result<Option<PagePtr>, Fault> {
            // A page that would stand above a smaller map's root: it has no address of its own to compare.
            if level > root.level {
                Ok(root.ptr.filter(|_| from.0 < span_blocks(root.level)))
            } else {
                self.page_at(root, from, level)
            }
        };
        for level in (0..=older.level.max(newer.level)).rev() {
            let comparable = level <= older.level && level <= newer.level;
            let (a, b) = (at(older, level)?, at(newer, level)?);
            if (a.is_none() && b.is_none()) || (comparable && a == b) {
                return nothing(span_end(level, from));
            }
        }
        let empty = [Pba(0); LEAF_ENTRIES];
        let (a, b) = (
            self.leaf_entries(older, from)?,
            self.leaf_entries(newer, from)?,
        );
        let (a, b) = (a.unwrap_or(&empty), b.unwrap_or(&empty));
        let blocks = (from.0..span_end(0, from).0)
            .map(Lba)
            .filter(|lba| a[leaf_index(*lba)] != b[leaf_index(*lba)])
            .map(|lba| (lba, b[leaf_index(lba)].0 != 0))
            .collect();
        Ok(Difference {
            next: span_end(0, from),
            blocks,
        })
    }

    fn leaf_entries(&self, root: Root, lba: Lba) -> Result<Option<&[Pba; LEAF_ENTRIES]>, Fault> {
        let Some(ptr) = self.page_at(root, lba, 0)? else {
            return Ok(None);
        };
        match &self.page(ptr, 0)?.node {
            Node::Leaf(entries) => Ok(Some(entries)),
            Node::Inner(_) => Ok(None),
        }
    }

    /// The blocks at and after `from` that only this map owns, of one leaf or of nothing up to the returned place. An
    /// inner page is counted with the first place below it.
    pub(crate) fn own(&self, space: &SpaceMap, root: Root, from: Lba) -> Result<(Lba, Own), Fault> {
        level_matches(root.level)?;
        let mut level = root.level;
        let mut own = Own::default();
        let mut next = root.ptr.filter(|_| from.0 < span_blocks(level));
        if next.is_none() {
            return Ok((Lba(u64::MAX), own));
        }
        loop {
            let Some(ptr) = next else {
                return Ok((span_end(level, from), own));
            };
            if space.referenced(ptr.pba)? > 1 {
                return Ok((span_end(level, from), own));
            }
            own.pages += u64::from(from.0.is_multiple_of(span_blocks(level)));
            match &self.page(ptr, level)?.node {
                Node::Leaf(entries) => {
                    for entry in entries.iter().filter(|entry| entry.0 != 0) {
                        own.data += u64::from(space.referenced(*entry)? == 1);
                    }
                    return Ok((span_end(0, from), own));
                }
                Node::Inner(children) => {
                    let rest = &children[child_index(level, from)..];
                    let passed = Self::shared_before(rest, space)?;
                    if passed > 0 {
                        let span = span_blocks(level - 1);
                        return Ok((Lba((from.0 / span + passed) * span), own));
                    }
                    next = rest[0];
                }
            }
            level -= 1;
        }
    }

    /// How many of `children`, from the first on, are missing or others' too.
    fn shared_before(children: &[Option<PagePtr>], space: &SpaceMap) -> Result<u64, Fault> {
        let mut passed = 0;
        for child in children {
            match child {
                Some(ptr) if space.referenced(ptr.pba)? == 1 => break,
                _ => passed += 1,
            }
        }
        Ok(passed)
    }

    /// Returns the space of a removed map at `from`: a leaf's blocks, or one reference to a page that others own too.
    /// Pages that end here go with it. `seq` is the last record appended: another owner's release may stand in any
    /// record up to it.
    pub(crate) fn reclaim(
        &mut self,
        root: Root,
        from: Lba,
        seq: Seq,
        space: &mut SpaceMap,
    ) -> Result<ReclaimStep, Fault> {
        level_matches(root.level)?;
        let Some(top) = root.ptr else {
            return Ok(ReclaimStep {
                next: None,
                released: 0,
                passed: 0,
            });
        };
        // The way down, until a page that others own, a hole or a leaf.
        let mut path = vec![(top, root.level)];
        let mut released = 1;
        let mut passed = 0;
        let mut entries = None;
        let end = loop {
            let Some(&(ptr, level)) = path.last() else {
                return Ok(ReclaimStep {
                    next: None,
                    released: 0,
                    passed: 0,
                });
            };
            if space.referenced(ptr.pba)? > 1 {
                // What others own is not read for this: the backlog is an upper bound.
                passed = self.page(ptr, level).map_or(0, |page| page.mapped);
                break span_end(level, from);
            }
            match &self.page(ptr, level)?.node {
                Node::Leaf(leaf) => {
                    space.all_referenced(&leaf[..])?;
                    entries = Some(Arc::clone(leaf));
                    break span_end(0, from);
                }
                Node::Inner(children) => {
                    let rest = &children[child_index(level, from)..];
                    match rest.iter().position(Option::is_some) {
                        Some(0) => path.push((rest[0].unwrap_or(ptr), level - 1)),
                        position => {
                            let skip = position.unwrap_or(rest.len()) as u64;
                            let span = span_blocks(level - 1);
                            released = 0;
                            break Lba((from.0 / span + skip) * span);
                        }
                    }
                }
            }
        };
        // From here on nothing can be missing.
        if let Some(leaf) = entries {
            space.release_all(&leaf[..], Some(seq));
            let mapped = leaf.iter().filter(|entry| entry.0 != 0).count() as u64;
            released += mapped;
            passed = mapped;
        }
        // A leaf or a shared page ends where the step does; a page above it goes with its last child.
        for (ptr, level) in path.into_iter().rev() {
            if span_end(level, from) <= end {
                self.release_page(ptr, seq, space);
            }
        }
        let is_done = end.0 >= span_blocks(root.level);
        Ok(ReclaimStep {
            next: (!is_done).then_some(end),
            released,
            passed,
        })
    }
}
