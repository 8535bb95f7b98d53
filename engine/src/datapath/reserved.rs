//! New blocks for a write: reserved, written, then mapped, a record for each leaf.

use super::Io;
use crate::error::Result;
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::record::Record;
use crate::journal::{Draft, Ledger};
use crate::space::{Fault, SpaceMap};
use crate::units::{Extent, Lba, Pba, VolumeId};

/// Blocks beside each other that stay together when a snapshot shares them and they are written one by one: as many as
/// XFS keeps together by default where it copies on write (`cowextsize`), 128 KiB. See
/// `docs/decisions/redirected-neighbours-stay-together.md`.
const GROUP_BLOCKS: u64 = GROUP_LEN as u64;
const GROUP_LEN: usize = 32;
const _: () = assert!(LEAF_ENTRIES.is_multiple_of(GROUP_LEN));

/// Blocks that no map names yet. Dropped, it gives back those that none names by then.
#[derive(Debug)]
pub(crate) struct Reserved<'a> {
    ledger: &'a Ledger,
    volume: VolumeId,
    /// What is still to be mapped, and where.
    lba: Lba,
    rest: Extent,
}

impl<'a, D> Io<'a, D> {
    /// Takes a free run of up to `want` blocks for those from `lba` on: beside what the volume wrote last, or, for a few
    /// blocks that a snapshot shares, where their neighbours were redirected to.
    pub(super) fn reserve(
        &self,
        draft: &mut Draft<'_>,
        lba: Lba,
        want: u64,
        is_shared: bool,
    ) -> Result<Extent, Fault> {
        let metadata = draft.metadata();
        let volume = metadata.catalog.get(self.volume)?;
        let (goal, root) = (volume.goal, volume.entry.root);
        let want = metadata.grant(self.volume, want, is_shared)?;
        let slot = lba.0 % GROUP_BLOCKS;
        let (extent, next) = if !is_shared || slot + want > GROUP_BLOCKS {
            let extent = metadata.space.reserve(goal, want)?;
            (extent, extent.end())
        } else {
            let first = Lba(lba.0 - slot);
            let group = metadata.map.neighbours(root, first, GROUP_LEN)?;
            if let Some(extent) = beside(&mut metadata.space, group.unwrap_or(&[]), slot, want) {
                return Ok(extent);
            }
            metadata
                .space
                .reserve_within(goal, GROUP_BLOCKS, slot, want)?
        };
        if let Some(volume) = metadata.catalog.get_unsaved(self.volume) {
            volume.goal = next;
        }
        Ok(extent)
    }

    /// What [`Io::reserve`] took, for the blocks from `lba`.
    pub(super) fn reserved(&self, lba: Lba, extent: Extent) -> Reserved<'a> {
        Reserved {
            ledger: self.ledger,
            volume: self.volume,
            lba,
            rest: extent,
        }
    }
}

impl Reserved<'_> {
    /// The next record, and the first block that it maps; none when all is mapped.
    pub(super) fn next(&self) -> Option<(Record, Lba)> {
        let count = self.next_count();
        let record = Record::Map {
            volume: self.volume,
            lba: self.lba,
            pba: self.rest.start,
            count,
        };
        (count > 0).then_some((record, self.lba))
    }

    fn next_count(&self) -> u64 {
        let until_leaf_end = LEAF_ENTRIES as u64 - self.lba.0 % LEAF_ENTRIES as u64;
        until_leaf_end.min(self.rest.count)
    }

    /// The next record was applied.
    pub(super) fn advance(&mut self) {
        let count = self.next_count();
        self.lba = self.lba.plus(count);
        self.rest = Extent::new(self.rest.start.plus(count), self.rest.count - count);
    }

    /// Where the blocks are on the device, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.rest.start.offset()
    }

    /// Maps the blocks, whose data is on the device, if nothing is missing for that; whether it did.
    pub(crate) fn publish(mut self) -> bool {
        while let Some((record, _)) = self.next() {
            if self
                .ledger
                .change_now(|draft| draft.apply(&record))
                .is_none()
            {
                return false;
            }
            self.advance();
        }
        true
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.rest.count > 0 {
            let rest = self.rest;
            self.ledger.adjust(|metadata| metadata.space.cancel(rest));
        }
    }
}

/// Takes `want` blocks in a place where one of the group's others lies at the distance that it has in the volume.
fn beside(space: &mut SpaceMap, group: &[Pba], slot: u64, want: u64) -> Option<Extent> {
    // Mostly there are two: where the snapshot has the group, and where it is redirected to. 0 is none: no block of a group
    // is the first of the pool.
    let mut tried = [0; 2];
    for (index, entry) in (0..).zip(group) {
        // Where the group would begin if it lay whole around this block.
        let begin = entry.0.wrapping_sub(index);
        if tried.contains(&begin) || entry.0 <= index {
            continue;
        }
        tried = [begin, tried[0]];
        let taken = space.reserve_at(Pba(begin).plus(slot), want);
        if taken.is_some() {
            return taken;
        }
    }
    None
}
