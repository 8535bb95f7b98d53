//! How many owners a block has: at the limits of a count, and of a whole leaf.

use super::{Pair, loaded};
use crate::error::ErrorKind;
use crate::format::counts::REGION_LEN;
use crate::format::layout::{self, REGION_BLOCKS};
use crate::format::map_page::LEAF_ENTRIES;
use crate::space::{Fault, SpaceMap};
use crate::units::{Extent, Generation, Pba};

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_count_passes_65535_and_comes_back() {
    let mut pair = Pair::new(1, 4096);
    let pba = pair.space.reserve(Pba(2000), 1).unwrap().start;
    let neighbour = pair.space.reserve(pba.plus(1), 1).unwrap().start;
    pair.space.publish(Extent::new(pba, 1));
    pair.space.publish(Extent::new(neighbour, 1));
    pair.at(pba).count = 1;
    pair.at(neighbour).count = 1;
    let available = pair.space.available();
    for step in 0..140_000_u32 {
        pair.space.retain(pba);
        pair.at(pba).count += 1;
        if step % 20_000 == 19_999 || (65_530..65_540).contains(&step) {
            assert_eq!(pair.space.count(pba).unwrap(), step + 2);
            pair.check_reloaded();
        }
    }
    let free = |pair: &Pair| pair.space.regions.get(1).unwrap().entry().free;
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
    assert_eq!(
        (free(&pair), pair.space.available()),
        (before + 1, available)
    );
    assert_eq!(pair.space.take_pending(), [Extent::new(pba, 1)]);
    pair.space.release(pba, None);
    assert_eq!(pair.space.underflows(), 1);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_leaf_may_name_one_block_everywhere() {
    let mut space = loaded(4096, Extent::new(Pba(8), 256));
    let pba = space.reserve(Pba(2000), 1).unwrap().start;
    space.publish(Extent::new(pba, 1));
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
    space.publish(run);
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
    let mut entry = space.regions.get(1).unwrap().entry();
    entry.place = Some((layout::Slot::A, Generation(1)));
    entry.free = REGION_BLOCKS - 2;
    space
        .regions
        .update(1, |region| region.set_entry(&entry))
        .unwrap()
        .unwrap();
    // The index knows how many are free.
    assert!(space.load(1, Some(&low), None).is_err());
    space.load(1, Some(&low), Some(&high)).unwrap();
    let first = Pba(REGION_BLOCKS);
    assert!(space.referenced(first.plus(500)).is_err());
    assert_eq!(space.referenced(first.plus(501)).unwrap(), 65_536);
    assert!(space.load(3, None, None).is_err());
    assert!(space.count(Pba(4096)).is_err());
}
