//! Putting counts right: what a walk over all maps found takes the place of what the pool had noted.

use super::{Region, SpaceMap, layout};
use crate::format::layout::{INDEX_ENTRIES, REGION_BLOCKS};
use crate::units::Pba;

impl SpaceMap {
    /// Replaces the counts of a region by what `count_of` says of each of its blocks; the next checkpoint writes them.
    /// Nothing of the region is reserved, set aside or pending.
    pub(crate) fn set_counts(&mut self, region: u64, count_of: impl Fn(usize) -> u32) {
        let (blocks, journal) = (self.blocks, self.journal);
        let was_loaded = self.has_region(region);
        let set = |found: &mut Region| found.set_counts(region, blocks, journal, count_of);
        if self.regions.update(region, set).is_none() {
            return;
        }
        self.mark_dirty(region);
        self.untrimmed.insert(region);
        if !was_loaded {
            self.loaded.push_back(region);
        }
    }

    /// The regions below the index page number `page` of `level`.
    pub(crate) fn regions_below(&self, level: u8, page: u64) -> std::ops::Range<u64> {
        let span = INDEX_ENTRIES.pow(u32::from(level));
        let end = layout::region_count(self.blocks);
        (page * span).min(end)..((page + 1) * span).min(end)
    }

    /// Whether a block of a region has a fixed use, which no count says.
    pub(crate) fn is_fixed(&self, pba: Pba) -> bool {
        layout::is_fixed(pba, self.journal)
    }

    /// The blocks of a region.
    pub(crate) fn region_blocks(&self, region: u64) -> std::ops::Range<u64> {
        let start = region * REGION_BLOCKS;
        start..self.blocks.min(start + REGION_BLOCKS)
    }
}
