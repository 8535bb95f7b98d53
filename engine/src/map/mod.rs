//! The maps: `Lba` to `Pba`, each a radix tree of pages that volumes and snapshots share.
//!
//! A page of the current generation with one owner is changed where it is. Any other is first *shadowed*: copied to a
//! new block, its children retained if its old owners keep it. So every page of an earlier generation is frozen by
//! itself: a checkpoint writes it while the live maps go on, and a snapshot is one more owner of a root page.

mod change;
mod lookup;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use change::UnmapStep;
pub(crate) use lookup::{Mapping, Resolved};
pub(crate) use walk::ReclaimStep;

use crate::error::{Error, Result};
use crate::format::catalog::Root;
use crate::format::map_page::{INNER_ENTRIES, LEAF_ENTRIES, LEVEL_MAX, Node, span_blocks};
use crate::format::page::PagePtr;
use crate::space::{Fault, Missing, SpaceMap};
use crate::units::{Generation, Lba, Pba, Seq};
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// A map page in memory.
#[derive(Clone, Debug)]
pub(crate) struct MapPage {
    pub(crate) level: u8,
    /// Logical blocks that the page and those below it map.
    pub(crate) mapped: u64,
    pub(crate) node: Arc<Node>,
}

#[derive(Debug)]
struct Cached {
    generation: Generation,
    page: MapPage,
}

/// A page that a checkpoint writes.
#[derive(Debug)]
pub(crate) struct FrozenPage {
    pub(crate) ptr: PagePtr,
    pub(crate) page: MapPage,
}

/// The map pages in memory, of all volumes and snapshots.
#[derive(Debug)]
pub(crate) struct MapStore {
    pages: FxHashMap<Pba, Cached>,
    /// The generation of pages made now.
    generation: Generation,
    /// Pages made in this generation; those released since are not in `pages` any more.
    dirty: Vec<PagePtr>,
}

/// The child of an inner page that leads to `lba`.
fn child_index(level: u8, lba: Lba) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below 256"
    )]
    let index = (lba.0 / span_blocks(level - 1) % INNER_ENTRIES as u64) as usize;
    index
}

/// The entry of a leaf for `lba`.
fn leaf_index(lba: Lba) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the remainder is below 512"
    )]
    let index = (lba.0 % LEAF_ENTRIES as u64) as usize;
    index
}

/// The first block after the page of `level` that holds `lba`.
fn span_end(level: u8, lba: Lba) -> Lba {
    let span = span_blocks(level);
    Lba((lba.0 / span + 1) * span)
}

fn empty_node(level: u8) -> Node {
    if level == 0 {
        Node::Leaf(Box::new([Pba(0); LEAF_ENTRIES]))
    } else {
        Node::Inner(Box::new([None; INNER_ENTRIES]))
    }
}

impl MapStore {
    /// A store whose new pages are of `generation`.
    pub(crate) fn new(generation: Generation) -> Self {
        Self {
            pages: FxHashMap::default(),
            generation,
            dirty: Vec::new(),
        }
    }

    /// The generation of pages made now.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// The page that `ptr` names.
    pub(crate) fn page(&self, ptr: PagePtr, level: u8) -> Result<&MapPage, Fault> {
        match self.pages.get(&ptr.pba) {
            Some(cached) if cached.generation == ptr.generation && cached.page.level == level => {
                Ok(&cached.page)
            }
            _ => Err(Fault::Missing(Missing::Page(ptr, level))),
        }
    }

    /// Puts a page from disk into memory, unless a younger one has taken its block meanwhile.
    pub(crate) fn insert_loaded(&mut self, ptr: PagePtr, page: MapPage) {
        let is_older = |cached: &Cached| cached.generation <= ptr.generation;
        if self.pages.get(&ptr.pba).is_none_or(is_older) {
            let generation = ptr.generation;
            self.pages.insert(ptr.pba, Cached { generation, page });
        }
    }

    /// Whether more than `most` pages are in memory.
    pub(crate) fn is_over(&self, most: usize) -> bool {
        self.pages.len() > most
    }

    /// Drops pages of durable generations where more than `most` are in memory, until an eighth of that is free again.
    pub(crate) fn evict(&mut self, durable: Generation, most: usize) {
        if !self.is_over(most) {
            return;
        }
        let keep = most - most / 8;
        let mut excess = self.pages.len().saturating_sub(keep);
        self.pages.retain(|_, cached| {
            let goes = excess > 0 && cached.generation <= durable;
            excess -= usize::from(goes);
            !goes
        });
    }

    /// Ends the generation: its pages are frozen and handed to the checkpoint that writes them.
    pub(crate) fn freeze(&mut self) -> Vec<FrozenPage> {
        let generation = self.generation;
        self.generation = generation.next();
        let mut frozen: Vec<FrozenPage> = std::mem::take(&mut self.dirty)
            .into_iter()
            .filter_map(|ptr| {
                let cached = self.pages.get(&ptr.pba)?;
                let is_live = cached.generation == ptr.generation;
                is_live.then(|| FrozenPage {
                    ptr,
                    page: cached.page.clone(),
                })
            })
            .collect();
        frozen.sort_by_key(|frozen| frozen.ptr);
        frozen.dedup_by_key(|frozen| frozen.ptr);
        frozen
    }

    /// Shares a map: one more owner of its root page. The caller checked the root's count with `referenced`.
    pub(crate) fn fork(root: Root, space: &mut SpaceMap) -> Root {
        if let Some(ptr) = root.ptr {
            space.retain(ptr.pba);
        }
        root
    }

    /// Puts a new page of this generation into memory.
    fn insert_new(&mut self, page: MapPage, space: &mut SpaceMap) -> PagePtr {
        let ptr = PagePtr {
            pba: space.take_metadata(),
            generation: self.generation,
        };
        let generation = ptr.generation;
        self.pages.insert(ptr.pba, Cached { generation, page });
        self.dirty.push(ptr);
        ptr
    }

    /// Releases a page; at its last owner it leaves memory. Its children are the caller's. `seq` as in
    /// [`SpaceMap::release`].
    fn release_page(&mut self, ptr: PagePtr, seq: Seq, space: &mut SpaceMap) {
        if matches!(space.count(ptr.pba), Ok(1)) {
            self.pages.remove(&ptr.pba);
            space.note_page_freed();
        }
        space.release(ptr.pba, Some(seq));
    }

    #[expect(
        clippy::expect_used,
        reason = "prepare saw every page of the path in memory"
    )]
    fn page_mut(&mut self, ptr: PagePtr) -> &mut MapPage {
        let cached = self
            .pages
            .get_mut(&ptr.pba)
            .expect("a prepared page is in memory");
        assert!(
            cached.generation == self.generation,
            "a frozen page is about to change"
        );
        &mut cached.page
    }
}

/// Refuses a level that no map has.
fn level_matches(level: u8) -> Result<(), Fault> {
    if level > LEVEL_MAX {
        return Err(Error::corrupt("a map deeper than maps can be").into());
    }
    Ok(())
}
