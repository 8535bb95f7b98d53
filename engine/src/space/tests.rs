//! The space against a plain list of its blocks: random operations by seed.

use super::{Fault, SpaceMap, place};
use crate::error::ErrorKind;
use crate::format::counts::{Index, REGION_LEN};
use crate::format::layout::{self, INDEX_ENTRIES, INDEX_LEVELS, REGION_BLOCKS};
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
                self.space.publish(pba);
            }
        }
        if !is_published {
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
            Ok(()) => assert!(self.space.set_aside_blocks() >= count),
            Err(Fault::Error(error)) => assert_eq!(error.kind(), ErrorKind::OutOfSpace),
            Err(fault) => panic!("{fault:?}"),
        }
        let set_aside = self.space.metadata.clone();
        for pba in set_aside.iter().flat_map(|extent| extent.blocks()) {
            let block = self.at(pba);
            assert!(block.is_free() || block.is_reserved);
            block.is_reserved = true;
        }
        for _ in 0..self.rng.u64(..=self.space.set_aside_blocks()) {
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
        let aside = self.space.set_aside_blocks();
        let kept = self.space.reserve_blocks();
        assert_eq!(self.space.available, free);
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
        assert_eq!(read.available, free);
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
        assert_eq!(space.available, made.available);
        for pba in (0..after).map(Pba) {
            assert_eq!(space.count(pba).unwrap(), made.count(pba).unwrap(), "{pba}");
        }
        assert_eq!(space.index[0].len(), made.index[0].len());
        // What grew can be taken, all of it.
        space.set_aside_last(made.available).unwrap();
        assert_eq!(space.available, 0);
        let free = made.available;
        space.grow(after - 1);
        assert_eq!((space.blocks(), space.set_aside_blocks()), (after, free));
    }
}

#[test]
fn a_pool_grows_only_with_the_counts_of_its_last_region_in_memory() {
    let journal = layout::journal(4096);
    let space = SpaceMap::new(4096, journal);
    assert!(matches!(
        space.prepare_grow(),
        Err(Fault::Missing(super::Missing::Counts(2)))
    ));
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_count_passes_65535_and_comes_back() {
    let mut pair = Pair::new(1, 4096);
    let pba = pair.space.reserve(Pba(2000), 1).unwrap().start;
    let neighbour = pair.space.reserve(pba.plus(1), 1).unwrap().start;
    pair.space.publish(pba);
    pair.space.publish(neighbour);
    pair.at(pba).count = 1;
    pair.at(neighbour).count = 1;
    let available = pair.space.available;
    for step in 0..140_000_u32 {
        pair.space.retain(pba);
        pair.at(pba).count += 1;
        if step % 20_000 == 19_999 || (65_530..65_540).contains(&step) {
            assert_eq!(pair.space.count(pba).unwrap(), step + 2);
            pair.check_reloaded();
        }
    }
    let free = |pair: &Pair| pair.space.regions[1].entry().free;
    let before = free(&pair);
    for left in (0..140_000_u32).rev() {
        pair.space.release(pba, None);
        pair.at(pba).count -= 1;
        assert_eq!(pair.space.count(pba).unwrap(), left + 1);
        assert_eq!(free(&pair), before);
        if left.is_multiple_of(20_000) || (65_530..65_540).contains(&left) {
            pair.check_reloaded();
        }
    }
    pair.space.release(pba, None);
    assert_eq!(pair.space.count(pba).unwrap(), 0);
    assert_eq!(pair.space.count(neighbour).unwrap(), 1);
    assert_eq!((free(&pair), pair.space.available), (before + 1, available));
    assert_eq!(pair.space.take_pending(), [Extent::new(pba, 1)]);
    pair.space.release(pba, None);
    assert_eq!(pair.space.underflows(), 1);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_leaf_may_name_one_block_everywhere() {
    let mut space = loaded(4096, Extent::new(Pba(8), 256));
    let pba = space.reserve(Pba(2000), 1).unwrap().start;
    space.publish(pba);
    let leaf = [pba; LEAF_ENTRIES];
    let counts: Vec<u32> = (0..200).map(|leaves| 1 + leaves * 512).collect();
    for count in &counts {
        assert_eq!(space.count(pba).unwrap(), *count);
        space.all_referenced(&leaf).unwrap();
        space.retain_all(&leaf);
    }
    for count in counts.iter().rev() {
        space.release_all(&leaf, None);
        assert_eq!(space.count(pba).unwrap(), *count);
    }
    space.release_all(&leaf, None);
    assert_eq!(space.underflows(), 511);
    assert_eq!(space.take_pending(), [Extent::new(pba, 1)]);
}

#[test]
fn a_leaf_that_names_a_free_block_is_damage() {
    // The last region ends within.
    let mut space = loaded(5000, Extent::new(Pba(8), 256));
    let run = space.reserve(Pba(2000), 8).unwrap();
    run.blocks().for_each(|pba| space.publish(pba));
    let end = run.end();
    for leaf in [
        vec![run.start, end],
        vec![end, run.start],
        vec![run.start, Pba(0), Pba(5000)],
        vec![Pba(1 << 40)],
    ] {
        let Err(Fault::Error(error)) = space.all_referenced(&leaf) else {
            panic!("{leaf:?} is damage");
        };
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    space
        .all_referenced(&run.blocks().collect::<Vec<_>>())
        .unwrap();
    space
        .all_referenced(&[run.start, Pba(0), run.start.plus(2)])
        .unwrap();
}

#[test]
fn a_count_of_all_bits_is_damage() {
    let mut space = SpaceMap::new(4096, layout::journal(4096));
    let mut low = [0; REGION_LEN];
    let mut high = [0; REGION_LEN];
    (low[500], high[500]) = (u16::MAX, u16::MAX);
    (low[501], high[501]) = (0, 1);
    let mut entry = space.regions[1].entry();
    entry.place = Some((layout::Slot::A, Generation(1)));
    entry.free = REGION_BLOCKS - 2;
    space.regions[1].set_entry(&entry).unwrap();
    // The index knows how many are free.
    assert!(space.load(1, Some(&low), None).is_err());
    space.load(1, Some(&low), Some(&high)).unwrap();
    let first = Pba(REGION_BLOCKS);
    assert!(space.referenced(first.plus(500)).is_err());
    assert_eq!(space.referenced(first.plus(501)).unwrap(), 65_536);
    assert!(space.load(3, None, None).is_err());
    assert!(space.count(Pba(4096)).is_err());
}

#[test]
fn the_index_names_no_more_than_there_is() {
    let mut space = SpaceMap::new(4096, layout::journal(4096));
    let mut entry = space.regions[1].entry();
    entry.place = Some((layout::Slot::B, Generation(3)));
    entry.free = REGION_BLOCKS + 1;
    assert!(space.load_entry(0, 1, &entry).is_err());
    entry.free = 7;
    let before = loaded(4096, layout::journal(4096)).available;
    let mut space = SpaceMap::new(4096, layout::journal(4096));
    space.load_entry(0, 1, &entry).unwrap();
    assert_eq!(space.available, before - REGION_BLOCKS + 7);
    space
        .load_entry(0, 2, &super::IndexEntry::default())
        .unwrap();
    assert!(space.load_entry(0, 3, &entry).is_err());
    assert!(space.load_entry(1, 1, &entry).is_err());
    space.load_entry(1, 0, &entry).unwrap();
    assert_eq!(space.index_places(1), [(0, layout::Slot::B, Generation(3))]);
    assert!(
        space
            .load_entry(0, 3, &super::IndexEntry::default())
            .is_ok()
    );
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn index_pages_of_a_large_pool_stand_where_a_loader_looks_for_them() {
    let blocks = (INDEX_ENTRIES + 3) * REGION_BLOCKS;
    let mut pair = Pair::new(5, blocks);
    let last = Pba(INDEX_ENTRIES * REGION_BLOCKS + 1500);
    let taken = pair.space.reserve(last, 1).unwrap();
    assert_eq!(taken.start, last);
    pair.space.publish(last);
    pair.at(last).count = 1;
    pair.check_reloaded();
    // Only the last region changed since: one page of each level, in the other slot.
    pair.space.retain(last);
    let frozen = pair.space.freeze(Generation(9));
    let regions: Vec<_> = frozen.regions.iter().map(|region| region.region).collect();
    let index: Vec<_> = frozen.index.iter().map(|page| (page.0, page.1)).collect();
    assert_eq!(regions, [INDEX_ENTRIES]);
    assert_eq!(index, [(1, 1), (2, 0), (3, 0)]);
    assert_eq!(place(last), (INDEX_ENTRIES, 1500));
}

#[test]
fn what_the_journal_maps_is_claimed_once() {
    let mut pair = Pair::new(1, 4096);
    let extent = Extent::new(Pba(2500), 10);
    let before = pair.space.available;
    pair.space.claim(extent).unwrap();
    assert_eq!(pair.space.available, before - 10);
    assert!(pair.space.claim(Extent::new(Pba(2509), 2)).is_err());
    pair.space.publish(Pba(2500));
    assert!(pair.space.claim(Extent::new(Pba(2500), 1)).is_err());
    let aside = pair.space.reserve(Pba(2500), 1).unwrap();
    assert!(aside.start.0 < 2500 || aside.start.0 >= 2510);
}

#[test]
fn a_closed_region_gives_out_nothing() {
    let mut space = loaded(4096, layout::journal(4096));
    let before = space.available;
    space.close_region(1);
    assert_eq!(space.available, before - REGION_BLOCKS);
    space.set_aside_last(space.available).unwrap();
    let taken = space.metadata.iter().flat_map(|extent| extent.blocks());
    assert!(taken.into_iter().all(|pba| pba.0 / REGION_BLOCKS != 1));
}

#[test]
fn the_reserve_is_kept_from_data_and_not_from_metadata() {
    let mut space = loaded(100_000, layout::journal(100_000));
    assert_eq!(space.reserve_blocks(), 100_000 / 128);
    space.keep_back(50);
    assert_eq!(space.reserve_blocks(), 100_000 / 128 + 50);
    while space.reserve(Pba(0), 5000).is_ok() {}
    assert_eq!(space.available, space.reserve_blocks());
    let left = space.available;
    assert!(space.set_aside(left - 49).is_err());
    space.set_aside(left - 50).unwrap();
    assert!(space.require(left + 1).is_err());
    space.set_aside_last(left).unwrap();
}

/// Nothing is free but these.
fn full_but(free: &[u64]) -> SpaceMap {
    let mut space = loaded(8192, layout::journal(8192));
    space.set_aside_last(space.available).unwrap();
    space.metadata.clear();
    for pba in free {
        space.set_free(Extent::new(Pba(*pba), 1), false);
    }
    space
}

#[test]
fn the_last_free_block_of_a_region_is_found() {
    let mut space = full_but(&[5000]);
    space.set_aside_last(1).unwrap();
    assert_eq!(space.metadata, [Extent::new(Pba(5000), 1)]);
    assert_eq!(space.available, 0);
}

#[test]
fn a_region_with_just_the_room_is_taken_before_the_next() {
    // Three blocks in region 2, four in region 3: both have room for three in a row.
    let mut space = full_but(&[4000, 4001, 4002, 6000, 6001, 6002, 6003]);
    space.cursor = 2;
    assert_eq!(
        space.take_run(Pba(0), 3).unwrap(),
        Extent::new(Pba(4000), 3)
    );
    // The next search begins behind the region that gave.
    assert_eq!(space.cursor, 3);
    assert_eq!(
        space.take_run(Pba(0), 2).unwrap(),
        Extent::new(Pba(6000), 2)
    );
    assert_eq!(
        space.take_run(Pba(6002), 9).unwrap(),
        Extent::new(Pba(6002), 2)
    );
}

#[test]
fn a_writer_without_a_goal_asks_for_no_region_but_the_next() {
    let mut space = SpaceMap::new(8192, layout::journal(8192));
    space.load(2, None, None).unwrap();
    space.cursor = 2;
    let extent = space.reserve(Pba(0), 4).unwrap();
    assert_eq!(extent.start.0 / REGION_BLOCKS, 2);
    // A goal is another matter.
    assert!(matches!(
        space.reserve(Pba(REGION_BLOCKS + 5), 4),
        Err(Fault::Missing(super::Missing::Counts(1)))
    ));
}

#[test]
fn a_place_within_a_run_leaves_the_others_free() {
    let mut space = SpaceMap::new(8192, layout::journal(8192));
    for region in 0..5 {
        space.load(region, None, None).unwrap();
    }
    let goal = Pba(5000);
    let (extent, next) = space.reserve_within(goal, 32, 7, 2).unwrap();
    assert_eq!((extent, next), (Extent::new(Pba(5007), 2), Pba(5032)));
    assert_eq!(
        space.reserve_at(Pba(5000), 7),
        Some(Extent::new(Pba(5000), 7))
    );
    assert_eq!(space.reserve_at(Pba(5006), 1), None);
    assert_eq!(space.reserve_at(Pba(5008), 4), None);
    // Nothing is taken where less than all is free.
    assert_eq!(
        space.reserve_at(Pba(5009), 4),
        Some(Extent::new(Pba(5009), 4))
    );
    let taken = 2 + 7 + 4;
    let mut whole = SpaceMap::new(8192, layout::journal(8192));
    assert_eq!(space.available, whole.available - taken);
    assert_eq!(whole.reserve_at(goal, 1), None, "its counts are not there");
    assert_eq!(whole.reserve_at(Pba(8192), 1), None);
    assert_eq!(whole.reserve_at(Pba(u64::MAX), 1), None);
}

#[test]
fn where_no_run_is_long_enough_its_beginning_is_taken() {
    let reserve: Vec<u64> = (7000..7700).collect();
    let blocks: Vec<u64> = [4000, 4001, 4002].into_iter().chain(reserve).collect();
    let mut space = full_but(&blocks);
    let (extent, next) = space.reserve_within(Pba(4001), 32, 7, 1).unwrap();
    assert_eq!((extent, next), (Extent::new(Pba(4001), 1), Pba(4002)));
    let (extent, next) = space.reserve_within(Pba(4002), 32, 7, 4).unwrap();
    assert_eq!((extent, next), (Extent::new(Pba(4002), 1), Pba(4003)));
}

#[test]
fn what_is_kept_for_metadata_is_no_place_for_data() {
    let mut space = full_but(&(7000..7100).collect::<Vec<_>>());
    assert_eq!(space.free_for_data(), 0);
    assert_eq!(space.reserve_at(Pba(7000), 1), None);
    let refused = space.reserve_within(Pba(7000), 32, 0, 1);
    assert!(matches!(refused, Err(Fault::Error(error)) if error.kind() == ErrorKind::OutOfSpace));
}

/// A space whose regions all stand on disk as of generation 2, with one block of region 1 in use.
fn written() -> (SpaceMap, Pba) {
    let blocks = 5 * REGION_BLOCKS;
    let mut space = loaded(blocks, layout::journal(blocks));
    let pba = Pba(REGION_BLOCKS + 1000);
    space.reserve(pba, 1).unwrap();
    space.publish(pba);
    for region in 0..layout::region_count(blocks) {
        space.mark_dirty(region);
    }
    space.freeze(Generation(2));
    (space, pba)
}

#[test]
fn counts_leave_memory_when_they_can_be_read_again_and_nobody_looks_at_them() {
    let (mut space, pba) = written();
    let all = space.loaded_regions();
    space.limit(2);
    assert!(space.is_over());
    // Not durable yet; but what was never written needs no reading. The first round only takes the marks away.
    space.evict(Generation(1));
    space.evict(Generation(1));
    assert!(space.has_region(1));
    space.limit(usize::MAX);
    for region in 0..all as u64 {
        space.load(region, None, None).unwrap();
    }
    assert_eq!(space.loaded_regions(), all);
    space.limit(1);
    let available = space.available;
    for region in &space.regions {
        region.take_used();
    }
    assert_eq!(space.count(pba).unwrap(), 1);
    space.evict(Generation(2));
    assert_eq!(space.loaded_regions(), 1);
    assert!(space.has_region(1) && !space.has_region(2));
    assert_eq!(space.available, available);
    // Without room for any: gone, and asked for when needed.
    space.limit(0);
    space.evict(Generation(2));
    space.evict(Generation(2));
    let fault = space.count(pba).unwrap_err();
    assert!(matches!(fault, Fault::Missing(super::Missing::Counts(1))));
    assert_eq!(space.available, available);
}

#[test]
fn counts_that_memory_alone_knows_stay() {
    type Touch = fn(&mut SpaceMap, Pba);
    let touches: [(&str, Touch, Touch); 4] = [
        (
            "reserved",
            |space, pba| {
                space.reserve(pba.plus(1), 1).unwrap();
            },
            |space, pba| {
                space.cancel(Extent::new(pba.plus(1), 1));
            },
        ),
        (
            "changed",
            |space, pba| space.retain(pba),
            |space, _| drop(space.freeze(Generation(2))),
        ),
        (
            "pending",
            |space, pba| space.release(pba, None),
            |space, _| {
                space.freeze(Generation(2));
                let pending = space.take_pending();
                space.reuse(&pending, false);
                space.freeze(Generation(2));
            },
        ),
        (
            "being given back",
            |space, pba| {
                space.reserve(pba.plus(1), 1).unwrap();
                space.cancel(Extent::new(pba.plus(1), 1));
                assert_eq!(space.begin_trim(1, 9).unwrap().len(), 1);
            },
            |space, pba| {
                let rest = REGION_BLOCKS - 1001;
                space.end_trim(&[Extent::new(pba.plus(1), rest)]);
            },
        ),
    ];
    for (what, touch, undo) in touches {
        let (mut space, pba) = written();
        touch(&mut space, pba);
        space.limit(0);
        for _ in 0..3 {
            space.evict(Generation(2));
        }
        assert!(space.has_region(1), "{what}");
        undo(&mut space, pba);
        for _ in 0..3 {
            space.evict(Generation(2));
        }
        assert!(!space.has_region(1), "{what}, and not any more");
    }
}

#[test]
fn a_region_that_is_free_and_given_back_stands_on_disk_no_more() {
    let (mut space, pba) = written();
    assert!(space.region_place(1).is_some());
    space.release(pba, None);
    let pending = space.take_pending();
    let frozen = space.freeze(Generation(3));
    // Its block is not free before the checkpoint is durable; the index says that there is something to give back.
    assert!(frozen.vacated.is_empty());
    let entry = |frozen: &super::FrozenSpace| frozen.index[0].3[1];
    assert!(entry(&frozen).is_untrimmed);
    assert_eq!(entry(&frozen).free, REGION_BLOCKS);
    space.reuse(&pending, true);
    assert!(!space.has_vacated());
    space.retain(Pba(2 * REGION_BLOCKS));
    assert!(entry(&space.freeze(Generation(4))).is_untrimmed);
    let extents = space.begin_trim(1, usize::MAX).unwrap();
    assert_eq!(extents, [Extent::new(Pba(REGION_BLOCKS), REGION_BLOCKS)]);
    assert_eq!(space.first_untrimmed(), None);
    space.end_trim(&extents);
    assert!(space.has_vacated());
    let frozen = space.freeze(Generation(5));
    assert_eq!(frozen.vacated, [1]);
    assert!(frozen.regions.is_empty());
    assert_eq!(entry(&frozen), super::IndexEntry::default());
    assert!(space.region_place(1).is_none() && !space.has_vacated());
    // Used again, it is written as if for the first time.
    space.reserve(pba, 1).unwrap();
    space.publish(pba);
    let frozen = space.freeze(Generation(6));
    assert_eq!(frozen.regions[0].region, 1);
    assert_eq!(frozen.regions[0].slot, layout::Slot::A);
}

#[test]
fn what_was_to_be_given_back_is_known_after_reading() {
    let (mut space, pba) = written();
    space.reserve(pba.plus(1), 10).unwrap();
    space.cancel(Extent::new(pba.plus(3), 4));
    space.retain(pba);
    let frozen = space.freeze(Generation(3));
    let mut read = SpaceMap::new(space.blocks(), space.journal);
    for (level, page, _, content) in &frozen.index {
        read.load_index(*level, *page, content).unwrap();
    }
    assert_eq!(read.first_untrimmed(), Some(1));
    assert!(matches!(
        read.begin_trim(1, 9),
        Err(Fault::Missing(super::Missing::Counts(1)))
    ));
    let low = &frozen.regions[0].low;
    read.load(1, Some(low), None).unwrap();
    // Which blocks it was is not known: all that are free.
    let extents = read.begin_trim(1, 9).unwrap();
    let blocks: u64 = extents.iter().map(|extent| extent.count).sum();
    assert_eq!(blocks, REGION_BLOCKS - 1);
    read.end_trim(&extents);
    assert_eq!(read.first_untrimmed(), None);
    // The next checkpoint says so, although no count changed.
    let frozen = read.freeze(Generation(4));
    assert!(frozen.regions.is_empty());
    assert!(!frozen.index[0].3[1].is_untrimmed);
}
