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
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use triomphe::Arc;

/// A map page in memory.
#[derive(Clone, Debug)]
pub(crate) struct MapPage {
    pub(crate) level: u8,
    /// Logical blocks that the page and those below it map.
    pub(crate) mapped: u64,
    pub(crate) node: Node,
}

#[derive(Debug)]
struct Cached {
    generation: Generation,
    /// Somebody looked at it since the last time that eviction came by.
    is_used: AtomicBool,
    page: MapPage,
}

impl Cached {
    fn new(generation: Generation, page: MapPage) -> Self {
        Self {
            generation,
            is_used: AtomicBool::new(true),
            page,
        }
    }
}

/// So many pages are looked at by one call of [`MapStore::evict`], so that nobody waits long for it.
const LOOKED_AT_MAX: usize = 64;

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
    /// The pages in memory, in the order in which eviction looks at them, and some that are gone.
    order: VecDeque<PagePtr>,
    /// The last generation that is durable.
    durable: Generation,
    /// So many pages may be in memory.
    pages_max: usize,
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
        Node::Leaf(Arc::new([Pba(0); LEAF_ENTRIES]))
    } else {
        Node::Inner(Arc::new([None; INNER_ENTRIES]))
    }
}

impl MapStore {
    /// A store whose new pages are of `generation`; those before it are durable.
    pub(crate) fn new(generation: Generation) -> Self {
        Self {
            pages: FxHashMap::default(),
            generation,
            dirty: Vec::new(),
            order: VecDeque::new(),
            durable: Generation(generation.0.saturating_sub(1)),
            pages_max: usize::MAX,
        }
    }

    /// The last generation that is durable.
    pub(crate) fn durable(&self) -> Generation {
        self.durable
    }

    /// Everything up to this generation is durable.
    pub(crate) fn set_durable(&mut self, durable: Generation) {
        self.durable = durable;
    }

    /// Lets so many pages be in memory.
    pub(crate) fn limit(&mut self, pages: usize) {
        self.pages_max = pages;
    }

    /// Pages in memory.
    pub(crate) fn loaded_pages(&self) -> usize {
        self.pages.len()
    }

    /// Whether so many pages are of this generation that few of those in memory could be dropped.
    pub(crate) fn is_mostly_dirty(&self) -> bool {
        self.dirty.len() > self.pages_max / 2
    }

    /// How many pages are of this generation.
    pub(crate) fn dirty_pages(&self) -> usize {
        self.dirty.len()
    }

    /// The generation of pages made now.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// The page that `ptr` names.
    pub(crate) fn page(&self, ptr: PagePtr, level: u8) -> Result<&MapPage, Fault> {
        match self.pages.get(&ptr.pba) {
            Some(cached) if cached.generation == ptr.generation && cached.page.level == level => {
                // A store would take the cache line from the other processors each time.
                if !cached.is_used.load(Ordering::Relaxed) {
                    cached.is_used.store(true, Ordering::Relaxed);
                }
                Ok(&cached.page)
            }
            _ => Err(Fault::Missing(Missing::Page(ptr, level))),
        }
    }

    /// Puts a page from disk into memory, unless a younger one has taken its block meanwhile.
    pub(crate) fn insert_loaded(&mut self, ptr: PagePtr, page: MapPage) {
        let before = self.pages.get(&ptr.pba).map(|cached| cached.generation);
        if before.is_some_and(|before| before > ptr.generation) {
            return;
        }
        let cached = Cached::new(ptr.generation, page);
        self.pages.insert(ptr.pba, cached);
        if before != Some(ptr.generation) {
            self.put_in_order(ptr);
        }
    }

    /// Adds a page to those that eviction looks at. Some that are gone leave, so that the order stays as short as memory.
    fn put_in_order(&mut self, ptr: PagePtr) {
        self.order.push_back(ptr);
        for _ in 0..2 {
            if self.order.len() <= 2 * self.pages.len() {
                break;
            }
            let first = self.order.pop_front();
            self.order.extend(first.filter(|first| self.holds(*first)));
        }
    }

    fn holds(&self, ptr: PagePtr) -> bool {
        let cached = self.pages.get(&ptr.pba);
        cached.is_some_and(|cached| cached.generation == ptr.generation)
    }

    /// Whether more pages are in memory than may be.
    pub(crate) fn is_over(&self) -> bool {
        self.pages.len() > self.pages_max
    }

    /// Drops pages of durable generations where more are in memory than may be: what was not looked at since the last time
    /// goes first.
    pub(crate) fn evict(&mut self) {
        for _ in 0..LOOKED_AT_MAX {
            if !self.is_over() {
                return;
            }
            let Some(ptr) = self.order.pop_front() else {
                return;
            };
            let Some(cached) = self.pages.get(&ptr.pba) else {
                continue;
            };
            if cached.generation != ptr.generation {
                continue;
            }
            let is_used = cached.is_used.swap(false, Ordering::Relaxed);
            if is_used || cached.generation > self.durable {
                self.order.push_back(ptr);
            } else {
                self.pages.remove(&ptr.pba);
            }
        }
    }

    /// Ends the generation: its pages are frozen and handed to the checkpoint that writes them, in no order: nobody
    /// can look anything up meanwhile.
    pub(crate) fn freeze(&mut self) -> Vec<FrozenPage> {
        let generation = self.generation;
        self.generation = generation.next();
        std::mem::take(&mut self.dirty)
            .into_iter()
            .filter_map(|ptr| {
                let cached = self.pages.get(&ptr.pba)?;
                let is_live = cached.generation == ptr.generation;
                is_live.then(|| FrozenPage {
                    ptr,
                    page: cached.page.clone(),
                })
            })
            .collect()
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
        self.pages
            .insert(ptr.pba, Cached::new(ptr.generation, page));
        self.put_in_order(ptr);
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
        space.release_page(ptr, Some(seq));
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
