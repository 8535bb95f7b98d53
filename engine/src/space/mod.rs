//! Which blocks of the pool are free, and how many references the others have.
//!
//! A data block's count is the number of map leaves that name it, a map page's count the number of pages and roots
//! above it. The life of a block: free, `reserve`d, `publish`ed with count 1 (or `cancel`led), `retain`ed and
//! `release`d; at count 0 it is *pending*: not reusable until a checkpoint that does not name it is durable and every
//! request that might still use it has ended. Counts are loaded a region at a time, on first use.

mod kept;
mod leaf;
mod region;
mod regions;
mod reserve;
mod restore;
#[cfg(test)]
mod tests;
mod trim;

pub(crate) use kept::{KeptCounts, KeptPages};
pub(crate) use region::FrozenRegion;

use crate::error::{Error, Result};
use crate::format::counts::{Halves, Index, IndexEntry, empty_index};
use crate::format::layout::{
    self, Bounds, INDEX_ENTRIES, INDEX_LEVELS, REGION_BLOCKS, Slot, TOP_ENTRIES,
};
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::page::PagePtr;
use crate::units::{Extent, Generation, Pba, Seq};
use region::Region;
use regions::Regions;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What an operation lacks in memory; the caller reads it from the device and tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The counts of a region.
    Counts(u64),
    /// A map page of a level.
    Page(PagePtr, u8),
}

/// Why an operation on the metadata did not happen. Nothing was changed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// Something must be read first.
    Missing(Missing),
    /// It can't.
    Error(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The space of a pool.
#[derive(Debug)]
pub(crate) struct SpaceMap {
    blocks: u64,
    journal: Extent,
    regions: Regions,
    /// Regions whose counts changed since the last freeze.
    dirty: Vec<u64>,
    /// Regions whose index entry says less than is so.
    misnoted: FxHashSet<u64>,
    /// Regions with free blocks that may hold room of the device below.
    untrimmed: BTreeSet<u64>,
    /// A region became free from end to end, which a checkpoint would make as if it had never been written.
    has_vacated: bool,
    /// Regions whose counts are in memory, in the order in which eviction looks at them.
    loaded: VecDeque<u64>,
    /// Counts of so many regions may be in memory.
    regions_max: usize,
    /// Where the index pages of levels 1 to 3 stand, by number.
    index: [BTreeMap<u64, (Slot, Generation)>; INDEX_LEVELS as usize],
    /// Blocks that have no fixed use.
    usable: u64,
    /// Where the next search for a run begins.
    cursor: u64,
    /// Blocks set aside for metadata pages.
    metadata: VecDeque<Extent>,
    /// How many blocks these are; each write asks.
    set_aside: u64,
    /// Blocks that a checkpoint's catalog pages may need, which no map change may take.
    kept_back: u64,
    /// Released to count 0 since the last freeze.
    pending: Vec<Extent>,
    pending_blocks: u64,
    /// What a reader of an earlier checkpoint still needs of it.
    kept: Option<kept::Kept>,
    /// Released pages among that.
    kept_blocks: u64,
    /// Blocks whose only remaining owner is one for good only when the record is durable that released the other.
    unsettled: FxHashMap<Pba, Seq>,
    unsettled_order: VecDeque<(Seq, Pba)>,
    /// Counts found too low on the way: damage that a check will name.
    underflows: u64,
    /// Reservations that came to nothing.
    cancelled: u64,
    tally: Tally,
}

/// What was taken and given up since the pool was opened. The difference between two is what happened between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Blocks that got their first owner, and blocks that lost their last.
    pub(crate) taken: u64,
    pub(crate) freed: u64,
    /// Of those, map pages.
    pub(crate) pages_taken: u64,
    pub(crate) pages_freed: u64,
    /// Blocks that have one owner left.
    pub(crate) left_alone: u64,
}

impl SpaceMap {
    /// The space of an empty pool.
    pub(crate) fn new(blocks: u64, journal: Extent) -> Self {
        let mut space = Self {
            blocks,
            journal,
            regions: Regions::new(journal),
            dirty: Vec::new(),
            misnoted: FxHashSet::default(),
            untrimmed: BTreeSet::new(),
            has_vacated: false,
            loaded: VecDeque::new(),
            regions_max: usize::MAX,
            index: Default::default(),
            usable: 0,
            cursor: 0,
            metadata: VecDeque::new(),
            set_aside: 0,
            kept_back: 0,
            pending: Vec::new(),
            pending_blocks: 0,
            kept: None,
            kept_blocks: 0,
            unsettled: FxHashMap::default(),
            unsettled_order: VecDeque::new(),
            underflows: 0,
            cancelled: 0,
            tally: Tally::default(),
        };
        space.add_regions(blocks);
        space
    }

    /// Sees to it that [`SpaceMap::grow`] can be done.
    pub(crate) fn prepare_grow(&self) -> Result<(), Fault> {
        // The last region may end within; its new blocks are freed one by one.
        match self.regions.count().checked_sub(1) {
            Some(last) if !self.has_region(last) => Err(Fault::Missing(Missing::Counts(last))),
            _ => Ok(()),
        }
    }

    /// Takes the blocks up to `blocks` into use, if they are not yet.
    pub(crate) fn grow(&mut self, blocks: u64) {
        if blocks <= self.blocks {
            return;
        }
        let (before, journal) = (self.blocks, self.journal);
        if let Some(last) = self.regions.count().checked_sub(1) {
            self.mark_dirty(last);
            self.regions
                .update(last, |region| region.grow(last, before, blocks, journal));
        }
        self.add_regions(blocks);
    }

    fn add_regions(&mut self, blocks: u64) {
        self.blocks = blocks;
        self.regions.grow(blocks);
        let all = Extent::new(Pba(0), blocks);
        self.usable = layout::usable_blocks_in(all, self.journal);
    }

    /// Blocks that a reservation could take now.
    fn available(&self) -> u64 {
        self.regions.available()
    }

    /// Blocks of the pool.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Which blocks a pointer may name.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            blocks: self.blocks,
            journal: self.journal,
        }
    }

    /// Blocks kept back for metadata: what deleting, discarding and rolling back on a full pool may take until a
    /// checkpoint gives space back.
    pub(crate) fn reserve_blocks(&self) -> u64 {
        self.metadata_reserve() + self.kept_back
    }

    fn metadata_reserve(&self) -> u64 {
        (self.blocks / 128).clamp(256, 65_536)
    }

    /// Keeps so many blocks back for a checkpoint's own pages.
    pub(crate) fn keep_back(&mut self, count: u64) {
        self.kept_back = count;
    }

    /// Blocks that data can still take.
    pub(crate) fn free_for_data(&self) -> u64 {
        (self.available() + self.set_aside).saturating_sub(self.reserve_blocks())
    }

    /// Blocks that data can take of an empty pool: with a leaf for each 512 of them, and as many again for the copies of
    /// leaves between two checkpoints. `kept_back` is what its catalog will have kept back.
    pub(crate) fn data_capacity(&self, kept_back: u64) -> u64 {
        let kept = self.metadata_reserve() + kept_back;
        let room = self.usable.saturating_sub(kept);
        room - room.div_ceil(LEAF_ENTRIES as u64 / 2)
    }

    /// Blocks released and not reusable yet.
    pub(crate) fn pending_blocks(&self) -> u64 {
        self.pending_blocks
    }

    /// Blocks neither free nor released nor set aside, the fixed ones included.
    pub(crate) fn used_blocks(&self) -> u64 {
        let unused = self.available() + self.set_aside + self.pending_blocks + self.kept_blocks;
        self.blocks - unused
    }

    /// What was taken and given up so far.
    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// A map page loses its last owner next.
    pub(crate) fn note_page_freed(&mut self) {
        self.tally.pages_freed += 1;
    }

    /// How often a count was found too low.
    pub(crate) fn underflows(&self) -> u64 {
        self.underflows
    }

    /// How many reservations came to nothing: mostly because the write failed that they were for.
    pub(crate) fn cancelled(&self) -> u64 {
        self.cancelled
    }

    /// How many owners a block has.
    pub(crate) fn count(&self, pba: Pba) -> Result<u32, Fault> {
        let (region, offset) = place(pba);
        if pba.0 >= self.blocks {
            return Err(Error::corrupt("a pointer beyond the pool")
                .at_pba(pba)
                .into());
        }
        self.region(region)
            .and_then(|counted| counted.count(offset))
            .ok_or(Fault::Missing(Missing::Counts(region)))
    }

    /// The count of a block that something points to: 0 is damage.
    pub(crate) fn referenced(&self, pba: Pba) -> Result<u32, Fault> {
        let (region, offset) = place(pba);
        let counted = self.region(region).filter(|_| pba.0 < self.blocks);
        match counted.and_then(|counted| counted.count(offset)) {
            Some(count) if (1..u32::MAX).contains(&count) => Ok(count),
            _ => Err(self.why_not_referenced(pba)),
        }
    }

    #[cold]
    fn why_not_referenced(&self, pba: Pba) -> Fault {
        let fact = match self.count(pba) {
            Err(fault) => return fault,
            Ok(0) => "a pointer to a block that is counted as free",
            Ok(_) => "a count that no block can have",
        };
        Error::corrupt(fact).at_pba(pba).into()
    }

    /// A region; none also where it was never used.
    fn region(&self, region: u64) -> Option<&Region> {
        self.regions.get(region)
    }

    /// Whether a block's only owner would still be its only one after a power cut now.
    pub(crate) fn is_settled(&self, pba: Pba) -> bool {
        self.unsettled.is_empty() || !self.unsettled.contains_key(&pba)
    }

    /// How many blocks at the beginning of a run have one owner each, and would still have it alone after a power cut now.
    pub(crate) fn exclusive(&self, run: Extent) -> Result<u64, Fault> {
        if self.referenced(run.start)? > 1 {
            return Ok(0);
        }
        let mut done = 0;
        while done < run.count {
            let (region, offset) = place(run.start.plus(done));
            let counted = self.region(region);
            let want = usize::try_from(run.count - done).unwrap_or(usize::MAX);
            let alone = counted.map_or(0, |counted| counted.owned_alone(offset, want)) as u64;
            done += alone;
            if done < run.count && (offset as u64 + alone) < REGION_BLOCKS {
                break;
            }
        }
        if self.unsettled.is_empty() {
            return Ok(done);
        }
        let settled = (0..done).take_while(|index| self.is_settled(run.start.plus(*index)));
        Ok(settled.count() as u64)
    }

    /// Every record up to `durable` is durable.
    pub(crate) fn settle(&mut self, durable: Seq) {
        while let Some(&(seq, pba)) = self.unsettled_order.front() {
            if seq > durable {
                break;
            }
            self.unsettled_order.pop_front();
            if self.unsettled.get(&pba) == Some(&seq) {
                self.unsettled.remove(&pba);
            }
        }
    }

    /// The next checkpoint writes the region's counts.
    fn mark_dirty(&mut self, region: u64) {
        self.region_mut(region);
    }

    fn region_mut(&mut self, region: u64) -> &mut Region {
        let was_clean = (self.regions.get_mut(region)).is_some_and(|found| !found.set_dirty());
        if was_clean {
            self.dirty.push(region);
            self.keep_counts(region);
        }
        #[expect(
            clippy::expect_used,
            reason = "callers checked the block with `count` first"
        )]
        self.regions.get_mut(region).expect("a region in use")
    }

    /// One more owner. The block's counts are loaded.
    pub(crate) fn retain(&mut self, pba: Pba) {
        let (region, offset) = place(pba);
        self.region_mut(region).add(offset);
    }

    /// One owner less; at 0 the block is pending. `seq` is the last record that the release hangs on: until that is
    /// durable, whoever is left must not write in place what lies in the block or below the page, because a power cut
    /// would bring the other owner back. None where nothing can be left.
    pub(crate) fn release(&mut self, pba: Pba, seq: Option<Seq>) {
        if self.drop_owner(pba, seq) {
            self.add_pending(pba);
        }
    }

    fn add_pending(&mut self, pba: Pba) {
        self.pending_blocks += 1;
        match self.pending.last_mut() {
            Some(last) if last.end() == pba => last.count += 1,
            _ => self.pending.push(Extent::new(pba, 1)),
        }
    }

    /// Takes one owner from a block; whether it was the last.
    fn drop_owner(&mut self, pba: Pba, seq: Option<Seq>) -> bool {
        let (region, offset) = place(pba);
        match self.region_mut(region).subtract(offset) {
            None => self.underflows += 1,
            Some(0) => {
                self.tally.freed += 1;
                return true;
            }
            Some(1) => {
                self.tally.left_alone += 1;
                if let Some(seq) = seq {
                    self.unsettled.insert(pba, seq);
                    self.unsettled_order.push_back((seq, pba));
                }
            }
            Some(_) => {}
        }
        false
    }

    /// Takes the blocks that were released so far; they stay pending until [`SpaceMap::reuse`].
    pub(crate) fn take_pending(&mut self) -> Vec<Extent> {
        std::mem::take(&mut self.pending)
    }

    /// Makes released blocks free again: no durable state names them and nobody uses them any more. `is_stale`: they may
    /// hold room of the device below.
    pub(crate) fn reuse(&mut self, extents: &[Extent], is_stale: bool) {
        for extent in extents {
            self.pending_blocks -= extent.count;
            self.set_free(*extent, is_stale);
        }
    }

    /// Marks a block that the journal maps as taken, before replay hands out blocks for metadata.
    pub(crate) fn claim(&mut self, extent: Extent) -> Result<(), Fault> {
        let in_use = |pba| {
            Fault::Error(Error::corrupt("the journal maps a block that is in use").at_pba(pba))
        };
        for pba in extent.blocks() {
            if self.count(pba)? != 0 {
                return Err(in_use(pba));
            }
        }
        for pba in extent.blocks() {
            let (region, offset) = place(pba);
            self.mark_dirty(region);
            let take = |region: &mut Region| region.take(offset..offset + 1);
            if self.regions.update(region, take) != Some(true) {
                return Err(in_use(pba));
            }
        }
        Ok(())
    }

    /// Puts a region's counts from disk into memory; `high` only where the region is wide.
    pub(crate) fn load(
        &mut self,
        region: u64,
        low: Option<&Halves>,
        high: Option<&Halves>,
    ) -> Result<()> {
        let (blocks, journal) = (self.blocks, self.journal);
        let loaded = self.regions.update(region, |found| {
            let was_loaded = found.is_loaded();
            found.load(region, blocks, journal, low, high)?;
            Ok(!was_loaded)
        });
        match loaded {
            Some(is_new) => {
                if is_new? {
                    self.loaded.push_back(region);
                }
                Ok(())
            }
            None => Err(Error::corrupt("a region beyond the pool")),
        }
    }

    /// Whether a region's counts are in memory.
    pub(crate) fn has_region(&self, region: u64) -> bool {
        self.region(region).is_some_and(Region::is_loaded)
    }

    /// Gives no block of a region out any more: its counts cannot be read.
    pub(crate) fn close_region(&mut self, region: u64) {
        self.regions.update(region, Region::close);
    }

    /// Where a region's counts stand, and whether they have high halves; none: never written.
    pub(crate) fn region_place(&self, region: u64) -> Option<(Slot, Generation, bool)> {
        self.region(region)?.place()
    }

    /// Regions whose counts stand on disk, ascending.
    pub(crate) fn written_regions(&self) -> impl Iterator<Item = u64> {
        self.regions.written()
    }

    /// What the index pages say, page by page from the top level down, as the loader reads them.
    pub(crate) fn load_index(&mut self, level: u8, page: u64, index: &Index) -> Result<()> {
        let first = page * INDEX_ENTRIES;
        for (position, entry) in (first..).zip(index.iter()) {
            self.load_entry(level - 1, position, entry)?;
        }
        Ok(())
    }

    /// What the superblock says of the index pages of the top level.
    pub(crate) fn load_top(&mut self, top: &[IndexEntry; TOP_ENTRIES]) -> Result<()> {
        for (position, entry) in (0..).zip(top.iter()) {
            self.load_entry(INDEX_LEVELS, position, entry)?;
        }
        Ok(())
    }

    /// The entry number `position` for a page of `level`; level 0 is a region.
    fn load_entry(&mut self, level: u8, position: u64, entry: &IndexEntry) -> Result<()> {
        // What was never written costs nothing.
        let Some(place) = entry.place else {
            return Ok(());
        };
        let below = INDEX_ENTRIES.pow(u32::from(level));
        if position >= self.regions.count().div_ceil(below) {
            return Err(Error::corrupt("count index: counts beyond the pool"));
        }
        if level > 0 {
            self.index[usize::from(level) - 1].insert(position, place);
            return Ok(());
        }
        let is_untrimmed = self.regions.update(position, |region| {
            region.set_entry(entry)?;
            Ok::<_, Error>(region.is_untrimmed())
        });
        if let Some(is_untrimmed) = is_untrimmed
            && is_untrimmed?
        {
            self.untrimmed.insert(position);
        }
        Ok(())
    }

    /// The index pages of `level` that stand on disk: number, slot, generation.
    pub(crate) fn index_places(&self, level: u8) -> Vec<(u64, Slot, Generation)> {
        let places = self.index[usize::from(level) - 1].iter();
        places
            .map(|(page, (slot, generation))| (*page, *slot, *generation))
            .collect()
    }

    /// Takes the counts that changed, to be written as `generation`, and the index pages above them.
    pub(crate) fn freeze(&mut self, generation: Generation) -> FrozenSpace {
        let mut frozen = FrozenSpace::default();
        let mut pages = BTreeSet::new();
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        for region in dirty {
            let Some(frozen_region) = self.regions.get_mut(region) else {
                continue;
            };
            frozen_region.set_clean();
            if frozen_region.is_blank() {
                frozen
                    .vacated
                    .extend(frozen_region.vacate().then_some(region));
            } else {
                frozen
                    .regions
                    .push(frozen_region.freeze(region, generation));
            }
            pages.insert(region / INDEX_ENTRIES);
        }
        self.has_vacated = false;
        let misnoted = std::mem::take(&mut self.misnoted);
        pages.extend(misnoted.into_iter().map(|region| region / INDEX_ENTRIES));
        for level in 1..=INDEX_LEVELS {
            for page in std::mem::take(&mut pages) {
                let places = &mut self.index[usize::from(level) - 1];
                let slot = places.get(&page).map_or(Slot::A, |(slot, _)| slot.other());
                places.insert(page, (slot, generation));
                let content = self.index_page(level, page);
                frozen.index.push((level, page, slot, content));
                pages.insert(page / INDEX_ENTRIES);
            }
            // The pages of the next level; those just inserted belong to it.
        }
        for (position, entry) in (0..).zip(frozen.top.iter_mut()) {
            let places = &self.index[usize::from(INDEX_LEVELS) - 1];
            entry.place = places.get(&position).copied();
        }
        frozen
    }

    fn index_page(&mut self, level: u8, page: u64) -> Box<Index> {
        let mut index = empty_index();
        let first = page * INDEX_ENTRIES;
        if level == 1 {
            for (entry, number) in index.iter_mut().zip(first..) {
                if let Some(region) = self.regions.get_mut(number) {
                    *entry = region.entry();
                    region.note();
                }
            }
        } else {
            let below = &self.index[usize::from(level) - 2];
            for (entry, number) in index.iter_mut().zip(first..) {
                entry.place = below.get(&number).copied();
            }
        }
        index
    }
}

/// What a checkpoint writes of the space.
#[derive(Debug)]
pub(crate) struct FrozenSpace {
    pub(crate) regions: Vec<FrozenRegion>,
    /// Regions that stand on disk no more: their slots are of no use once the checkpoint is durable.
    pub(crate) vacated: Vec<u64>,
    /// Level, number, slot and content of index pages.
    pub(crate) index: Vec<(u8, u64, Slot, Box<Index>)>,
    pub(crate) top: Box<[IndexEntry; TOP_ENTRIES]>,
}

impl Default for FrozenSpace {
    fn default() -> Self {
        Self {
            regions: Vec::new(),
            vacated: Vec::new(),
            index: Vec::new(),
            top: Box::new([IndexEntry::default(); TOP_ENTRIES]),
        }
    }
}

fn place(pba: Pba) -> (u64, usize) {
    let offset = (pba.0 % REGION_BLOCKS) as usize;
    (pba.0 / REGION_BLOCKS, offset)
}
