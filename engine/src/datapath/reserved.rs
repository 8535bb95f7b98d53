//! New blocks for a write: reserved, written, then mapped, a record for each leaf.

use super::Io;
use crate::error::Result;
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::record::Record;
use crate::journal::{Draft, Ledger};
use crate::space::Fault;
use crate::units::{Extent, Lba, VolumeId};

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
    /// Takes a free run of up to `want` blocks, behind the volume's last one if that goes.
    pub(super) fn reserve(&self, draft: &mut Draft<'_>, want: u64) -> Result<Extent, Fault> {
        let metadata = draft.metadata();
        let goal = metadata.catalog.get(self.volume)?.goal;
        let extent = metadata.space.reserve(goal, want)?;
        if let Some(volume) = metadata.catalog.get_unsaved(self.volume) {
            volume.goal = extent.end();
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
