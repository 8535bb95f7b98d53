//! Discarding and zeroing: whole blocks lose their mapping and so read as zeros; what others share only loses one
//! owner. Nothing that was released is reused before a checkpoint and the gate allow it, so a write that is still on
//! its way to a discarded block does no harm.

use super::Io;
use crate::device::{BlockBuf, Device};
use crate::error::Result;
use crate::format::record::Record;
use crate::metadata::Prepared;
use crate::units::{BLOCK_BYTES, Lba};

/// Zeros are written in runs of this many blocks where space is to stay allocated.
const ZERO_RUN_BLOCKS: u64 = 64;

impl<D: Device> Io<'_, D> {
    /// Unmaps the whole blocks of a byte range.
    pub(crate) async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.ledger.check_poison()?;
        let first = offset.div_ceil(BLOCK_BYTES);
        let end = (offset + bytes) / BLOCK_BYTES;
        let done = self.unmap(Lba(first), Lba(end)).await;
        done.map_err(|error| self.name_volume(error))
    }

    /// Zeroes a byte range; `keep_space`: its blocks stay, or become, allocated. For partial blocks, the caller keeps
    /// other writers of the block away.
    pub(crate) async fn write_zeroes(
        &self,
        offset: u64,
        bytes: u64,
        keep_space: bool,
    ) -> Result<()> {
        let end = offset + bytes;
        let (first_whole, end_whole) = (
            offset.next_multiple_of(BLOCK_BYTES),
            end / BLOCK_BYTES * BLOCK_BYTES,
        );
        if first_whole >= end_whole {
            return self.write_zero_bytes(offset, end).await;
        }
        self.write_zero_bytes(offset, first_whole).await?;
        if keep_space {
            self.write_zero_bytes(first_whole, end_whole).await?;
        } else {
            self.discard(first_whole, end_whole - first_whole).await?;
        }
        self.write_zero_bytes(end_whole, end).await
    }

    async fn write_zero_bytes(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        if at >= to {
            return Ok(());
        }
        let run = (to - from).min(ZERO_RUN_BLOCKS * BLOCK_BYTES);
        let zeros = BlockBuf::zeroed(usize::try_from(run.div_ceil(BLOCK_BYTES)).unwrap_or(1));
        while at < to {
            let bytes = run.min(to - at);
            self.write(at, &zeros[..usize::try_from(bytes).unwrap_or(0)])
                .await?;
            at += bytes;
        }
        Ok(())
    }

    /// Unmaps the blocks from `from` to `end`, step by step; other requests go on between.
    pub(crate) async fn unmap(&self, mut from: Lba, end: Lba) -> Result<()> {
        while from < end {
            from = self
                .change(|draft| {
                    let rest = Record::Unmap {
                        volume: self.volume,
                        lba: from,
                        count: end.0 - from.0,
                    };
                    let prepared = draft.metadata().prepare(&rest)?;
                    let Prepared::Unmap(step) = prepared else {
                        return Ok(end);
                    };
                    if let Some((lba, count)) = step.unmapped() {
                        let record = Record::Unmap {
                            volume: self.volume,
                            lba,
                            count,
                        };
                        draft.apply_prepared(&record, prepared, false)?;
                    }
                    Ok(step.end())
                })
                .await
                .map_err(|error| error.at_lba(from))?;
        }
        Ok(())
    }
}
