//! The space against a plain list of its blocks: random operations by seed.

mod counts;
mod index;
mod memory;
mod reserve;

use super::{Fault, Missing, SpaceMap};
use crate::error::ErrorKind;
use crate::format::counts::Index;
use crate::format::layout::{self, INDEX_LEVELS, REGION_BLOCKS};
use crate::format::map_page::LEAF_ENTRIES;
use crate::units::{Extent, Generation, Pba, Seq};
use fastrand::Rng;
use std::collections::BTreeMap;

/// What the space says of one block, kept in the simplest way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a block is any mix of these")]
struct Block {
    is_fixed: bool,
    is_reserved: bool,
    is_pending: bool,
    /// It became free and was not given back to the device below.
    is_stale: bool,
    count: u32,
}

impl Block {
    fn is_free(self) -> bool {
        let Self { is_stale, .. } = self;
        self == Self {
            is_stale,
            ..Self::default()
        }
    }
}

struct Pair {
    space: SpaceMap,
    blocks: Vec<Block>,
    reserved: Vec<Extent>,
    /// What a freeze took and no reuse has freed yet.
    taken: Vec<Extent>,
    /// What is being given back to the device below.
    trimming: Vec<Extent>,
    unsettled: BTreeMap<u64, u64>,
    seq: u64,
    generation: u64,
    rng: Rng,
}

fn pba_index(pba: u64) -> usize {
    usize::try_from(pba).unwrap()
}

fn fixed(blocks: u64, journal: Extent) -> Vec<Block> {
    let block = |pba| Block {
        is_fixed: layout::is_fixed(Pba(pba), journal),
        ..Block::default()
    };
    (0..blocks).map(block).collect()
}

fn loaded(blocks: u64, journal: Extent) -> SpaceMap {
    let mut space = SpaceMap::new(blocks, journal);
    for region in 0..layout::region_count(blocks) {
        space.load(region, None, None).unwrap();
    }
    space
}

/// The space as it would be read back from what a freeze hands to a checkpoint.
fn reload(pair: &mut Pair) -> SpaceMap {
    let mut regions = BTreeMap::new();
    let mut index: BTreeMap<(u8, u64), Box<Index>> = BTreeMap::new();
    // Every region is dirty, so that all of it is there.
    for region in 0..layout::region_count(pair.space.blocks()) {
        pair.space.mark_dirty(region);
    }
    pair.generation += 1;
    let frozen = pair.space.freeze(Generation(pair.generation));
    for region in frozen.regions {
        regions.insert(region.region, (region.low, region.high));
    }
    for (level, page, _, content) in frozen.index {
        index.insert((level, page), content);
    }
    let mut read = SpaceMap::new(pair.space.blocks(), pair.space.journal);
    read.load_top(&frozen.top).unwrap();
    for level in (1..=INDEX_LEVELS).rev() {
        for (page, _, generation) in read.index_places(level) {
            assert_eq!(generation, Generation(pair.generation));
            read.load_index(level, page, &index[&(level, page)])
                .unwrap();
        }
    }
    for region in 0..layout::region_count(pair.space.blocks()) {
        if read.region_place(region).is_none() {
            assert!(!regions.contains_key(&region));
            read.load(region, None, None).unwrap();
        }
    }
    for (region, (low, high)) in regions {
        let (_, generation, is_wide) = read.region_place(region).unwrap();
        assert_eq!(generation, Generation(pair.generation));
        assert_eq!(is_wide, high.is_some());
        read.load(region, Some(&low), high.as_deref()).unwrap();
    }
    read
}

impl Pair {
    fn new(seed: u64, blocks: u64) -> Self {
        let journal = layout::journal(blocks);
        Self {
            space: loaded(blocks, journal),
            blocks: fixed(blocks, journal),
            reserved: Vec::new(),
            taken: Vec::new(),
            trimming: Vec::new(),
            unsettled: BTreeMap::new(),
            seq: 1,
            generation: 1,
            rng: Rng::with_seed(seed),
        }
    }

    fn at(&mut self, pba: Pba) -> &mut Block {
        &mut self.blocks[usize::try_from(pba.0).unwrap()]
    }

    /// Free blocks from a place on, up to the end of its region.
    fn run(&self, from: u64) -> u64 {
        let end = ((from / REGION_BLOCKS + 1) * REGION_BLOCKS).min(self.blocks.len() as u64);
        let run = &self.blocks[usize::try_from(from).unwrap()..usize::try_from(end).unwrap()];
        run.iter().take_while(|block| block.is_free()).count() as u64
    }

    /// The free runs of a region: where they begin, and their lengths.
    fn runs(&self, region: u64) -> Vec<(u64, u64)> {
        let end = ((region + 1) * REGION_BLOCKS).min(self.blocks.len() as u64);
        let mut at = region * REGION_BLOCKS;
        let mut runs = Vec::new();
        while at < end {
            match self.run(at) {
                0 => at += 1,
                length => {
                    runs.push((at, length));
                    at += length;
                }
            }
        }
        runs
    }

    fn reserve(&mut self) {
        let goal = match self.rng.u8(..3) {
            0 => Pba(0),
            1 => Pba(self.rng.u64(..self.blocks.len() as u64)),
            _ => self.reserved.last().map_or(Pba(0), |last| last.end()),
        };
        let most = [1, 8, 300, 3000][self.rng.usize(..4)];
        let want = 1 + self.rng.u64(..most);
        let left = self.space.free_for_data();
        let extent = match self.space.reserve(goal, want) {
            Ok(extent) => extent,
            Err(Fault::Error(error)) => {
                assert_eq!((error.kind(), left), (ErrorKind::OutOfSpace, 0));
                return;
            }
            Err(fault) => panic!("{fault:?}"),
        };
        let most = want.min(left);
        let is_goal_free = goal.0 > 0 && goal.0 < self.blocks.len() as u64 && self.run(goal.0) > 0;
        if is_goal_free {
            assert_eq!(extent, Extent::new(goal, most.min(self.run(goal.0))));
        } else {
            let region = extent.start.0 / REGION_BLOCKS;
            let runs = self.runs(region);
            let first_whole = runs.iter().find(|(_, length)| *length >= most);
            let longest = runs.iter().map(|(_, length)| *length).max().unwrap_or(0);
            let first_longest = runs.iter().find(|(_, length)| *length == longest);
            let (start, length) = *first_whole.or(first_longest).unwrap();
            assert_eq!(extent, Extent::new(Pba(start), most.min(length)));
            // Another region is taken only where this one had no room for half a region's worth.
            let free = |region| {
                self.runs(region)
                    .iter()
                    .map(|(_, length)| length)
                    .sum::<u64>()
            };
            let enough = most.min(REGION_BLOCKS / 2);
            let regions = layout::region_count(self.blocks.len() as u64);
            assert!(free(region) >= enough || (0..regions).all(|region| free(region) < enough));
        }
        for pba in extent.blocks() {
            self.at(pba).is_reserved = true;
        }
        self.reserved.push(extent);
    }

    fn publish_or_cancel(&mut self) {
        if self.reserved.is_empty() {
            return;
        }
        let extent = self
            .reserved
            .swap_remove(self.rng.usize(..self.reserved.len()));
        let is_published = self.rng.u8(..4) > 0;
        for pba in extent.blocks() {
            self.at(pba).is_reserved = false;
            if is_published {
                self.at(pba).count = 1;
            }
        }
        if is_published {
            self.space.publish(extent);
        } else {
            for pba in extent.blocks() {
                self.at(pba).is_stale = true;
            }
            self.space.cancel(extent);
        }
    }

    fn owned(&mut self) -> Option<Pba> {
        let from = self.rng.usize(..self.blocks.len());
        let later = (from..self.blocks.len()).find(|&at| self.blocks[at].count > 0);
        later.map(|at| Pba(at as u64))
    }

    fn retain_and_release(&mut self) {
        for _ in 0..self.rng.usize(..200) {
            let Some(pba) = self.owned() else { return };
            if self.rng.u8(..3) == 0 {
                self.at(pba).count += 1;
                self.space.retain(pba);
                continue;
            }
            self.seq += 1;
            let seq = (self.rng.u8(..4) > 0).then_some(Seq(self.seq));
            self.at(pba).count -= 1;
            let block = *self.at(pba);
            match (block.count, seq) {
                (0, _) => self.at(pba).is_pending = true,
                (1, Some(seq)) => {
                    self.unsettled.insert(pba.0, seq.0);
                }
                _ => {}
            }
            self.space.release(pba, seq);
        }
    }

    /// A leaf with holes and runs of blocks that somebody owns gets one owner more, or has one less.
    fn retain_or_release_leaf(&mut self) {
        let mut leaf = [Pba(0); LEAF_ENTRIES];
        let mut slot = 0;
        while slot < LEAF_ENTRIES {
            let Some(first) = self.owned() else { return };
            let run = (first.0..).take_while(|pba| {
                self.blocks
                    .get(pba_index(*pba))
                    .is_some_and(|block| block.count > 0)
            });
            let want = self.rng.usize(1..64);
            for (entry, pba) in leaf[slot..].iter_mut().zip(run.take(want)) {
                *entry = Pba(pba);
                slot += 1;
            }
            slot += self.rng.usize(..4);
        }
        self.space.all_referenced(&leaf).unwrap();
        if self.rng.bool() {
            for pba in leaf.iter().filter(|pba| pba.0 > 0) {
                self.at(*pba).count += 1;
            }
            self.space.retain_all(&leaf);
            return;
        }
        self.seq += 1;
        for entry in leaf.iter_mut().filter(|entry| entry.0 > 0) {
            let pba = *entry;
            match self.at(pba).count {
                // It stands in the leaf more often than it has owners.
                0 => {
                    *entry = Pba(0);
                    continue;
                }
                1 => self.at(pba).is_pending = true,
                2 => {
                    self.unsettled.insert(pba.0, self.seq);
                }
                _ => {}
            }
            self.at(pba).count -= 1;
        }
        self.space.release_all(&leaf, Some(Seq(self.seq)));
    }

    fn settle(&mut self) {
        let durable = self.rng.u64(..=self.seq);
        self.space.settle(Seq(durable));
        self.unsettled.retain(|_, seq| *seq > durable);
    }

    fn take_metadata(&mut self) {
        let count = 1 + self.rng.u64(..100);
        match self.space.set_aside(count) {
            Ok(()) => assert!(self.space.set_aside >= count),
            Err(Fault::Error(error)) => assert_eq!(error.kind(), ErrorKind::OutOfSpace),
            Err(fault) => panic!("{fault:?}"),
        }
        let set_aside = self.space.metadata.clone();
        for pba in set_aside.iter().flat_map(|extent| extent.blocks()) {
            let block = self.at(pba);
            assert!(block.is_free() || block.is_reserved);
            block.is_reserved = true;
        }
        for _ in 0..self.rng.u64(..=self.space.set_aside) {
            let pba = self.space.take_metadata();
            assert!(self.at(pba).is_reserved);
            *self.at(pba) = Block {
                count: 1,
                ..Block::default()
            };
        }
    }

    fn reuse(&mut self) {
        for extent in std::mem::take(&mut self.taken) {
            let is_stale = self.rng.bool();
            self.space.reuse(&[extent], is_stale);
            for pba in extent.blocks() {
                self.at(pba).is_pending = false;
                self.at(pba).is_stale = is_stale;
            }
        }
        self.taken = self.space.take_pending();
    }

    /// Begins or ends to give free blocks back to the device below.
    fn trim(&mut self) {
        if self.rng.bool() {
            let extents = std::mem::take(&mut self.trimming);
            self.space.end_trim(&extents);
            for pba in extents.iter().flat_map(|extent| extent.blocks()) {
                self.at(pba).is_pending = false;
            }
        }
        let is_stale = |block: &Block| block.is_free() && block.is_stale;
        let Some(region) = self.space.first_untrimmed() else {
            assert!(!self.blocks.iter().any(is_stale));
            return;
        };
        let most = [1, 3, usize::MAX][self.rng.usize(..3)];
        let runs = self.runs(region);
        let extents = self.space.begin_trim(region, most).unwrap();
        // Whole runs, and no stale block is left out but for the bound.
        let stale = runs.iter().filter(|(start, length)| {
            let from = usize::try_from(*start).unwrap();
            let run = &self.blocks[from..from + usize::try_from(*length).unwrap()];
            run.iter().any(is_stale)
        });
        let expected: Vec<Extent> = stale
            .take(most)
            .map(|(start, length)| Extent::new(Pba(*start), *length))
            .collect();
        assert_eq!(extents, expected);
        for pba in extents.iter().flat_map(|extent| extent.blocks()) {
            *self.at(pba) = Block {
                is_pending: true,
                ..Block::default()
            };
        }
        self.trimming.extend(extents);
    }

    fn check(&mut self) {
        for (at, block) in self.blocks.iter().enumerate() {
            let pba = Pba(at as u64);
            let count = if block.is_fixed { 1 } else { block.count };
            assert_eq!(self.space.count(pba).unwrap(), count, "{pba}");
            assert_eq!(self.space.referenced(pba).is_ok(), count > 0, "{pba}");
            let is_settled = !self.unsettled.contains_key(&pba.0);
            assert_eq!(self.space.is_settled(pba), is_settled, "{pba}");
        }
        let number = |test: &dyn Fn(&Block) -> bool| {
            self.blocks.iter().filter(|block| test(block)).count() as u64
        };
        let free = number(&|block| block.is_free());
        let aside = self.space.set_aside;
        let kept = self.space.reserve_blocks();
        assert_eq!(self.space.available(), free);
        assert_eq!(
            self.space.free_for_data(),
            (free + aside).saturating_sub(kept)
        );
        assert_eq!(
            self.space.pending_blocks(),
            number(&|block| block.is_pending)
        );
        let reserved: u64 = self.reserved.iter().map(|extent| extent.count).sum();
        let used = number(&|block| block.is_fixed || block.count > 0) + reserved;
        assert_eq!(self.space.used_blocks(), used);
        assert_eq!(self.space.underflows(), 0);
    }

    fn check_reloaded(&mut self) {
        let read = reload(self);
        let mut free = 0;
        for (at, block) in self.blocks.iter().enumerate() {
            let pba = Pba(at as u64);
            let count = if block.is_fixed { 1 } else { block.count };
            assert_eq!(read.count(pba).unwrap(), count, "{pba}, read back");
            free += u64::from(count == 0);
        }
        assert_eq!(read.available(), free);
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn space_equals_a_list_of_its_blocks() {
    for seed in 0..12 {
        // A region that ends within, and several that do not.
        let blocks = [4096, 9000, 5 * REGION_BLOCKS][usize::try_from(seed % 3).unwrap()];
        let mut pair = Pair::new(seed, blocks);
        pair.space.keep_back(pair.rng.u64(..3) * 10);
        for step in 0..250 {
            match pair.rng.u8(..15) {
                0..4 => pair.reserve(),
                4..7 => pair.publish_or_cancel(),
                7..9 => pair.retain_and_release(),
                9 => pair.settle(),
                10 => pair.take_metadata(),
                11..13 => pair.trim(),
                13 => pair.retain_or_release_leaf(),
                _ => pair.reuse(),
            }
            if step % 25 == 0 {
                pair.check();
                pair.check_reloaded();
            }
        }
        pair.check();
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn space_that_grew_equals_space_made_that_large() {
    for (before, after) in [
        (4096, 4097),
        (4096, 9000),
        (2 * REGION_BLOCKS, 4096),
        (5000, 600_000),
    ] {
        let journal = layout::journal(before);
        let mut space = loaded(before, journal);
        space.prepare_grow().unwrap();
        space.grow(after);
        let grown_regions = layout::region_count(before)..layout::region_count(after);
        for region in grown_regions {
            space.load(region, None, None).unwrap();
        }
        let made = loaded(after, journal);
        assert_eq!(space.blocks(), after);
        assert_eq!(space.available(), made.available());
        for pba in (0..after).map(Pba) {
            assert_eq!(space.count(pba).unwrap(), made.count(pba).unwrap(), "{pba}");
        }
        assert_eq!(space.index[0].len(), made.index[0].len());
        // What grew can be taken, all of it.
        space.set_aside_last(made.available()).unwrap();
        assert_eq!(space.available(), 0);
        let free = made.available();
        space.grow(after - 1);
        assert_eq!((space.blocks(), space.set_aside), (after, free));
    }
}

#[test]
fn a_pool_grows_only_with_the_counts_of_its_last_region_in_memory() {
    let journal = layout::journal(4096);
    let space = SpaceMap::new(4096, journal);
    assert!(matches!(
        space.prepare_grow(),
        Err(Fault::Missing(Missing::Counts(2)))
    ));
}
