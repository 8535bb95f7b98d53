//! Changing a map: remap and unmap, each in two parts. *Prepare* looks at everything the change will touch and sets
//! blocks aside, and may find something missing; *apply* then cannot fail.

use super::{MapPage, MapStore, child_index, empty_node, leaf_index, level_matches, span_end};
use crate::error::{Error, Result};
use crate::format::catalog::Root;
use crate::format::map_page::{LEAF_ENTRIES, LEVEL_MAX, Node, span_blocks};
use crate::format::page::PagePtr;
use crate::space::{Fault, SpaceMap};
use crate::units::{Extent, Lba, Pba, Seq};
use triomphe::Arc;

/// What one step of an unmap does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnmapStep {
    /// Nothing is mapped up to there.
    Skip { to: Lba },
    /// Entries of one leaf go.
    Entries { from: Lba, to: Lba },
    /// A whole page of this level goes that another map owns too.
    SharedPage { from: Lba, to: Lba, level: u8 },
}

/// The page that a path leads to.
#[derive(Debug)]
struct Reached<'a> {
    ptr: PagePtr,
    page: &'a MapPage,
    /// It and all above it are of this generation and have one owner: they may be changed as they are.
    is_writable: bool,
}

impl MapStore {
    /// Sees to it that the pages from the root down to `lowest` can be made writable: all of them and the counts they
    /// lead to in memory, and enough blocks set aside. Gives the page of `lowest`, if there is one.
    fn prepare_path(
        &self,
        root: Root,
        lba: Lba,
        lowest: u8,
        space: &mut SpaceMap,
    ) -> Result<Option<Reached<'_>>, Fault> {
        level_matches(root.level)?;
        if lba.0 >= span_blocks(root.level) {
            return Err(Error::corrupt("a block beyond its map").at_lba(lba).into());
        }
        // The worst case, so that what is set aside does not depend on what is found.
        space.set_aside(u64::from(LEVEL_MAX) + 1)?;
        let mut is_shared = false;
        let mut is_old = false;
        let mut level = root.level;
        let mut next = root.ptr;
        while let Some(ptr) = next {
            is_shared |= space.referenced(ptr.pba)? > 1;
            is_old |= ptr.generation != self.generation;
            let page = self.page(ptr, level)?;
            if is_shared {
                self.require_children(&page.node, space)?;
            }
            if level == lowest {
                return Ok(Some(Reached {
                    ptr,
                    page,
                    is_writable: !is_shared && !is_old,
                }));
            }
            if let Node::Inner(children) = &page.node {
                next = children[child_index(level, lba)];
            }
            level -= 1;
        }
        Ok(None)
    }

    /// Every count that copying a page would raise is in memory.
    #[expect(
        clippy::unused_self,
        reason = "it belongs to the preparation of a change"
    )]
    fn require_children(&self, node: &Node, space: &SpaceMap) -> Result<(), Fault> {
        match node {
            Node::Leaf(entries) => space.all_referenced(&entries[..])?,
            Node::Inner(children) => {
                for child in children.iter().flatten() {
                    space.referenced(child.pba)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the pages from the root down to `lowest` ones that may be changed and adds `delta` to what each maps;
    /// missing ones are made. Gives the lowest.
    fn make_writable(
        &mut self,
        root: &mut Root,
        lba: Lba,
        lowest: u8,
        delta: i64,
        seq: Seq,
        space: &mut SpaceMap,
    ) -> PagePtr {
        let mut level = root.level;
        let mut ptr = self.writable_page(root.ptr, level, delta, seq, space);
        root.ptr = Some(ptr);
        while level > lowest {
            let slot = child_index(level, lba);
            let child = match &self.page_mut(ptr).node {
                Node::Inner(children) => children[slot],
                Node::Leaf(_) => None,
            };
            let writable = self.writable_page(child, level - 1, delta, seq, space);
            if child != Some(writable) {
                self.set_child(ptr, slot, Some(writable));
            }
            ptr = writable;
            level -= 1;
        }
        ptr
    }

    fn set_child(&mut self, parent: PagePtr, slot: usize, child: Option<PagePtr>) {
        if let Node::Inner(children) = &mut self.page_mut(parent).node {
            Arc::make_mut(children)[slot] = child;
        }
    }

    /// The page itself if it is of this generation and has one owner; else a copy that is, owned in its stead.
    fn writable_page(
        &mut self,
        ptr: Option<PagePtr>,
        level: u8,
        delta: i64,
        seq: Seq,
        space: &mut SpaceMap,
    ) -> PagePtr {
        let writable = match ptr {
            None => {
                let page = MapPage {
                    level,
                    mapped: 0,
                    node: empty_node(level),
                };
                self.insert_new(page, space)
            }
            Some(ptr) => self.shadow(ptr, seq, space),
        };
        if delta != 0 {
            let page = self.page_mut(writable);
            page.mapped = page.mapped.saturating_add_signed(delta);
        }
        writable
    }

    fn shadow(&mut self, ptr: PagePtr, seq: Seq, space: &mut SpaceMap) -> PagePtr {
        let is_shared = !matches!(space.count(ptr.pba), Ok(1));
        if !is_shared && ptr.generation == self.generation {
            return ptr;
        }
        #[expect(clippy::expect_used, reason = "prepare_path saw the page in memory")]
        let page = self
            .pages
            .get(&ptr.pba)
            .expect("a prepared page is in memory")
            .page
            .clone();
        if is_shared {
            match &page.node {
                Node::Leaf(entries) => space.retain_all(&entries[..]),
                Node::Inner(children) => {
                    for child in children.iter().flatten() {
                        space.retain(child.pba);
                    }
                }
            }
        }
        self.release_page(ptr, seq, space);
        self.insert_new(page, space)
    }

    /// Prepares mapping the blocks from `lba`, all of one leaf, elsewhere. Gives the leaf if nothing on the way has to be
    /// copied or made.
    pub(crate) fn prepare_remap(
        &self,
        root: Root,
        lba: Lba,
        count: u64,
        space: &mut SpaceMap,
    ) -> Result<Option<PagePtr>, Fault> {
        let reached = self.prepare_path(root, lba, 0, space)?;
        require_entries(reached.as_ref(), lba, count, space)?;
        let writable = reached.filter(|reached| reached.is_writable);
        Ok(writable.map(|reached| reached.ptr))
    }

    /// Maps the blocks from `lba` to `extent`, which was reserved, and releases what they mapped to. `leaf` is what
    /// [`MapStore::prepare_remap`] gave.
    pub(crate) fn remap(
        &mut self,
        root: &mut Root,
        lba: Lba,
        extent: Extent,
        leaf: Option<PagePtr>,
        seq: Seq,
        space: &mut SpaceMap,
    ) {
        let leaf = match leaf {
            Some(leaf) => leaf,
            None => self.make_writable(root, lba, 0, 0, seq, space),
        };
        let first = leaf_index(lba);
        let mut holes = 0;
        space.publish(extent);
        if let Node::Leaf(entries) = &mut self.page_mut(leaf).node {
            for (entry, new) in Arc::make_mut(entries)[first..]
                .iter_mut()
                .zip(extent.blocks())
            {
                let old = std::mem::replace(entry, new);
                if old.0 == 0 {
                    holes += 1;
                } else {
                    space.release(old, Some(seq));
                }
            }
        }
        if holes > 0 {
            self.add_mapped(*root, lba, holes);
        }
    }

    /// Adds to what the pages map from the root down to the leaf of `lba`, all of which were made writable.
    fn add_mapped(&mut self, root: Root, lba: Lba, blocks: u64) {
        let mut level = root.level;
        let mut next = root.ptr;
        while let Some(ptr) = next {
            let page = self.page_mut(ptr);
            page.mapped = page.mapped.saturating_add(blocks);
            next = match &page.node {
                Node::Inner(children) => children[child_index(level, lba)],
                Node::Leaf(_) => None,
            };
            level = level.saturating_sub(1);
        }
    }

    fn entries(&self, root: Root, lba: Lba) -> Result<Option<&[Pba; LEAF_ENTRIES]>, Fault> {
        let Some(leaf) = self.page_at(root, lba, 0)? else {
            return Ok(None);
        };
        match &self.page(leaf, 0)?.node {
            Node::Leaf(entries) => Ok(Some(entries)),
            Node::Inner(_) => Err(Error::corrupt("an inner page in a leaf's place")
                .at_pba(leaf.pba)
                .into()),
        }
    }

    fn count_holes(&self, root: Root, lba: Lba, count: u64) -> u64 {
        match self.entries(root, lba) {
            Ok(Some(entries)) => {
                let run = entries[leaf_index(lba)..].iter().zip(0..count);
                run.filter(|(entry, _)| entry.0 == 0).count() as u64
            }
            _ => count,
        }
    }

    /// What the next step of unmapping `from..end` is, prepared.
    pub(crate) fn prepare_unmap(
        &self,
        root: Root,
        from: Lba,
        end: Lba,
        space: &mut SpaceMap,
    ) -> Result<UnmapStep, Fault> {
        level_matches(root.level)?;
        let mut level = root.level;
        let mut is_shared = false;
        let mut next = root.ptr;
        if from.0 >= span_blocks(level) {
            return Ok(UnmapStep::Skip { to: end });
        }
        loop {
            let to = span_end(level, from).min(end);
            let Some(ptr) = next else {
                return Ok(UnmapStep::Skip { to });
            };
            is_shared |= space.referenced(ptr.pba)? > 1;
            let is_whole = from.0.is_multiple_of(span_blocks(level)) && to == span_end(level, from);
            let page = self.page(ptr, level)?;
            if is_whole && is_shared {
                if level < root.level {
                    self.prepare_path(root, from, level + 1, space)?;
                }
                return Ok(UnmapStep::SharedPage { from, to, level });
            }
            match &page.node {
                Node::Leaf(entries) => {
                    let run = &entries[leaf_index(from)..];
                    let skip = run
                        .iter()
                        .zip(from.0..to.0)
                        .take_while(|(entry, _)| entry.0 == 0)
                        .count() as u64;
                    if skip > 0 {
                        return Ok(UnmapStep::Skip {
                            to: from.plus(skip),
                        });
                    }
                    let leaf = self.prepare_path(root, from, 0, space)?;
                    require_entries(leaf.as_ref(), from, to.0 - from.0, space)?;
                    return Ok(UnmapStep::Entries { from, to });
                }
                Node::Inner(children) => next = children[child_index(level, from)],
            }
            level -= 1;
        }
    }

    /// Does what [`MapStore::prepare_unmap`] found.
    pub(crate) fn unmap(
        &mut self,
        root: &mut Root,
        step: UnmapStep,
        seq: Seq,
        space: &mut SpaceMap,
    ) {
        let from = match step {
            UnmapStep::Skip { .. } => return,
            UnmapStep::SharedPage { level, .. } if level == root.level => {
                if let Some(ptr) = root.ptr.take() {
                    self.release_page(ptr, seq, space);
                }
                return;
            }
            UnmapStep::SharedPage { from, level, .. } => {
                if let Ok(Some(child)) = self.page_at(*root, from, level) {
                    let gone = self.page(child, level).map_or(0, |page| page.mapped);
                    let delta = -i64::try_from(gone).unwrap_or(i64::MAX);
                    let parent = self.make_writable(root, from, level + 1, delta, seq, space);
                    self.set_child(parent, child_index(level + 1, from), None);
                    self.release_page(child, seq, space);
                }
                from
            }
            UnmapStep::Entries { from, to } => {
                let count = to.0 - from.0;
                let gone = count - self.count_holes(*root, from, count);
                let delta = -i64::try_from(gone).unwrap_or(i64::MAX);
                let leaf = self.make_writable(root, from, 0, delta, seq, space);
                if let Node::Leaf(entries) = &mut self.page_mut(leaf).node {
                    let run = &mut Arc::make_mut(entries)[leaf_index(from)..];
                    for (entry, _) in run.iter_mut().zip(0..count) {
                        let old = std::mem::take(entry);
                        if old.0 != 0 {
                            space.release(old, Some(seq));
                        }
                    }
                }
                from
            }
        };
        self.prune(root, from, seq, space);
    }

    /// Removes the pages on the way to `lba` that map nothing any more. All of them are writable.
    fn prune(&mut self, root: &mut Root, lba: Lba, seq: Seq, space: &mut SpaceMap) {
        for level in 0..=root.level {
            let Ok(Some(ptr)) = self.page_at(*root, lba, level) else {
                continue;
            };
            if self.page(ptr, level).map_or(1, |page| page.mapped) > 0 {
                return;
            }
            if level == root.level {
                root.ptr = None;
            } else if let Ok(Some(parent)) = self.page_at(*root, lba, level + 1) {
                self.set_child(parent, child_index(level + 1, lba), None);
            }
            self.release_page(ptr, seq, space);
        }
    }

    /// Prepares [`MapStore::raise`].
    pub(crate) fn prepare_raise(
        &self,
        root: Root,
        level: u8,
        space: &mut SpaceMap,
    ) -> Result<(), Fault> {
        level_matches(level)?;
        space.set_aside(u64::from(LEVEL_MAX) + 1)?;
        root.ptr
            .map_or(Ok(()), |ptr| self.page(ptr, root.level).map(|_| ()))
    }

    /// Gives a map roots above its root until it has `level`; it maps what it mapped.
    pub(crate) fn raise(&mut self, root: &mut Root, level: u8, space: &mut SpaceMap) {
        while root.level < level {
            if let Some(below) = root.ptr {
                let mapped = self.page(below, root.level).map_or(0, |page| page.mapped);
                let mut node = empty_node(root.level + 1);
                if let Node::Inner(children) = &mut node {
                    Arc::make_mut(children)[0] = Some(below);
                }
                let page = MapPage {
                    level: root.level + 1,
                    mapped,
                    node,
                };
                root.ptr = Some(self.insert_new(page, space));
            }
            root.level += 1;
        }
    }
}

impl UnmapStep {
    /// Where the step ends.
    pub(crate) fn end(self) -> Lba {
        match self {
            Self::Skip { to } | Self::Entries { to, .. } | Self::SharedPage { to, .. } => to,
        }
    }

    /// What the step unmaps, if anything.
    pub(crate) fn unmapped(self) -> Option<(Lba, u64)> {
        match self {
            Self::Skip { .. } => None,
            Self::Entries { from, to } | Self::SharedPage { from, to, .. } => {
                Some((from, to.0 - from.0))
            }
        }
    }
}

/// Every count that replacing these entries of a leaf would lower is in memory.
fn require_entries(
    leaf: Option<&Reached<'_>>,
    lba: Lba,
    count: u64,
    space: &SpaceMap,
) -> Result<(), Fault> {
    if let Some(Node::Leaf(entries)) = leaf.map(|leaf| &leaf.page.node) {
        let run = entries[leaf_index(lba)..].iter().zip(0..count);
        for (entry, _) in run.filter(|(entry, _)| entry.0 != 0) {
            space.referenced(*entry)?;
        }
    }
    Ok(())
}
