//! The owners of all blocks that a leaf maps to: counted in groups, because there are 512 whenever one is copied or goes.

use super::{Fault, SpaceMap, place};
use crate::format::layout::REGION_BLOCKS;
use crate::units::{Pba, Seq};
use std::ops::Range;

/// The blocks of a group often lie one after the other.
const GROUP: usize = 8;

impl SpaceMap {
    /// [`SpaceMap::referenced`] for each block that a leaf maps to.
    pub(crate) fn all_referenced(&self, entries: &[Pba]) -> Result<(), Fault> {
        let mut are_owned = entries.iter().max().is_none_or(|last| last.0 < self.blocks);
        for group in entries.chunks(GROUP) {
            are_owned &= match as_run(group) {
                Some((region, offsets)) => {
                    let counted = self.region(region);
                    counted.is_some_and(|counted| counted.are_owned(offsets))
                }
                // All of them, so that processors have nothing to guess.
                None => group
                    .iter()
                    .fold(true, |all, pba| all & self.is_owned(*pba)),
            };
        }
        if are_owned {
            return Ok(());
        }
        // One by one: some may be damaged, or their counts are not in memory, or very large.
        let mapped = entries.iter().filter(|pba| pba.0 > 0);
        mapped
            .map(|pba| self.referenced(*pba))
            .try_for_each(|found| found.map(drop))
    }

    /// Whether a block is none or has an owner. False also where that takes a closer look.
    fn is_owned(&self, pba: Pba) -> bool {
        let (region, offset) = place(pba);
        let counted = self.region(region);
        pba.0 == 0 || counted.is_some_and(|counted| counted.are_owned(offset..offset + 1))
    }

    /// One more owner for each block that a leaf maps to, whose counts are loaded.
    pub(crate) fn retain_all(&mut self, entries: &[Pba]) {
        for group in entries.chunks(GROUP) {
            if let Some((region, offsets)) = as_run(group) {
                self.region_mut(region).add_all(offsets);
            } else {
                let mapped = group.iter().filter(|pba| pba.0 > 0);
                mapped.for_each(|pba| self.retain(*pba));
            }
        }
    }

    /// One owner less for each block that a leaf maps to, whose counts are loaded. See [`SpaceMap::release`].
    pub(crate) fn release_all(&mut self, entries: &[Pba], seq: Option<Seq>) {
        for group in entries.chunks(GROUP) {
            let is_done = as_run(group)
                .is_some_and(|(region, offsets)| self.region_mut(region).subtract_all(offsets));
            if !is_done {
                let mapped = group.iter().filter(|pba| pba.0 > 0);
                mapped.for_each(|pba| self.release(*pba, seq));
            }
        }
    }
}

/// The region that all blocks of a group are in, and where, if they lie one after the other.
fn as_run(group: &[Pba]) -> Option<(u64, Range<usize>)> {
    let first = *group.first().filter(|first| first.0 > 0)?;
    let is_run = group
        .iter()
        .zip(first.0..)
        .fold(true, |all, (pba, next)| all & pba.0.eq(&next));
    let (region, offset) = place(first);
    let end = offset + group.len();
    (is_run && end as u64 <= REGION_BLOCKS).then_some((region, offset..end))
}
