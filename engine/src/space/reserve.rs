//! Finding free blocks: runs for data, single blocks for metadata pages.
//!
//! A writer continues where it left off, so that what is written together lies together; one that can't starts in a
//! region of its own, so that streams do not interleave.

use super::{Fault, Missing, SpaceMap, place};
use crate::error::{Error, ErrorKind};
use crate::format::counts::REGION_LEN;
use crate::format::layout::REGION_BLOCKS;
use crate::units::{Extent, Pba};
use std::ops::Range;

/// A region that has blocks to be taken has a free run. Where that is not so, so many others are tried.
const TRIES_MAX: usize = 8;

/// Metadata pages are handed out from runs of this many blocks, so that a checkpoint writes them together.
const METADATA_RUN: u64 = 64;

impl SpaceMap {
    /// Takes a run of up to `want` free blocks for data, at `goal` if that is free.
    pub(crate) fn reserve(&mut self, goal: Pba, want: u64) -> Result<Extent, Fault> {
        let want = want.min(self.free_for_data()).min(self.available());
        if want == 0 {
            return Err(Error::new(ErrorKind::OutOfSpace).into());
        }
        self.take_run(goal, want)
    }

    /// Takes the `want` blocks from `at` on, if they are free and their counts in memory.
    pub(crate) fn reserve_at(&mut self, at: Pba, want: u64) -> Option<Extent> {
        if want > self.free_for_data() || self.free_at(at, want)? < want {
            return None;
        }
        let extent = Extent::new(at, want);
        self.take(extent);
        Some(extent)
    }

    /// Takes `want` blocks, `skip` blocks behind the beginning of a free run of `span`, whose others stay free: for
    /// neighbours that may follow. Where no run is that long, just up to `want` blocks. Also, where to look next.
    pub(crate) fn reserve_within(
        &mut self,
        goal: Pba,
        span: u64,
        skip: u64,
        want: u64,
    ) -> Result<(Extent, Pba), Fault> {
        let want = want.min(self.free_for_data()).min(self.available());
        if want == 0 {
            return Err(Error::new(ErrorKind::OutOfSpace).into());
        }
        let run = self.find_run(goal, span)?;
        let (extent, next) = if run.count == span {
            (Extent::new(run.start.plus(skip), want), run.end())
        } else {
            let extent = Extent::new(run.start, want.min(run.count));
            (extent, extent.end())
        };
        self.take(extent);
        Ok((extent, next))
    }

    /// Sees to it that `count` blocks are set aside for map pages, and that what a checkpoint needs is left besides.
    pub(crate) fn set_aside(&mut self, count: u64) -> Result<(), Fault> {
        self.require(count + self.kept_back)?;
        self.set_aside_last(count)
    }

    /// Refuses where fewer than `count` blocks are left for metadata.
    pub(crate) fn require(&self, count: u64) -> Result<(), Fault> {
        if self.available() + self.set_aside + self.ripe_blocks() < count {
            let message = "no space left in the pool, not even in the reserve; remove something";
            return Err(Error::with(ErrorKind::OutOfSpace, message).into());
        }
        Ok(())
    }

    /// The same for a checkpoint's own pages, which may take what was kept back for them.
    pub(crate) fn set_aside_last(&mut self, count: u64) -> Result<(), Fault> {
        self.require(count)?;
        if self.available() + self.set_aside < count {
            let ripe = self.take_ripe();
            self.set_aside += ripe.len() as u64;
            let extents = ripe.into_iter().map(|pba| Extent::new(pba, 1));
            self.metadata.extend(extents);
        }
        while self.set_aside < count {
            let goal = self.metadata.back().map_or(Pba(0), |extent| extent.end());
            let want = METADATA_RUN.min(self.available());
            let extent = self.take_run(goal, want)?;
            self.set_aside += extent.count;
            self.metadata.push_back(extent);
        }
        Ok(())
    }

    /// A block for a metadata page, with one owner. [`SpaceMap::set_aside`] saw to it that there is one.
    pub(crate) fn take_metadata(&mut self) -> Pba {
        #[expect(
            clippy::expect_used,
            reason = "set_aside comes first; running out is our bug"
        )]
        let extent = self
            .metadata
            .front_mut()
            .expect("metadata blocks are set aside");
        let pba = extent.start;
        extent.start = pba.plus(1);
        extent.count -= 1;
        self.set_aside -= 1;
        if extent.count == 0 {
            self.metadata.pop_front();
        }
        self.tally.taken += 1;
        self.tally.pages_taken += 1;
        self.retain(pba);
        pba
    }

    /// Gives reserved blocks their first owner.
    pub(crate) fn publish(&mut self, extent: Extent) {
        self.tally.taken += extent.count;
        for (region, offsets) in by_region(extent) {
            self.region_mut(region).add_first(offsets);
        }
    }

    /// Gives a reservation back.
    pub(crate) fn cancel(&mut self, extent: Extent) {
        self.cancelled += 1;
        self.set_free(extent, true);
    }

    /// Lets blocks be taken again; `is_stale`: they may hold room of the device below.
    pub(super) fn set_free(&mut self, extent: Extent, is_stale: bool) {
        for (number, offsets) in by_region(extent) {
            self.regions.update(number, |region| {
                offsets.for_each(|offset| region.give_back(offset, is_stale));
            });
            self.note_freed(number);
        }
    }

    pub(super) fn take_run(&mut self, goal: Pba, want: u64) -> Result<Extent, Fault> {
        let extent = self.find_run(goal, want)?;
        self.take(extent);
        Ok(extent)
    }

    /// Takes blocks that were found free.
    fn take(&mut self, extent: Extent) {
        for (region, offsets) in by_region(extent) {
            let was_free = self.regions.update(region, |found| found.take(offsets));
            assert!(
                was_free == Some(true),
                "{extent:?} was found free and is taken"
            );
        }
    }

    /// How many of the `want` blocks from `at` on are free, up to the first that is not; none where no region is.
    fn free_at(&self, at: Pba, want: u64) -> Option<u64> {
        let (region, offset) = place(at);
        let region = self.region(region)?;
        let want = usize::try_from(want).unwrap_or(usize::MAX);
        Some(region.run_at(offset, want.min(1 << 20)) as u64)
    }

    fn find_run(&mut self, goal: Pba, want: u64) -> Result<Extent, Fault> {
        let want_len = usize::try_from(want).unwrap_or(usize::MAX);
        let (region, offset) = place(goal);
        if goal.0 > 0 && goal.0 < self.blocks {
            let at_goal = self.region(region);
            let length = match at_goal {
                Some(at_goal) if at_goal.available() == 0 => 0,
                Some(at_goal) if at_goal.is_loaded() => {
                    at_goal.run_at(offset, want_len.min(1 << 20))
                }
                _ => return Err(Fault::Missing(Missing::Counts(region))),
            };
            if length > 0 {
                return Ok(Extent::new(goal, length as u64));
            }
        }
        let regions = self.regions.count();
        for _ in 0..TRIES_MAX {
            let Some(region) = self
                .regions
                .find(want.min(REGION_BLOCKS / 2), self.cursor % regions.max(1))
            else {
                break;
            };
            let Some(candidate) = self.region(region).filter(|region| region.is_loaded()) else {
                return Err(Fault::Missing(Missing::Counts(region)));
            };
            let run = candidate.best_run(want_len);
            self.cursor = (region + 1) % regions;
            if let Some((offset, length)) = run {
                let start = Pba(region * REGION_BLOCKS + offset as u64);
                return Ok(Extent::new(start, length as u64));
            }
        }
        Err(Error::new(ErrorKind::OutOfSpace).into())
    }
}

/// The regions that an extent is in, and its blocks in each.
fn by_region(extent: Extent) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut rest = extent;
    std::iter::from_fn(move || {
        let (region, offset) = place(rest.start);
        let room = (REGION_LEN - offset) as u64;
        let count = rest.count.min(room);
        rest = Extent::new(rest.start.plus(count), rest.count - count);
        #[expect(clippy::cast_possible_truncation, reason = "less than a region")]
        let end = offset + count as usize;
        (count > 0).then_some((region, offset..end))
    })
}
