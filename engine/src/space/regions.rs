//! The regions of a pool: those that were ever used, each with its counts or where they stand, and which of all have
//! how many blocks that can be taken.
//!
//! Memory and the time to open a pool go with the groups of regions in use: a group of which nothing was ever used is not
//! there, and all of its blocks can be taken. Finding a region looks at a few words of a bitmap for each class of free
//! space, however many regions there are: it is done under the lock over all metadata.

use super::region::Region;
use crate::format::layout::{
    GROUP_BLOCKS, INDEX_ENTRIES, REGION_BLOCKS, region_count, usable_blocks_in,
};
use crate::units::{Extent, Pba};

/// Regions of a group, and groups of a span.
const FAN: u64 = INDEX_ENTRIES;
const FAN_LEN: usize = 252;
const _: () = assert!(FAN == FAN_LEN as u64);
/// A region with `n` blocks that can be taken is in class log2(n).
const CLASSES: usize = REGION_BLOCKS.ilog2() as usize + 1;
/// The class of every region of a group that was never used.
const WHOLE: usize = CLASSES - 1;
/// Of a class in which some regions have too little, so many are looked at.
const LOOKED_AT_MAX: usize = 8;

/// Which of 252 places have something.
type Bits = [u64; FAN_LEN.div_ceil(64)];

/// The regions that were ever used.
#[derive(Debug)]
pub(super) struct Regions {
    blocks: u64,
    journal: Extent,
    /// Blocks that can be taken now.
    available: u64,
    spans: Vec<Option<Box<Span>>>,
    /// By class, the spans with a region of it.
    classes: [Vec<u64>; CLASSES],
    /// How many words and regions were looked at to find one.
    looked_at: u64,
}

/// 252 groups.
#[derive(Debug)]
struct Span {
    groups: Vec<Option<Box<Group>>>,
    /// By class, the groups with a region of it.
    classes: [Bits; CLASSES],
}

/// 252 regions.
#[derive(Debug)]
struct Group {
    regions: Vec<Region>,
    /// By class, the regions of it.
    classes: [Bits; CLASSES],
}

/// Where a region is.
#[derive(Clone, Copy)]
struct Place {
    span: usize,
    group: usize,
    region: usize,
}

impl Place {
    fn of(number: u64) -> Self {
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            span: index(number / FAN / FAN),
            group: index(number / FAN % FAN),
            region: index(number % FAN),
        }
    }

    fn number(self) -> u64 {
        (self.span as u64 * FAN + self.group as u64) * FAN + self.region as u64
    }
}

/// The class of a region with so many blocks that can be taken.
fn class_of(available: u64) -> Option<usize> {
    available.checked_ilog2().map(|class| class as usize)
}

fn set(words: &mut [u64], index: usize, is_set: bool) {
    if let Some(word) = words.get_mut(index / 64) {
        let bit = 1 << (index % 64);
        if is_set {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }
}

/// The first set bit from `from` on, and how many words were looked at.
fn first_set(words: &[u64], from: usize) -> (Option<usize>, u64) {
    let mut looked_at = 0;
    let mut mask = u64::MAX << (from % 64);
    for (number, word) in words.iter().enumerate().skip(from / 64) {
        looked_at += 1;
        let bits = word & mask;
        if bits != 0 {
            let bit = usize::try_from(bits.trailing_zeros()).unwrap_or(0);
            return (Some(number * 64 + bit), looked_at);
        }
        mask = u64::MAX;
    }
    (None, looked_at)
}

fn is_empty(words: &[u64]) -> bool {
    words.iter().all(|word| *word == 0)
}

impl Regions {
    /// The regions of an empty pool.
    pub(super) fn new(journal: Extent) -> Self {
        Self {
            blocks: 0,
            journal,
            available: 0,
            spans: Vec::new(),
            classes: Default::default(),
            looked_at: 0,
        }
    }

    /// How many there are, used or not.
    pub(super) fn count(&self) -> u64 {
        region_count(self.blocks)
    }

    /// Blocks that can be taken now.
    pub(super) fn available(&self) -> u64 {
        self.available
    }

    /// How many words and regions were looked at to find one.
    #[cfg(test)]
    pub(super) fn looked_at(&self) -> u64 {
        self.looked_at
    }

    /// A region of a group in use; none where nothing of its group was ever used.
    pub(super) fn get(&self, number: u64) -> Option<&Region> {
        let place = Place::of(number);
        let span = self.spans.get(place.span)?.as_ref()?;
        span.groups
            .get(place.group)?
            .as_ref()?
            .regions
            .get(place.region)
    }

    /// The same, to change all of it but how many of its blocks can be taken.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Region> {
        let place = Place::of(number);
        let span = self.spans.get_mut(place.span)?.as_mut()?;
        let group = span.groups.get_mut(place.group)?.as_mut()?;
        group.regions.get_mut(place.region)
    }

    /// Changes a region in any way, as if it had been used before. None where the pool has no such region.
    pub(super) fn update<T>(
        &mut self,
        number: u64,
        change: impl FnOnce(&mut Region) -> T,
    ) -> Option<T> {
        if number >= self.count() {
            return None;
        }
        self.use_group(number / FAN);
        let region = self.get_mut(number)?;
        let before = region.available();
        let value = change(region);
        let after = region.available();
        self.available = self.available - before + after;
        let (old, new) = (class_of(before), class_of(after));
        if old != new {
            let place = Place::of(number);
            if let Some(class) = old {
                self.note(place, class, false);
            }
            if let Some(class) = new {
                self.note(place, class, true);
            }
        }
        Some(value)
    }

    /// A region is in a class from now on, or is not.
    fn note(&mut self, place: Place, class: usize, is_in: bool) {
        let Some(Some(span)) = self.spans.get_mut(place.span) else {
            return;
        };
        let Some(Some(group)) = span.groups.get_mut(place.group) else {
            return;
        };
        set(&mut group.classes[class], place.region, is_in);
        let has_some = is_in || !is_empty(&group.classes[class]);
        set(&mut span.classes[class], place.group, has_some);
        let has_some = has_some || !is_empty(&span.classes[class]);
        set(&mut self.classes[class], place.span, has_some);
    }

    fn group_count(&self) -> u64 {
        self.count().div_ceil(FAN)
    }

    /// Groups of a span.
    fn span_len(&self, span: usize) -> usize {
        let first = span as u64 * FAN;
        usize::try_from(self.group_count().saturating_sub(first).min(FAN)).unwrap_or(FAN_LEN)
    }

    /// Sees to it that a group is there.
    fn use_group(&mut self, group: u64) {
        let place = Place::of(group * FAN);
        let span_len = self.span_len(place.span);
        let Some(slot) = self.spans.get_mut(place.span) else {
            return;
        };
        let span = slot.get_or_insert_with(|| {
            let mut classes = [Bits::default(); CLASSES];
            (0..span_len).for_each(|group| set(&mut classes[WHOLE], group, true));
            Box::new(Span {
                groups: (0..FAN_LEN).map(|_| None).collect(),
                classes,
            })
        });
        let Some(slot @ None) = span.groups.get_mut(place.group) else {
            return;
        };
        let (blocks, journal) = (self.blocks, self.journal);
        let virgin = |region| Region::virgin(group * FAN + region, blocks, journal);
        let regions: Vec<Region> = (0..FAN).map(virgin).collect();
        let found: Vec<(usize, usize)> = (0..)
            .zip(&regions)
            .filter_map(|(index, region)| Some((index, class_of(region.available())?)))
            .collect();
        *slot = Some(Box::new(Group {
            regions,
            classes: [Bits::default(); CLASSES],
        }));
        set(&mut span.classes[WHOLE], place.group, false);
        let has_whole = !is_empty(&span.classes[WHOLE]);
        set(&mut self.classes[WHOLE], place.span, has_whole);
        for (region, class) in found {
            self.note(Place { region, ..place }, class, true);
        }
    }

    /// Adds the regions up to `blocks`. What the last one before them gains is up to the caller.
    pub(super) fn grow(&mut self, blocks: u64) {
        let (old_count, old_groups) = (self.count(), self.group_count());
        self.blocks = blocks;
        let (count, groups, journal) = (self.count(), self.group_count(), self.journal);
        // The last group is always there, so that each that is not there has all of its regions.
        for number in old_count..count.min(old_groups * FAN) {
            self.update(number, |region| {
                *region = Region::virgin(number, blocks, journal);
            });
        }
        let spans = usize::try_from(groups.div_ceil(FAN)).unwrap_or(usize::MAX);
        self.spans.resize_with(spans, || None);
        for words in &mut self.classes {
            words.resize(spans.div_ceil(64), 0);
        }
        let first_span = usize::try_from(old_groups / FAN).unwrap_or(usize::MAX);
        for span in first_span..spans {
            let new = old_groups.max(span as u64 * FAN)..groups.min((span as u64 + 1) * FAN);
            if let Some(Some(found)) = self.spans.get_mut(span) {
                for group in new.clone() {
                    let place = Place::of(group * FAN);
                    set(&mut found.classes[WHOLE], place.group, true);
                }
            }
            if !new.is_empty() {
                set(&mut self.classes[WHOLE], span, true);
            }
        }
        let start = Pba((old_groups * GROUP_BLOCKS).min(blocks));
        self.available += usable_blocks_in(Extent::new(start, blocks - start.0), journal);
        // The journal is in the first one.
        self.use_group(0);
        if groups > 0 {
            self.use_group(groups - 1);
        }
    }

    /// Numbers of regions that are written on disk, ascending.
    pub(super) fn written(&self) -> impl Iterator<Item = u64> {
        let spans = (0..).zip(&self.spans);
        let groups = spans.flat_map(|(span, found)| {
            let groups = found.iter().flat_map(|found| &found.groups);
            (0..)
                .zip(groups)
                .map(move |(group, found)| (span * FAN + group, found))
        });
        groups.flat_map(|(group, found)| {
            let regions = found.iter().flat_map(|found| &found.regions);
            let numbered = (group * FAN..).zip(regions);
            numbered.filter_map(|(number, region)| region.place().map(|_| number))
        })
    }

    /// A region with at least `enough` blocks that can be taken: the next one from `from` on, where that is found by
    /// looking at few. If there is none, the next of those that have the most, about.
    pub(super) fn find(&mut self, enough: u64, from: u64) -> Option<u64> {
        self.find_enough(enough, from).or_else(|| {
            let mut classes = (0..CLASSES).rev();
            classes.find_map(|class| self.next_around(class, from))
        })
    }

    fn find_enough(&mut self, enough: u64, from: u64) -> Option<u64> {
        let count = self.count();
        let distance = |number: u64| (number + count - from) % count;
        let class = class_of(enough)?;
        let mut best: Option<u64> = None;
        for class in class + 1..CLASSES {
            let found = self.next_around(class, from);
            best = best
                .into_iter()
                .chain(found)
                .min_by_key(|number| distance(*number));
        }
        // Some of this class have too little.
        let mut at = from;
        for _ in 0..LOOKED_AT_MAX {
            let Some(number) = self.next_around(class, at) else {
                break;
            };
            let is_past = distance(number) < distance(at);
            if is_past || best.is_some_and(|best| distance(best) <= distance(number)) {
                break;
            }
            let has_enough = |region: &Region| region.available() >= enough;
            if self.get(number).is_none_or(has_enough) {
                return Some(number);
            }
            at = (number + 1) % count;
            if at == from {
                break;
            }
        }
        best
    }

    /// The next region of a class from `from` on, then from the beginning.
    fn next_around(&mut self, class: usize, from: u64) -> Option<u64> {
        self.next(class, from).or_else(|| self.next(class, 0))
    }

    fn next(&mut self, class: usize, from: u64) -> Option<u64> {
        let from = Place::of(from);
        self.next_in_group(class, from)
            .or_else(|| {
                let next = Place {
                    group: from.group + 1,
                    region: 0,
                    ..from
                };
                self.next_in_span(class, next)
            })
            .or_else(|| {
                let (span, looked_at) = first_set(&self.classes[class], from.span + 1);
                self.looked_at += looked_at;
                let place = Place {
                    span: span?,
                    group: 0,
                    region: 0,
                };
                self.next_in_span(class, place)
            })
    }

    /// The first region of a class from a group of a span on.
    fn next_in_span(&mut self, class: usize, from: Place) -> Option<u64> {
        let group = if let Some(span) = self.spans.get(from.span)? {
            let (group, looked_at) = first_set(&span.classes[class], from.group);
            self.looked_at += looked_at;
            group?
        } else {
            // Nothing of it was ever used.
            let is_there = class == WHOLE && from.group < self.span_len(from.span);
            is_there.then_some(from.group)?
        };
        self.next_in_group(class, Place { group, ..from })
    }

    /// The first region of a class from one of a group on.
    fn next_in_group(&mut self, class: usize, from: Place) -> Option<u64> {
        let span = self.spans.get(from.span)?.as_ref();
        let group = span.map(|span| span.groups.get(from.group));
        if let Some(Some(Some(group))) = group {
            let (region, looked_at) = first_set(&group.classes[class], from.region);
            self.looked_at += looked_at;
            let region = region?;
            return Some(Place { region, ..from }.number());
        }
        let is_there = class == WHOLE && from.group < self.span_len(from.span);
        // The first one has the slots of the group's counts.
        let region = from.region.max(1);
        is_there.then(|| Place { region, ..from }.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::layout;
    use crate::limits::POOL_BLOCKS_MAX;
    use fastrand::Rng;

    const GROUPS: u64 = 3 * FAN + 5;

    fn empty(groups: u64) -> Regions {
        let blocks = groups * GROUP_BLOCKS;
        let mut regions = Regions::new(layout::journal(blocks));
        regions.grow(blocks);
        regions
    }

    /// Leaves so many blocks of a region that can be taken.
    fn leave(regions: &mut Regions, number: u64, available: usize) {
        let (blocks, journal) = (regions.blocks, regions.journal);
        regions.update(number, |region| {
            region.set_counts(number, blocks, journal, |offset| {
                u32::from(offset < 1984 - available)
            });
        });
    }

    #[test]
    fn what_is_found_has_enough_and_is_the_next_that_has() {
        let mut rng = Rng::with_seed(1);
        let mut regions = empty(GROUPS);
        let count = regions.count();
        for round in 0..200 {
            let from = rng.u64(..count);
            for _ in 0..20 {
                let number = (from + rng.u64(..400)) % count;
                let available = 1 << rng.u32(..11);
                leave(&mut regions, number, rng.usize(..available));
            }
            let enough = 1 + rng.u64(..992);
            let found = regions.find(enough, from).unwrap();
            let available = |number| {
                regions.get(number).map_or_else(
                    || Region::virgin(number, regions.blocks, regions.journal).available(),
                    Region::available,
                )
            };
            assert!(available(found) >= enough, "round {round}");
            // Nothing nearer has, but for what only a longer look at its class would find.
            let around = (0..count).map(|step| (from + step) % count);
            let nearer = around.take_while(|number| *number != found);
            let missed = nearer.filter(|number| available(*number) >= enough);
            let is_missed = |number: u64| {
                let same = class_of(available(number)) == class_of(enough);
                same || regions.get(number).is_none() || number.is_multiple_of(FAN)
            };
            assert!(missed.into_iter().all(is_missed), "round {round}");
        }
        let sum: u64 = (0..count)
            .map(|number| {
                regions.get(number).map_or_else(
                    || Region::virgin(number, regions.blocks, regions.journal).available(),
                    Region::available,
                )
            })
            .sum();
        assert_eq!(regions.available(), sum);
    }

    #[test]
    fn finding_looks_at_as_much_in_a_full_and_fragmented_pool_as_in_a_small_one() {
        let work = |groups: u64| {
            let mut regions = empty(groups);
            let mut most = 0;
            for number in 0..regions.count() {
                leave(&mut regions, number, 20);
            }
            for want in [1, 20, 21, 32, 512, 992] {
                for from in [0, 1, regions.count() / 2, regions.count() - 1] {
                    let before = regions.looked_at();
                    let found = regions.find(want, from).unwrap();
                    assert!(regions.get(found).unwrap().available() > 0);
                    most = most.max(regions.looked_at() - before);
                }
            }
            most
        };
        // 4 GiB, and 240 GiB.
        let (small, large) = (work(2), work(126));
        assert!(large <= 2 * small && large < 500, "{small}, {large}");
    }

    #[test]
    fn the_largest_pool_costs_nothing_until_it_is_used() {
        let mut regions = empty(POOL_BLOCKS_MAX / GROUP_BLOCKS);
        let count = regions.count();
        assert!(regions.available() > count * 1970);
        let used = |regions: &Regions| regions.spans.iter().flatten().count();
        assert!(used(&regions) <= 2);
        let before = regions.looked_at();
        for from in [0, count / 2, count - 1] {
            assert!(regions.find(992, from).is_some());
        }
        assert!(regions.looked_at() - before < 3 * 400);
        assert!(used(&regions) <= 2);
        regions.update(count / 2, |region| assert!(!region.is_loaded()));
        assert_eq!(used(&regions), 3);
    }

    #[test]
    fn a_pool_that_grows_has_what_one_of_that_size_has() {
        let mut rng = Rng::with_seed(3);
        for _ in 0..50 {
            let sizes = [1, 2, 252, 253, 254, 505];
            let mut blocks = rng.choice(sizes).unwrap() * GROUP_BLOCKS;
            let journal = layout::journal(GROUP_BLOCKS);
            let mut grown = Regions::new(journal);
            grown.grow(blocks);
            for _ in 0..4 {
                grown.update(rng.u64(..grown.count()), |_| ());
                blocks += rng.u64(..3) * GROUP_BLOCKS + rng.u64(..2) * 250 * GROUP_BLOCKS;
                grown.grow(blocks);
                let mut whole = Regions::new(journal);
                whole.grow(blocks);
                assert_eq!(grown.available(), whole.available());
                for _ in 0..20 {
                    let (enough, from) = (1 + rng.u64(..992), rng.u64(..grown.count()));
                    assert!(grown.find_enough(enough, from).is_some());
                }
            }
        }
    }
}
