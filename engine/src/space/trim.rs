//! Giving free blocks back to the device below, and counts back to the memory.
//!
//! A block that becomes free is *stale*: it may hold room of the file system or the device below. A long run is given
//! back with the checkpoint that frees it; what else is stale is given back a region at a time, in idle moments. Meanwhile
//! its blocks count as pending, so that nobody takes them and whoever lacks them waits.
//!
//! Which blocks of a region are stale is known in memory only; the index says whether any may be.

use super::{Fault, Missing, SpaceMap};
use crate::format::layout::REGION_BLOCKS;
use crate::units::{Extent, Generation, Pba};

/// So many regions are looked at by one call of [`SpaceMap::evict`], so that nobody waits long for it.
const LOOKED_AT_MAX: usize = 64;

impl SpaceMap {
    /// The first region with free blocks that may hold room of the device below.
    pub(crate) fn first_untrimmed(&self) -> Option<u64> {
        self.untrimmed.first().copied()
    }

    /// Takes at most `most` stale runs of a region, to be given back to the device below and then to
    /// [`SpaceMap::end_trim`].
    pub(crate) fn begin_trim(&mut self, region: u64, most: usize) -> Result<Vec<Extent>, Fault> {
        let Some(found) = self.region(region) else {
            self.untrimmed.remove(&region);
            return Ok(Vec::new());
        };
        if !found.is_loaded() {
            return Err(Fault::Missing(Missing::Counts(region)));
        }
        let mut extents = Vec::new();
        let is_untrimmed = self.regions.update(region, |found| {
            for (offset, length) in found.take_stale_runs(most) {
                let was_free = found.take(offset..offset + length);
                assert!(was_free, "a run that was found free is taken");
                let start = Pba(region * REGION_BLOCKS + offset as u64);
                extents.push(Extent::new(start, length as u64));
            }
            found.is_untrimmed()
        });
        if is_untrimmed != Some(true) {
            self.untrimmed.remove(&region);
        }
        let blocks: u64 = extents.iter().map(|extent| extent.count).sum();
        self.pending_blocks += blocks;
        self.note_freed(region);
        Ok(extents)
    }

    /// Lets blocks be taken again that were given back to the device below.
    pub(crate) fn end_trim(&mut self, extents: &[Extent]) {
        self.reuse(extents, false);
    }

    /// Gives nothing of a region back for now: its counts cannot be read, or the device refuses.
    pub(crate) fn skip_trim(&mut self, region: u64) {
        self.untrimmed.remove(&region);
    }

    /// Whether a region became free from end to end, whose counts a checkpoint would take off the disk.
    pub(crate) fn has_vacated(&self) -> bool {
        self.has_vacated
    }

    /// Blocks of a region became free, or were given back.
    pub(super) fn note_freed(&mut self, region: u64) {
        let Some(found) = self.region(region) else {
            return;
        };
        if found.is_untrimmed() {
            self.untrimmed.insert(region);
        } else if found.is_vacant() {
            self.mark_dirty(region);
            self.has_vacated = true;
        } else if found.is_misnoted() {
            self.misnoted.insert(region);
        }
    }

    /// Regions whose counts are in memory.
    pub(crate) fn loaded_regions(&self) -> usize {
        self.loaded.len()
    }

    /// Lets counts of so many regions be in memory.
    pub(crate) fn limit(&mut self, regions: usize) {
        self.regions_max = regions;
    }

    /// Whether counts of more regions are in memory than may be.
    pub(crate) fn is_over(&self) -> bool {
        self.loaded.len() > self.regions_max
    }

    /// Whether so many counts changed that few of those in memory could be dropped.
    pub(crate) fn is_mostly_dirty(&self) -> bool {
        self.dirty.len() > self.regions_max / 2
    }

    /// Of how many regions counts changed since the last checkpoint began.
    pub(crate) fn dirty_regions(&self) -> usize {
        self.dirty.len()
    }

    /// Drops counts from memory where there are more than may be: what was not looked at since the last time goes first.
    /// What only memory knows stays.
    pub(crate) fn evict(&mut self, durable: Generation) {
        for _ in 0..LOOKED_AT_MAX {
            if !self.is_over() {
                return;
            }
            let Some(region) = self.loaded.pop_front() else {
                return;
            };
            let Some(found) = self.regions.get_mut(region) else {
                continue;
            };
            let stays = found.take_used() || found.is_dirty() || !found.is_evictable(durable);
            if stays {
                self.loaded.push_back(region);
            } else {
                found.evict();
            }
        }
    }
}
