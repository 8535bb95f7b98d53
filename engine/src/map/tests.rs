//! Maps against plain lists of what they map: random operations by seed, and the counts of all blocks added up anew.

use super::{MapStore, Mapping, Resolved, UnmapStep, leaf_index, span_end};
use crate::format::catalog::Root;
use crate::format::layout;
use crate::format::map_page::{LEAF_ENTRIES, LEVEL_MAX, Node, span_blocks};
use crate::format::page::PagePtr;
use crate::space::{Fault, Missing, SpaceMap};
use crate::units::{Extent, Generation, Lba, Pba, Seq};
use fastrand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

const LEAF: u64 = LEAF_ENTRIES as u64;
const LEVEL_1: u64 = LEAF * 256;
const POOL: u64 = 40_000;

/// A map and what it must hold.
#[derive(Clone, Debug)]
struct Owner {
    root: Root,
    held: BTreeMap<u64, Pba>,
}

struct Pair {
    store: MapStore,
    space: SpaceMap,
    /// Maps that change, and those that stay as they are.
    live: Vec<Owner>,
    frozen: Vec<Owner>,
    seq: u64,
    rng: Rng,
}

/// Blocks around the ends of leaves and of pages of level 1.
fn somewhere(level: u8, rng: &mut Rng) -> u64 {
    let ends = [0, 1, 2, 255, 256, 257, 511, 512, 600].map(|leaf| leaf * LEAF);
    let end = ends[rng.usize(..ends.len())];
    let lba = (end + rng.u64(..24)).saturating_sub(12);
    lba.min(span_blocks(level) - 1)
}

impl Pair {
    fn new(seed: u64) -> Self {
        let journal = layout::journal(POOL);
        let mut space = SpaceMap::new(POOL, journal);
        for region in 0..layout::region_count(POOL) {
            space.load(region, None, None).unwrap();
        }
        let owner = |level| Owner {
            root: Root { ptr: None, level },
            held: BTreeMap::new(),
        };
        Self {
            store: MapStore::new(Generation(1)),
            space,
            live: vec![owner(0), owner(1), owner(2)],
            frozen: Vec::new(),
            seq: 1,
            rng: Rng::with_seed(seed),
        }
    }

    fn remap(&mut self) {
        let number = self.rng.usize(..self.live.len());
        let mut owner = self.live[number].clone();
        let lba = Lba(somewhere(owner.root.level, &mut self.rng));
        let want = (1 + self.rng.u64(..12)).min(span_end(0, lba).0 - lba.0);
        let Ok(extent) = self.space.reserve(Pba(0), want) else {
            return;
        };
        let prepared = self
            .store
            .prepare_remap(owner.root, lba, extent.count, &mut self.space);
        let leaf = prepared.unwrap();
        self.seq += 1;
        let seq = Seq(self.seq);
        self.store
            .remap(&mut owner.root, lba, extent, leaf, seq, &mut self.space);
        for (at, pba) in (lba.0..).zip(extent.blocks()) {
            owner.held.insert(at, pba);
        }
        self.live[number] = owner;
    }

    fn unmap(&mut self) {
        let number = self.rng.usize(..self.live.len());
        let mut owner = self.live[number].clone();
        let span = span_blocks(owner.root.level);
        let (mut from, end) = match self.rng.u8(..4) {
            0 => {
                let leaf = somewhere(owner.root.level, &mut self.rng) / LEAF * LEAF;
                (leaf, leaf + LEAF)
            }
            1 if self.rng.u8(..4) == 0 => (0, span),
            _ => {
                let from = somewhere(owner.root.level, &mut self.rng);
                (from, (from + self.rng.u64(..1200)).min(span))
            }
        };
        while from < end {
            let step = self
                .store
                .prepare_unmap(owner.root, Lba(from), Lba(end), &mut self.space)
                .unwrap();
            assert!(step.end().0 > from && (step.end().0 <= end || step.unmapped().is_none()));
            self.seq += 1;
            self.store
                .unmap(&mut owner.root, step, Seq(self.seq), &mut self.space);
            match step.unmapped() {
                None => assert!(
                    owner
                        .held
                        .range(from..step.end().0.min(end))
                        .next()
                        .is_none()
                ),
                Some((at, count)) => {
                    assert_eq!((at.0, at.0 + count), (from, step.end().0));
                    if let UnmapStep::SharedPage { level, .. } = step {
                        assert_eq!(count, span_blocks(level));
                    }
                    owner
                        .held
                        .retain(|lba, _| !(from..step.end().0).contains(lba));
                }
            }
            from = step.end().0;
        }
        self.live[number] = owner;
    }

    fn fork(&mut self) {
        let from = self.live[self.rng.usize(..self.live.len())].clone();
        let root = MapStore::fork(from.root, &mut self.space);
        let forked = Owner { root, ..from };
        if self.rng.bool() && self.live.len() < 6 {
            self.live.push(forked);
        } else {
            self.frozen.push(forked);
        }
    }

    fn raise(&mut self) {
        let number = self.rng.usize(..self.live.len());
        let mut owner = self.live[number].clone();
        let level = (owner.root.level + self.rng.u8(..2)).min(LEVEL_MAX);
        let prepared = self.store.prepare_raise(owner.root, level, &mut self.space);
        prepared.unwrap();
        self.store.raise(&mut owner.root, level, &mut self.space);
        self.live[number] = owner;
    }

    /// Returns all of a map, step by step; the other maps are as they were.
    fn reclaim(&mut self) {
        if self.frozen.is_empty() {
            return;
        }
        let gone = self.frozen.swap_remove(self.rng.usize(..self.frozen.len()));
        let before = self.space.used_blocks();
        let (mut from, mut released) = (Lba(0), 0);
        for _ in 0..3000 {
            self.seq += 1;
            let step = self
                .store
                .reclaim(gone.root, from, Seq(self.seq), &mut self.space)
                .unwrap();
            released += step.released;
            let Some(next) = step.next else {
                assert!(released > 0 || gone.root.ptr.is_none());
                assert!(before - self.space.used_blocks() <= released + 300);
                return;
            };
            assert!(next > from, "a reclaim goes on");
            from = next;
        }
        panic!("a reclaim does not end");
    }

    fn checkpoint(&mut self) {
        let generation = self.store.generation();
        let pages = self.store.freeze();
        assert_eq!(self.store.generation(), generation.next());
        let mut ptrs: Vec<_> = pages.iter().map(|page| page.ptr).collect();
        ptrs.sort_unstable();
        assert!(ptrs.is_sorted_by(|a, b| a < b), "each page once");
        // Every page of the generation that a map can reach is written.
        let reachable = self.count_all().0;
        for ptr in reachable
            .into_iter()
            .filter(|ptr| ptr.generation == generation)
        {
            assert!(ptrs.contains(&ptr), "{ptr:?} is not written");
        }
        assert!(ptrs.iter().all(|ptr| ptr.generation == generation));
        let pending = self.space.take_pending();
        self.space.reuse(&pending, true);
        self.space.settle(Seq(self.seq));
    }

    /// All pages, and how many owners every block has.
    fn count_all(&self) -> (BTreeSet<PagePtr>, BTreeMap<Pba, u32>) {
        let mut counts: BTreeMap<Pba, u32> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let owners = self.live.iter().chain(&self.frozen);
        let mut open: Vec<(PagePtr, u8)> = owners
            .filter_map(|owner| owner.root.ptr.map(|ptr| (ptr, owner.root.level)))
            .collect();
        while let Some((ptr, level)) = open.pop() {
            *counts.entry(ptr.pba).or_default() += 1;
            if !seen.insert(ptr) {
                continue;
            }
            match &self.store.page(ptr, level).unwrap().node {
                Node::Leaf(entries) => {
                    for entry in entries.iter().filter(|entry| entry.0 != 0) {
                        *counts.entry(*entry).or_default() += 1;
                    }
                }
                Node::Inner(children) => {
                    open.extend(children.iter().flatten().map(|child| (*child, level - 1)));
                }
            }
        }
        (seen, counts)
    }

    fn check_counts(&self) {
        let counts = self.count_all().1;
        let journal = layout::journal(POOL);
        for pba in (0..POOL)
            .map(Pba)
            .filter(|pba| !layout::is_fixed(*pba, journal))
        {
            let expected = counts.get(&pba).copied().unwrap_or(0);
            assert_eq!(self.space.count(pba).unwrap(), expected, "owners of {pba}");
        }
        assert_eq!(self.space.underflows(), 0);
    }

    /// The pages on the way to a block, from the root down.
    fn way(&self, root: Root, lba: u64) -> Vec<PagePtr> {
        let pages = (0..=root.level).rev();
        pages
            .filter_map(|level| self.store.page_at(root, Lba(lba), level).unwrap())
            .collect()
    }

    /// What a write to one block may do, looked at alone.
    fn may(&self, owner: &Owner, lba: u64) -> Mapping {
        let Some(pba) = owner.held.get(&lba) else {
            return Mapping::Hole(1);
        };
        let mut blocks: Vec<Pba> = self
            .way(owner.root, lba)
            .iter()
            .map(|ptr| ptr.pba)
            .collect();
        blocks.push(*pba);
        let is_alone =
            |pba: &Pba| self.space.count(*pba).unwrap() == 1 && self.space.is_settled(*pba);
        if blocks.iter().all(is_alone) {
            Mapping::Exclusive(Extent::new(*pba, 1))
        } else {
            Mapping::Shared(1)
        }
    }

    fn check_content(&mut self) {
        let owners: Vec<Owner> = self.live.iter().chain(&self.frozen).cloned().collect();
        for owner in &owners {
            let mapped = self.store.mapped(owner.root).unwrap();
            assert_eq!(mapped, owner.held.len() as u64);
            if owner.held.is_empty() && !self.frozen.iter().any(|other| other.root == owner.root) {
                assert_eq!(owner.root.ptr, None, "an empty map has no page");
            }
            for _ in 0..30 {
                let lba = somewhere(owner.root.level, &mut self.rng);
                let max = 1 + self.rng.u64(..40);
                self.check_run(owner, lba, max);
            }
            let beyond = Lba(span_blocks(owner.root.level));
            let hole = self.store.resolve(owner.root, beyond, 3).unwrap();
            assert_eq!(hole, Resolved::Hole(3));
        }
    }

    fn check_run(&self, owner: &Owner, lba: u64, max: u64) {
        let leaf_end = span_end(0, Lba(lba)).0;
        let most = max.min(leaf_end - lba);
        let run =
            |goes_on: &dyn Fn(u64) -> bool| (1..most).find(|at| !goes_on(*at)).unwrap_or(most);
        let has_leaf = self.way(owner.root, lba).len() == usize::from(owner.root.level) + 1;
        let first = owner.held.get(&lba).copied();
        let resolved = self.store.resolve(owner.root, Lba(lba), max).unwrap();
        let looked = self
            .store
            .lookup(&self.space, owner.root, Lba(lba), max)
            .unwrap();
        match first {
            None => {
                let length = run(&|at| !owner.held.contains_key(&(lba + at)));
                let Resolved::Hole(hole) = resolved else {
                    panic!("{lba} is a hole and resolves to {resolved:?}")
                };
                assert_eq!(looked, Mapping::Hole(hole));
                assert!(hole >= length && hole <= max);
                assert!(hole == length || !has_leaf);
                assert!(owner.held.range(lba..lba + hole).next().is_none());
            }
            Some(first) => {
                let follows = |at: u64| owner.held.get(&(lba + at)) == Some(&first.plus(at));
                let extent = Extent::new(first, run(&follows));
                assert_eq!(resolved, Resolved::Mapped(extent));
                let kind = self.may(owner, lba);
                let same = |at: u64| match (kind, self.may(owner, lba + at)) {
                    (Mapping::Exclusive(_), Mapping::Exclusive(_)) => follows(at),
                    (Mapping::Shared(_), Mapping::Shared(_)) => true,
                    _ => false,
                };
                let expected = match kind {
                    Mapping::Exclusive(_) => Mapping::Exclusive(Extent::new(first, run(&same))),
                    Mapping::Hole(_) | Mapping::Shared(_) => Mapping::Shared(run(&same)),
                };
                assert_eq!(looked, expected);
            }
        }
    }

    fn check_diff(&mut self) {
        let owners: Vec<&Owner> = self.live.iter().chain(&self.frozen).collect();
        let older = owners[self.rng.usize(..owners.len())];
        let newer = owners[self.rng.usize(..owners.len())];
        let end = span_blocks(older.root.level.max(newer.root.level));
        let mut found = Vec::new();
        let mut from = Lba(0);
        while from.0 < end {
            let step = self.store.diff(older.root, newer.root, from).unwrap();
            assert!(step.next > from);
            found.extend(step.blocks);
            from = step.next;
        }
        let both: BTreeSet<u64> = older
            .held
            .keys()
            .chain(newer.held.keys())
            .copied()
            .collect();
        let expected: Vec<(Lba, bool)> = both
            .into_iter()
            .filter(|lba| older.held.get(lba) != newer.held.get(lba))
            .map(|lba| (Lba(lba), newer.held.contains_key(&lba)))
            .collect();
        assert_eq!(found, expected);
    }

    fn count_unique(&self, ptr: PagePtr, level: u8) -> u64 {
        if self.space.count(ptr.pba).unwrap() > 1 {
            return 0;
        }
        1 + match &self.store.page(ptr, level).unwrap().node {
            Node::Leaf(entries) => {
                let mapped = entries.iter().filter(|entry| entry.0 != 0);
                mapped
                    .filter(|entry| self.space.count(**entry).unwrap() == 1)
                    .count() as u64
            }
            Node::Inner(children) => {
                let children = children.iter().flatten();
                children
                    .map(|child| self.count_unique(*child, level - 1))
                    .sum()
            }
        }
    }

    fn check_unique(&self) {
        for owner in self.live.iter().chain(&self.frozen) {
            let (mut from, mut unique) = (Lba(0), 0);
            while from.0 < span_blocks(owner.root.level) {
                let (next, own) = self.store.own(&self.space, owner.root, from).unwrap();
                assert!(next > from);
                unique += own.data + own.pages;
                from = next;
            }
            let level = owner.root.level;
            let expected = owner
                .root
                .ptr
                .map_or(0, |ptr| self.count_unique(ptr, level));
            assert_eq!(unique, expected);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn maps_equal_lists_of_what_they_map() {
    for seed in 0..10 {
        let mut pair = Pair::new(seed);
        for step in 0..240 {
            match pair.rng.u8(..20) {
                0..9 => pair.remap(),
                9..13 => pair.unmap(),
                13..16 => pair.fork(),
                16 => pair.raise(),
                17 => pair.checkpoint(),
                18 => pair.space.settle(Seq(pair.seq / 2)),
                _ => pair.reclaim(),
            }
            if step % 8 == 0 {
                pair.check_counts();
                pair.check_content();
                pair.check_diff();
            }
            if step % 40 == 0 {
                pair.check_unique();
            }
        }
        while !pair.frozen.is_empty() {
            pair.reclaim();
            pair.check_counts();
        }
        pair.check_content();
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn durable_pages_that_nobody_looks_at_are_evicted() {
    let mut pair = Pair::new(1);
    let mut owner = pair.live[1].clone();
    for leaf in 0..60 {
        let extent = pair.space.reserve(Pba(0), 1).unwrap();
        let lba = Lba(leaf * LEAF);
        let prepared = pair
            .store
            .prepare_remap(owner.root, lba, 1, &mut pair.space);
        let leaf = prepared.unwrap();
        pair.store
            .remap(&mut owner.root, lba, extent, leaf, Seq(1), &mut pair.space);
    }
    let pages = pair.store.pages.len();
    assert_eq!(pages, 61);
    pair.store.limit(61);
    assert!(!pair.store.is_over());
    pair.store.evict();
    assert_eq!(pair.store.pages.len(), pages, "no more than may be");
    pair.store.limit(40);
    for _ in 0..3 {
        pair.store.evict();
    }
    assert_eq!(pair.store.pages.len(), pages, "no page is durable");
    assert!(pair.store.is_mostly_dirty());
    pair.store.limit(2 * pages);
    assert!(!pair.store.is_mostly_dirty(), "half of them are not most");
    pair.store.limit(40);
    pair.store.freeze();
    assert!(!pair.store.is_mostly_dirty());
    pair.store.set_durable(Generation(1));
    // What is looked at stays: the root, and the leaf number 3.
    for cached in pair.store.pages.values() {
        cached.is_used.store(false, Ordering::Relaxed);
    }
    let lba = Lba(3 * LEAF);
    pair.store.resolve(owner.root, lba, 1).unwrap();
    pair.store.evict();
    assert_eq!(pair.store.pages.len(), 40);
    assert!(pair.store.resolve(owner.root, lba, 1).is_ok());
}

#[test]
fn a_page_from_disk_does_not_replace_a_younger_one() {
    let mut store = MapStore::new(Generation(5));
    let ptr = |generation| PagePtr {
        pba: Pba(3000),
        generation: Generation(generation),
    };
    let page = |mapped| super::MapPage {
        level: 0,
        mapped,
        node: super::empty_node(0),
    };
    store.insert_loaded(ptr(3), page(1));
    store.insert_loaded(ptr(2), page(2));
    assert!(store.page(ptr(2), 0).is_err());
    assert_eq!(store.page(ptr(3), 0).unwrap().mapped, 1);
    assert!(store.page(ptr(3), 1).is_err(), "another level");
    store.insert_loaded(ptr(4), page(3));
    assert_eq!(store.page(ptr(4), 0).unwrap().mapped, 3);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_map_deeper_than_maps_can_be_is_refused_everywhere() {
    let mut pair = Pair::new(1);
    let deep = Root {
        ptr: None,
        level: LEVEL_MAX + 1,
    };
    let flat = Root {
        ptr: None,
        level: LEVEL_MAX,
    };
    let (lba, space) = (Lba(0), &mut pair.space);
    assert!(pair.store.resolve(deep, lba, 1).is_err());
    assert!(pair.store.lookup(space, deep, lba, 1).is_err());
    assert!(pair.store.prepare_remap(deep, lba, 1, space).is_err());
    assert!(pair.store.prepare_unmap(deep, lba, Lba(1), space).is_err());
    assert!(
        pair.store
            .prepare_raise(flat, LEVEL_MAX + 1, space)
            .is_err()
    );
    assert!(pair.store.diff(deep, flat, lba).is_err());
    assert!(pair.store.diff(flat, deep, lba).is_err());
    assert!(pair.store.own(space, deep, lba).is_err());
    assert!(pair.store.reclaim(deep, lba, Seq(1), space).is_err());
    assert!(pair.store.prepare_remap(flat, lba, 1, space).is_ok());
    assert!(
        pair.store
            .page_at(Root { level: 0, ..flat }, lba, 1)
            .is_err()
    );
    let beyond = Lba(span_blocks(1));
    let small = Root { level: 1, ..flat };
    assert!(pair.store.prepare_remap(small, beyond, 1, space).is_err());
    let step = pair
        .store
        .prepare_unmap(small, beyond, beyond.plus(9), space);
    assert_eq!(step.unwrap(), UnmapStep::Skip { to: beyond.plus(9) });
    assert_eq!(leaf_index(beyond), 0);
    assert_eq!(super::child_index(1, Lba(LEVEL_1 - 1)), 255);
}

#[test]
fn a_change_asks_first_for_the_counts_of_what_it_replaces() {
    let journal = layout::journal(POOL);
    let mut space = SpaceMap::new(POOL, journal);
    for region in [0, 1, 2] {
        space.load(region, None, None).unwrap();
    }
    let mut store = MapStore::new(Generation(1));
    let mut root = Root {
        ptr: None,
        level: 0,
    };
    space.set_aside(5).unwrap();
    let far = Pba(5 * layout::REGION_BLOCKS + 7);
    // As read from disk: a leaf that names a block of a region whose counts are not in memory.
    let mut entries = [Pba(0); LEAF_ENTRIES];
    entries[20] = far;
    let page = super::MapPage {
        level: 0,
        mapped: 1,
        node: Node::Leaf(triomphe::Arc::new(entries)),
    };
    root.ptr = Some(store.insert_new(page, &mut space));
    let missing = |result: Result<(), Fault>| {
        let is_far = matches!(result, Err(Fault::Missing(Missing::Counts(5))));
        assert!(is_far, "{result:?}");
    };
    missing(store.prepare_remap(root, Lba(20), 1, &mut space).map(drop));
    missing(store.prepare_remap(root, Lba(19), 2, &mut space).map(drop));
    let unmap = store.prepare_unmap(root, Lba(20), Lba(21), &mut space);
    missing(unmap.map(drop));
    // What is beside it is none of the change's business.
    store.prepare_remap(root, Lba(21), 4, &mut space).unwrap();
    store.prepare_remap(root, Lba(18), 2, &mut space).unwrap();
    // A shared leaf is copied, and the copy owns all of it.
    space.retain(root.ptr.unwrap().pba);
    missing(store.prepare_remap(root, Lba(21), 4, &mut space).map(drop));
    space.load(5, None, None).unwrap();
    assert!(
        store.prepare_remap(root, Lba(20), 1, &mut space).is_err(),
        "a leaf names a block that is counted as free"
    );
}

#[test]
fn the_order_of_eviction_stays_as_short_as_memory() {
    let mut store = MapStore::new(Generation(5));
    let page = super::MapPage {
        level: 0,
        mapped: 0,
        node: super::empty_node(0),
    };
    // Pages come and go without eviction, as those of a checkpoint after the other do.
    for round in 0..1000 {
        for index in 0..10 {
            let ptr = PagePtr {
                pba: Pba(3000 + index),
                generation: Generation(round),
            };
            store.insert_loaded(ptr, page.clone());
            store.insert_loaded(ptr, page.clone());
        }
    }
    assert_eq!(store.pages.len(), 10);
    assert!(store.order.len() <= 40, "{}", store.order.len());
}
