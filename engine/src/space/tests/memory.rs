//! Counts that leave memory, or the disk, and come back.

use super::loaded;
use crate::format::counts::IndexEntry;
use crate::format::layout::{self, REGION_BLOCKS};
use crate::space::{Fault, FrozenSpace, Missing, SpaceMap};
use crate::units::{Extent, Generation, Pba};

/// A space whose regions all stand on disk as of generation 2, with one block of region 1 in use.
fn written() -> (SpaceMap, Pba) {
    let blocks = 5 * REGION_BLOCKS;
    let mut space = loaded(blocks, layout::journal(blocks));
    let pba = Pba(REGION_BLOCKS + 1000);
    space.reserve(pba, 1).unwrap();
    space.publish(Extent::new(pba, 1));
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
    let available = space.available();
    for region in (0..space.regions.count()).filter_map(|number| space.regions.get(number)) {
        region.take_used();
    }
    assert_eq!(space.count(pba).unwrap(), 1);
    space.evict(Generation(2));
    assert_eq!(space.loaded_regions(), 1);
    assert!(space.has_region(1) && !space.has_region(2));
    assert_eq!(space.available(), available);
    // Without room for any: gone, and asked for when needed.
    space.limit(0);
    space.evict(Generation(2));
    space.evict(Generation(2));
    let fault = space.count(pba).unwrap_err();
    assert!(matches!(fault, Fault::Missing(Missing::Counts(1))));
    assert_eq!(space.available(), available);
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
    let entry = |frozen: &FrozenSpace| frozen.index[0].3[1];
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
    assert_eq!(entry(&frozen), IndexEntry::default());
    assert!(space.region_place(1).is_none() && !space.has_vacated());
    // Used again, it is written as if for the first time.
    space.reserve(pba, 1).unwrap();
    space.publish(Extent::new(pba, 1));
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
        Err(Fault::Missing(Missing::Counts(1)))
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
