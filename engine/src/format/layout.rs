//! Where everything with a fixed place stands: superblock copies, journal, and the slots of the count tree.
//!
//! The pool is cut into regions of 1,984 blocks, each counted by one page; 252 regions are a group. Each group keeps,
//! 16 blocks from its start, the slots of its count pages and of the index pages that begin with it. Every page of the
//! count tree has two slots and alternates between them, so writing counts never needs an allocation, which would
//! change counts.

use crate::limits::{POOL_BLOCKS_MAX, POOL_BLOCKS_MIN};
use crate::units::{Extent, Pba};

/// The places of the two superblock copies.
pub(crate) const SUPERBLOCKS: [Pba; 2] = [Pba(0), Pba(8)];
/// Blocks counted by one count page.
pub(crate) const REGION_BLOCKS: u64 = 1984;
/// Entries of an index page of the count tree.
pub(crate) const INDEX_ENTRIES: u64 = 252;
/// Blocks of a group.
pub(crate) const GROUP_BLOCKS: u64 = REGION_BLOCKS * INDEX_ENTRIES;
/// Index levels below the superblock: a page of level 1 spans a group, of level 3 some 118 TiB.
pub(crate) const INDEX_LEVELS: u8 = 3;
/// Pointers to level-3 index pages in the superblock.
pub(crate) const TOP_ENTRIES: usize = 128;

const SLOTS_AT: u64 = 16;
/// Low and high halves, two slots each.
const SLOTS_PER_REGION: u64 = 4;
const REGION_SLOTS: u64 = INDEX_ENTRIES * SLOTS_PER_REGION;
const GROUP_HEAD_END: u64 = SLOTS_AT + REGION_SLOTS + 2 * INDEX_LEVELS as u64;
/// A last group with fewer blocks than this is left out of the pool.
const GROUP_BLOCKS_MIN: u64 = 2 * GROUP_HEAD_END;
const JOURNAL_BLOCKS_MIN: u64 = 128;
const JOURNAL_BLOCKS_MAX: u64 = 4 * 1024;

const _: () =
    assert!(POOL_BLOCKS_MAX <= TOP_ENTRIES as u64 * GROUP_BLOCKS * INDEX_ENTRIES * INDEX_ENTRIES);
const _: () = assert!(POOL_BLOCKS_MIN >= GROUP_BLOCKS_MIN);
const _: () = assert!(GROUP_HEAD_END < REGION_BLOCKS);

/// One of the two places of a page that alternates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    A,
    B,
}

impl Slot {
    /// The place that the current content does not use.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn index(self) -> u64 {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// The blocks of a device with `blocks` blocks that a pool can use.
pub(crate) fn usable_blocks(blocks: u64) -> u64 {
    let tail = blocks % GROUP_BLOCKS;
    if tail < GROUP_BLOCKS_MIN {
        blocks - tail
    } else {
        blocks
    }
}

/// The journal of a new pool, behind the first group's slots.
pub(crate) fn journal(pool_blocks: u64) -> Extent {
    let count = (pool_blocks / 64).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX);
    Extent::new(Pba(GROUP_HEAD_END), count)
}

/// How many regions a pool has.
pub(crate) fn region_count(pool_blocks: u64) -> u64 {
    pool_blocks.div_ceil(REGION_BLOCKS)
}

/// The slot of a region's count page; `high` for the page of the counts' high halves.
pub(crate) fn region_slot(region: u64, slot: Slot, high: bool) -> Pba {
    let (group, within) = (region / INDEX_ENTRIES, region % INDEX_ENTRIES);
    Pba(group * GROUP_BLOCKS
        + SLOTS_AT
        + within * SLOTS_PER_REGION
        + slot.index() * 2
        + u64::from(high))
}

/// The slot of the index page number `index` of `level`.
pub(crate) fn index_slot(level: u8, index: u64, slot: Slot) -> Pba {
    let group = index * INDEX_ENTRIES.pow(u32::from(level) - 1);
    Pba(group * GROUP_BLOCKS + SLOTS_AT + REGION_SLOTS + 2 * (u64::from(level) - 1) + slot.index())
}

/// Whether a block has a fixed use, so that no allocation may take it.
pub(crate) fn is_fixed(pba: Pba, journal: Extent) -> bool {
    let within = pba.0 % GROUP_BLOCKS;
    pba.0 < SLOTS_AT
        || (SLOTS_AT..GROUP_HEAD_END).contains(&within)
        || (journal.start..journal.end()).contains(&pba)
}

/// How many blocks of a run have no fixed use.
pub(crate) fn usable_blocks_in(run: Extent, journal: Extent) -> u64 {
    let heads = heads_before(run.end().0) - heads_before(run.start.0);
    let start = journal.start.0.clamp(run.start.0, run.end().0);
    let end = journal.end().0.clamp(start, run.end().0);
    let both = heads_before(end) - heads_before(start);
    run.count - heads - ((end - start) - both)
}

/// How many blocks before this one are superblocks or slots.
fn heads_before(pba: u64) -> u64 {
    const HEAD: u64 = GROUP_HEAD_END - SLOTS_AT;
    let (groups, within) = (pba / GROUP_BLOCKS, pba % GROUP_BLOCKS);
    let slots = groups * HEAD + within.clamp(SLOTS_AT, GROUP_HEAD_END) - SLOTS_AT;
    slots + pba.min(SLOTS_AT)
}

/// Whether a region has blocks that no allocation may take: fixed ones, or such beyond the pool's end.
pub(crate) fn has_fixed(region: u64, pool_blocks: u64, journal: Extent) -> bool {
    let start = region * REGION_BLOCKS;
    let end = start + REGION_BLOCKS;
    region.is_multiple_of(INDEX_ENTRIES)
        || end > pool_blocks
        || (journal.start.0 < end && start < journal.end().0)
}

/// What a pointer may name: blocks of the pool that have no fixed use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) blocks: u64,
    pub(crate) journal: Extent,
}

impl Bounds {
    /// Whether a pointer read from the device may name this block.
    pub(crate) fn contain(self, pba: Pba) -> bool {
        pba.0 < self.blocks && !is_fixed(pba, self.journal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn usable_blocks_are_those_without_a_fixed_use() {
        let blocks = 3 * GROUP_BLOCKS;
        let mut rng = fastrand::Rng::with_seed(1);
        for count in [1, 100, 4096, GROUP_BLOCKS - GROUP_HEAD_END] {
            let journal = Extent::new(journal(blocks).start, count);
            for _ in 0..20 {
                let start = rng.u64(..blocks);
                let start = if rng.bool() { start % 3000 } else { start };
                let count = rng.u64(..(blocks - start).min(600_000));
                let run = Extent::new(Pba(start), count);
                let usable = run.blocks().filter(|pba| !is_fixed(*pba, journal));
                assert_eq!(
                    usable_blocks_in(run, journal),
                    usable.count() as u64,
                    "{run:?}"
                );
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn slots_are_fixed_blocks_and_never_the_same() {
        let journal = journal(1 << 20);
        let mut seen = BTreeSet::from(SUPERBLOCKS);

        for slot in [Slot::A, Slot::B] {
            for region in 0..3 * INDEX_ENTRIES {
                for high in [false, true] {
                    assert!(seen.insert(region_slot(region, slot, high)));
                }
            }
            for index in 0..3 {
                assert!(seen.insert(index_slot(1, index, slot)));
            }
            assert!(seen.insert(index_slot(2, 0, slot)));
            assert!(seen.insert(index_slot(3, 0, slot)));
        }
        for pba in seen {
            assert!(is_fixed(pba, journal), "{pba}");
            assert!(!(journal.start..journal.end()).contains(&pba));
        }
    }
}
