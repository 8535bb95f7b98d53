//! The counts of one region, and which of its blocks can be taken.

use crate::error::{Error, Result};
use crate::format::counts::{Halves, IndexEntry, REGION_LEN};
use crate::format::layout::{self, REGION_BLOCKS, Slot};
use crate::units::{Extent, Generation, Pba};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use triomphe::Arc;

const WORDS: usize = REGION_LEN / 64;
const _: () = assert!(WORDS * 64 == REGION_LEN);

/// A region of the pool.
#[derive(Debug)]
pub(crate) struct Region {
    place: Option<(Slot, Generation)>,
    is_wide: bool,
    /// Some free block may hold room of the device below.
    is_untrimmed: bool,
    /// What the index on disk says of that, or will once the checkpoint under way is durable.
    is_noted: bool,
    since_freeze: SinceFreeze,
    /// Somebody looked at its counts since the last time that eviction came by.
    is_used: AtomicBool,
    /// Blocks that are part of the pool and have no fixed use.
    usable: u64,
    /// Blocks with count 0 that are part of the pool and have no fixed use.
    free: u64,
    /// Of those, the ones neither reserved nor pending.
    available: u64,
    loaded: Option<Box<Loaded>>,
}

/// What became of a region's counts since the last freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinceFreeze {
    Same,
    Changed,
}

#[derive(Debug)]
struct Loaded {
    low: Arc<Halves>,
    /// Only where some count passed 65,535.
    high: Option<Arc<Halves>>,
    /// A set bit: the block can't be taken.
    taken: [u64; WORDS],
    /// A set bit: the block, where it is free, may hold room of the device below.
    stale: [u64; WORDS],
}

/// A region's counts as a checkpoint writes them.
#[derive(Debug)]
pub(crate) struct FrozenRegion {
    pub(crate) region: u64,
    pub(crate) slot: Slot,
    pub(crate) low: Arc<Halves>,
    pub(crate) high: Option<Arc<Halves>>,
}

/// Whether a block of a region is there and free in an empty pool.
fn is_usable(region: u64, offset: usize, blocks: u64, journal: Extent) -> bool {
    let pba = Pba(region * REGION_BLOCKS + offset as u64);
    pba.0 < blocks && !layout::is_fixed(pba, journal)
}

impl Region {
    /// A region that was never written: all free but what has a fixed use.
    pub(crate) fn virgin(region: u64, blocks: u64, journal: Extent) -> Self {
        let start = (region * REGION_BLOCKS).min(blocks);
        let count = REGION_BLOCKS.min(blocks - start);
        let free = layout::usable_blocks_in(Extent::new(Pba(start), count), journal);
        Self {
            place: None,
            is_wide: false,
            is_untrimmed: false,
            is_noted: false,
            since_freeze: SinceFreeze::Same,
            is_used: AtomicBool::new(false),
            usable: free,
            free,
            available: free,
            loaded: None,
        }
    }

    /// Frees the blocks that a grown pool gives the region, whose counts are loaded.
    pub(crate) fn grow(&mut self, region: u64, before: u64, blocks: u64, journal: Extent) {
        let loaded = self.loaded_mut();
        let mut gained = 0;
        for offset in 0..REGION_LEN {
            if is_usable(region, offset, blocks, journal)
                && !is_usable(region, offset, before, journal)
            {
                Arc::make_mut(&mut loaded.low)[offset] = 0;
                loaded.taken[offset / 64] &= !(1 << (offset % 64));
                gained += 1;
            }
        }
        self.usable += gained;
        self.free += gained;
        self.available += gained;
    }

    pub(crate) fn available(&self) -> u64 {
        self.available
    }

    /// Makes nothing available any more.
    pub(crate) fn close(&mut self) {
        self.available = 0;
    }

    pub(crate) fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    pub(crate) fn place(&self) -> Option<(Slot, Generation, bool)> {
        self.place
            .map(|(slot, generation)| (slot, generation, self.is_wide))
    }

    pub(crate) fn entry(&self) -> IndexEntry {
        let is_written = self.place.is_some();
        IndexEntry {
            place: self.place,
            is_wide: self.is_wide,
            is_untrimmed: is_written && self.may_hold_room(),
            free: if is_written { self.free } else { 0 },
        }
    }

    /// Whether free blocks may hold room of the device below, those included that are reserved or pending.
    fn may_hold_room(&self) -> bool {
        self.is_untrimmed || self.free > self.available
    }

    /// What [`Region::entry`] says is on its way to disk.
    pub(crate) fn note(&mut self) {
        self.is_noted = self.entry().is_untrimmed;
    }

    /// Whether the index on disk says that there is something to trim, and there is not.
    pub(crate) fn is_misnoted(&self) -> bool {
        self.is_noted && !self.may_hold_room()
    }

    /// Whether nothing of it is in use, and the device below has all of it: so it need not stand on disk.
    pub(crate) fn is_blank(&self) -> bool {
        self.free == self.usable && self.available == self.free && !self.is_untrimmed
    }

    /// Whether it stands on disk and need not.
    pub(crate) fn is_vacant(&self) -> bool {
        self.place.is_some() && self.is_blank()
    }

    /// Forgets where its counts stand, all of which are 0. Whether they stood somewhere.
    pub(crate) fn vacate(&mut self) -> bool {
        let was_written = self.place.take().is_some();
        self.is_wide = false;
        self.is_noted = false;
        if let Some(loaded) = &mut self.loaded {
            loaded.high = None;
        }
        was_written
    }

    /// Whether some free block may hold room of the device below.
    pub(crate) fn is_untrimmed(&self) -> bool {
        self.is_untrimmed
    }

    /// Free runs with at least one block that may hold room of the device below, at most `most` of them; whole ones, so
    /// that what was given back in pieces is given back as a run. They are not stale any more.
    pub(crate) fn take_stale_runs(&mut self, most: usize) -> Vec<(usize, usize)> {
        let mut runs = Vec::new();
        let mut offset = 0;
        while offset < REGION_LEN && runs.len() < most {
            let length = self.run_at(offset, REGION_LEN);
            if length == 0 {
                offset += 1;
                continue;
            }
            let loaded = self.loaded_mut();
            let mut is_stale = false;
            for at in offset..offset + length {
                let (word, bit) = (at / 64, 1 << (at % 64));
                is_stale |= loaded.stale[word] & bit != 0;
                loaded.stale[word] &= !bit;
            }
            if is_stale {
                runs.push((offset, length));
            }
            offset += length;
        }
        if offset >= REGION_LEN {
            self.is_untrimmed = false;
        }
        runs
    }

    /// Whether its counts can be dropped from memory: all of it stands on disk as of `durable`, or nothing is to stand
    /// there, and no block is taken that no count names.
    pub(crate) fn is_evictable(&self, durable: Generation) -> bool {
        let is_there = match self.place {
            Some((_, generation)) => generation <= durable,
            None => self.free == self.usable,
        };
        is_there && self.free == self.available && self.loaded.is_some()
    }

    /// Its counts change; whether they had before, since the last freeze.
    pub(crate) fn set_dirty(&mut self) -> bool {
        std::mem::replace(&mut self.since_freeze, SinceFreeze::Changed) == SinceFreeze::Changed
    }

    /// Its counts are taken to be written.
    pub(crate) fn set_clean(&mut self) {
        self.since_freeze = SinceFreeze::Same;
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.since_freeze == SinceFreeze::Changed
    }

    /// Drops the counts from memory.
    pub(crate) fn evict(&mut self) {
        self.loaded = None;
    }

    /// Whether somebody looked at it since the last call.
    pub(crate) fn take_used(&self) -> bool {
        self.is_used.swap(false, Ordering::Relaxed)
    }

    fn mark_used(&self) {
        // A store would take the cache line from the other processors each time.
        if !self.is_used.load(Ordering::Relaxed) {
            self.is_used.store(true, Ordering::Relaxed);
        }
    }

    /// Takes over what the index says, before the counts are loaded.
    pub(crate) fn set_entry(&mut self, entry: &IndexEntry) -> Result<()> {
        if entry.place.is_none() {
            return Ok(());
        }
        if entry.free > self.free {
            return Err(Error::corrupt(
                "count index: more free blocks than a region has",
            ));
        }
        self.place = entry.place;
        self.is_wide = entry.is_wide;
        self.is_untrimmed = entry.is_untrimmed;
        self.is_noted = entry.is_untrimmed;
        self.free = entry.free;
        self.available = entry.free;
        Ok(())
    }

    /// Puts the counts into memory; none from disk if the region was never written.
    pub(crate) fn load(
        &mut self,
        region: u64,
        blocks: u64,
        journal: Extent,
        low: Option<&Halves>,
        high: Option<&Halves>,
    ) -> Result<()> {
        if self.loaded.is_some() {
            return Ok(());
        }
        let mut counts = low.copied().unwrap_or([0; REGION_LEN]);
        if layout::has_fixed(region, blocks, journal) {
            for (offset, count) in counts.iter_mut().enumerate() {
                if !is_usable(region, offset, blocks, journal) {
                    // Blocks with a fixed use and blocks beyond the end have one owner for ever.
                    *count = UNUSABLE;
                }
            }
        }
        let mut taken = [0; WORDS];
        for (offset, count) in counts.iter().enumerate() {
            let is_taken = *count > 0 || high.is_some_and(|high| high[offset] > 0);
            taken[offset / 64] |= u64::from(is_taken) << (offset % 64);
        }
        let free: u64 = taken.iter().map(|word| u64::from(word.count_zeros())).sum();
        if free != self.free {
            return Err(Error::corrupt(format!(
                "count page: {free} free blocks, its index says {}",
                self.free
            ))
            .at_pba(Pba(region * REGION_BLOCKS)));
        }
        // Which of its free blocks have been given back was in memory only.
        let stale = if self.is_untrimmed {
            taken.map(|word| !word)
        } else {
            [0; WORDS]
        };
        self.loaded = Some(Box::new(Loaded {
            low: Arc::new(counts),
            high: high.map(|high| Arc::new(*high)),
            taken,
            stale,
        }));
        self.mark_used();
        Ok(())
    }

    /// Replaces the counts, whatever they were.
    pub(crate) fn set_counts(
        &mut self,
        region: u64,
        blocks: u64,
        journal: Extent,
        count_of: impl Fn(usize) -> u32,
    ) {
        let (mut low, mut high) = ([0; REGION_LEN], [0; REGION_LEN]);
        let mut taken = [0; WORDS];
        self.free = 0;
        for offset in 0..REGION_LEN {
            let is_usable = is_usable(region, offset, blocks, journal);
            let count = if is_usable {
                count_of(offset)
            } else {
                u32::from(UNUSABLE)
            };
            low[offset] = (count & 0xffff) as u16;
            high[offset] = (count >> 16) as u16;
            if count == 0 {
                self.free += 1;
            } else {
                taken[offset / 64] |= 1 << (offset % 64);
            }
        }
        self.available = self.free;
        self.is_wide = high.iter().any(|half| *half != 0);
        // Whatever was lost was never given back.
        self.is_untrimmed = true;
        self.loaded = Some(Box::new(Loaded {
            low: Arc::new(low),
            high: self.is_wide.then(|| Arc::new(high)),
            taken,
            stale: taken.map(|word| !word),
        }));
    }

    pub(crate) fn count(&self, offset: usize) -> Option<u32> {
        let loaded = self.loaded.as_ref()?;
        self.mark_used();
        let high = loaded
            .high
            .as_ref()
            .map_or(0, |high| u32::from(high[offset]));
        Some(high << 16 | u32::from(loaded.low[offset]))
    }

    /// Whether each block at `offsets` has an owner. False also where that takes a closer look.
    pub(crate) fn are_owned(&self, offsets: Range<usize>) -> bool {
        let loaded = self.loaded.as_ref();
        let Some(loaded) = loaded.filter(|loaded| loaded.high.is_none()) else {
            return false;
        };
        self.mark_used();
        is_each(&loaded.low[offsets], |count| count > 0)
    }

    /// How many of the `want` blocks from `offset` on have one owner each, up to the first that has not.
    pub(crate) fn owned_alone(&self, offset: usize, want: usize) -> usize {
        let Some(loaded) = &self.loaded else { return 0 };
        let end = REGION_LEN.min(offset + want);
        let low = loaded.low[offset..end].iter();
        let alone = low.take_while(|count| **count == 1).count();
        match &loaded.high {
            None => alone,
            Some(high) => {
                let high = high[offset..offset + alone].iter();
                high.take_while(|half| **half == 0).count()
            }
        }
    }

    #[expect(
        clippy::expect_used,
        reason = "callers read the count first, which needs it loaded"
    )]
    fn loaded_mut(&mut self) -> &mut Loaded {
        self.loaded.as_mut().expect("the counts are loaded")
    }

    /// One owner more for each block at `offsets`.
    pub(crate) fn add_all(&mut self, offsets: Range<usize>) {
        let low = &mut Arc::make_mut(&mut self.loaded_mut().low)[offsets.clone()];
        if is_each(low, |count| (1..u16::MAX).contains(&count)) {
            for count in low {
                *count += 1;
            }
        } else {
            offsets.for_each(|offset| self.add(offset));
        }
    }

    /// The first owner for each block at `offsets`.
    pub(crate) fn add_first(&mut self, offsets: Range<usize>) {
        let loaded = self.loaded_mut();
        let low = &mut Arc::make_mut(&mut loaded.low)[offsets.clone()];
        if loaded.high.is_none() && is_each(low, |count| count == 0) {
            low.fill(1);
            self.free -= offsets.len() as u64;
        } else {
            offsets.for_each(|offset| self.add(offset));
        }
    }

    pub(crate) fn add(&mut self, offset: usize) {
        let loaded = self.loaded_mut();
        let low = &mut Arc::make_mut(&mut loaded.low)[offset];
        match *low {
            u16::MAX => {
                *low = 0;
                let high = loaded.high.get_or_insert_with(|| Arc::new([0; REGION_LEN]));
                Arc::make_mut(high)[offset] += 1;
                self.is_wide = true;
            }
            0 => {
                *low = 1;
                if loaded.high.as_ref().is_none_or(|high| high[offset] == 0) {
                    self.free -= 1;
                }
            }
            _ => *low += 1,
        }
    }

    /// One owner less for each block at `offsets`, if each keeps two at least; whether it was so.
    pub(crate) fn subtract_all(&mut self, offsets: Range<usize>) -> bool {
        let low = &mut Arc::make_mut(&mut self.loaded_mut().low)[offsets];
        let keep_two = is_each(low, |count| count > 2);
        if keep_two {
            for count in low {
                *count -= 1;
            }
        }
        keep_two
    }

    /// The count after the subtraction; none if it was 0.
    pub(crate) fn subtract(&mut self, offset: usize) -> Option<u32> {
        let loaded = self.loaded_mut();
        let high = loaded.high.as_ref().map_or(0, |high| high[offset]);
        let left = (u32::from(high) << 16 | u32::from(loaded.low[offset])).checked_sub(1)?;
        Arc::make_mut(&mut loaded.low)[offset] = (left & 0xffff) as u16;
        if left & 0xffff == 0xffff
            && let Some(high) = &mut loaded.high
        {
            Arc::make_mut(high)[offset] -= 1;
        }
        if left == 0 {
            self.free += 1;
        }
        Some(left)
    }

    /// Takes free blocks, all of them; false if one is taken.
    pub(crate) fn take(&mut self, offsets: Range<usize>) -> bool {
        let count = offsets.len();
        if self.run_at(offsets.start, count) < count {
            return false;
        }
        let loaded = self.loaded_mut();
        for (word, bits) in words(offsets) {
            loaded.taken[word] |= bits;
        }
        self.available -= count as u64;
        true
    }

    /// Gives a taken block back; `is_stale`: it may hold room of the device below.
    pub(crate) fn give_back(&mut self, offset: usize, is_stale: bool) {
        let loaded = self.loaded_mut();
        let (word, bit) = (offset / 64, 1 << (offset % 64));
        loaded.taken[word] &= !bit;
        if is_stale {
            loaded.stale[word] |= bit;
        } else {
            loaded.stale[word] &= !bit;
        }
        self.available += 1;
        self.is_untrimmed |= is_stale;
    }

    /// The free run from `from`, at most `want` long.
    pub(crate) fn run_at(&self, from: usize, want: usize) -> usize {
        let Some(loaded) = &self.loaded else { return 0 };
        let mut offset = from;
        let end = REGION_LEN.min(from + want);
        while offset < end {
            let taken_from_here = loaded.taken[offset / 64] >> (offset % 64);
            let zeros = usize::try_from(taken_from_here.trailing_zeros())
                .unwrap_or(0)
                .min(64 - offset % 64);
            offset += zeros;
            if zeros == 0 || !offset.is_multiple_of(64) {
                break;
            }
        }
        offset.min(end) - from
    }

    /// The first free run of `want` blocks, or else the longest there is.
    pub(crate) fn best_run(&self, want: usize) -> Option<(usize, usize)> {
        let loaded = self.loaded.as_ref()?;
        let mut best: Option<(usize, usize)> = None;
        let mut offset = 0;
        while offset < REGION_LEN {
            let taken_from_here = loaded.taken[offset / 64] >> (offset % 64);
            if taken_from_here == u64::MAX >> (offset % 64) {
                offset = (offset / 64 + 1) * 64;
                continue;
            }
            offset += usize::try_from(taken_from_here.trailing_ones()).unwrap_or(0);
            let length = self.run_at(offset, REGION_LEN);
            if best.is_none_or(|(_, longest)| length > longest) {
                best = Some((offset, length.min(want)));
            }
            if length >= want {
                return Some((offset, want));
            }
            offset += length;
        }
        best
    }

    /// The counts in memory: the low halves, and the high ones where there are any.
    pub(crate) fn halves(&self) -> (Option<Arc<Halves>>, Option<Arc<Halves>>) {
        let loaded = self.loaded.as_ref();
        let low = loaded.map(|loaded| Arc::clone(&loaded.low));
        (low, loaded.and_then(|loaded| loaded.high.clone()))
    }

    /// Hands the counts to a checkpoint; later changes go to a copy.
    pub(crate) fn freeze(&mut self, region: u64, generation: Generation) -> FrozenRegion {
        let slot = self.place.map_or(Slot::A, |(slot, _)| slot.other());
        self.place = Some((slot, generation));
        let loaded = self.loaded_mut();
        let frozen = FrozenRegion {
            region,
            slot,
            low: Arc::clone(&loaded.low),
            high: loaded.high.clone(),
        };
        self.is_wide = frozen.high.is_some();
        frozen
    }
}

/// The count of a block that no reservation may ever take.
const UNUSABLE: u16 = 1;

/// Whether it `is` so for each count. Looks at all of them, which is faster than to stop at the first that it is not so for.
fn is_each(counts: &[u16], is: impl Fn(u16) -> bool) -> bool {
    counts.iter().fold(true, |all, count| all & is(*count))
}

/// The words of a bitmap that `offsets` are in, and their bits there.
fn words(offsets: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (offsets.start / 64..offsets.end.div_ceil(64)).map(move |word| {
        let from = offsets.start.max(word * 64) - word * 64;
        let to = offsets.end.min(word * 64 + 64) - word * 64;
        (word, (u64::MAX >> (64 - (to - from))) << from)
    })
}
