//! The count index: what it may name, and where its pages stand.

use super::{Pair, loaded};
use crate::format::counts::IndexEntry;
use crate::format::layout::{self, INDEX_ENTRIES, REGION_BLOCKS};
use crate::space::{SpaceMap, place};
use crate::units::{Extent, Generation, Pba};

#[test]
fn the_index_names_no_more_than_there_is() {
    let mut space = SpaceMap::new(4096, layout::journal(4096));
    let mut entry = space.regions.get(1).unwrap().entry();
    entry.place = Some((layout::Slot::B, Generation(3)));
    entry.free = REGION_BLOCKS + 1;
    assert!(space.load_entry(0, 1, &entry).is_err());
    entry.free = 7;
    let before = loaded(4096, layout::journal(4096)).available();
    let mut space = SpaceMap::new(4096, layout::journal(4096));
    space.load_entry(0, 1, &entry).unwrap();
    assert_eq!(space.available(), before - REGION_BLOCKS + 7);
    space.load_entry(0, 2, &IndexEntry::default()).unwrap();
    assert!(space.load_entry(0, 3, &entry).is_err());
    assert!(space.load_entry(1, 1, &entry).is_err());
    space.load_entry(1, 0, &entry).unwrap();
    assert_eq!(space.index_places(1), [(0, layout::Slot::B, Generation(3))]);
    assert!(space.load_entry(0, 3, &IndexEntry::default()).is_ok());
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn index_pages_of_a_large_pool_stand_where_a_loader_looks_for_them() {
    let blocks = (INDEX_ENTRIES + 3) * REGION_BLOCKS;
    let mut pair = Pair::new(5, blocks);
    let last = Pba(INDEX_ENTRIES * REGION_BLOCKS + 1500);
    let taken = pair.space.reserve(last, 1).unwrap();
    assert_eq!(taken.start, last);
    pair.space.publish(Extent::new(last, 1));
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
