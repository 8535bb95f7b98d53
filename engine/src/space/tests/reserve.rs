//! Where free blocks are taken, and which are kept back.

use super::{Pair, loaded};
use crate::error::ErrorKind;
use crate::format::layout::{self, REGION_BLOCKS};
use crate::space::{Fault, Missing, SpaceMap};
use crate::units::{Extent, Pba};

#[test]
fn what_the_journal_maps_is_claimed_once() {
    let mut pair = Pair::new(1, 4096);
    let extent = Extent::new(Pba(2500), 10);
    let before = pair.space.available();
    pair.space.claim(extent).unwrap();
    assert_eq!(pair.space.available(), before - 10);
    assert!(pair.space.claim(Extent::new(Pba(2509), 2)).is_err());
    pair.space.publish(Extent::new(Pba(2500), 1));
    assert!(pair.space.claim(Extent::new(Pba(2500), 1)).is_err());
    let aside = pair.space.reserve(Pba(2500), 1).unwrap();
    assert!(aside.start.0 < 2500 || aside.start.0 >= 2510);
}

#[test]
fn a_closed_region_gives_out_nothing() {
    let mut space = loaded(4096, layout::journal(4096));
    let before = space.available();
    space.close_region(1);
    assert_eq!(space.available(), before - REGION_BLOCKS);
    space.set_aside_last(space.available()).unwrap();
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
    assert_eq!(space.available(), space.reserve_blocks());
    let left = space.available();
    assert!(space.set_aside(left - 49).is_err());
    space.set_aside(left - 50).unwrap();
    assert!(space.require(left + 1).is_err());
    space.set_aside_last(left).unwrap();
}

/// Nothing is free but these.
fn full_but(free: &[u64]) -> SpaceMap {
    let mut space = loaded(8192, layout::journal(8192));
    space.set_aside_last(space.available()).unwrap();
    space.metadata.clear();
    space.set_aside = 0;
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
    assert_eq!(space.available(), 0);
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
        Err(Fault::Missing(Missing::Counts(1)))
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
    assert_eq!(space.available(), whole.available() - taken);
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
