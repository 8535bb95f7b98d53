//! Reading: look up, read what is mapped, zero what is not.

use super::Io;
use crate::device::{BlockBuf, Device};
use crate::error::Result;
use crate::map::Resolved;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Lba};

impl<D: Device> Io<'_, D> {
    /// Fills `buffer` from byte `offset`.
    pub(crate) async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && buffer.len().is_multiple_of(BLOCK_LEN);
        let done = if is_whole {
            self.read_blocks(Lba(offset / BLOCK_BYTES), buffer).await
        } else {
            self.read_partial(offset, buffer).await
        };
        done.map_err(|error| self.name_volume(error))
    }

    /// Reads the blocks around the range and copies out what was asked for.
    async fn read_partial(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let first = offset / BLOCK_BYTES;
        let end = (offset + buffer.len() as u64).div_ceil(BLOCK_BYTES);
        let mut blocks = BlockBuf::zeroed(usize::try_from(end - first).unwrap_or(usize::MAX));
        self.read_blocks(Lba(first), &mut blocks).await?;
        let skip = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        buffer.copy_from_slice(&blocks[skip..skip + buffer.len()]);
        Ok(())
    }

    /// Fills `buffer`, whole blocks, from `lba`.
    pub(super) async fn read_blocks(&self, mut lba: Lba, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            let max = (buffer.len() / BLOCK_LEN) as u64;
            let (resolved, ticket) = self
                .ledger
                .view(self.device, |metadata| {
                    let root = metadata.catalog.get(self.volume)?.entry.root;
                    let resolved = metadata.map.resolve(root, lba, max)?;
                    Ok((resolved, self.ledger.gate.enter()))
                })
                .await?;
            let count = match resolved {
                Resolved::Hole(count) => count,
                Resolved::Mapped(extent) => extent.count,
            };
            let (now, later) =
                buffer.split_at_mut(usize::try_from(count).unwrap_or(usize::MAX) * BLOCK_LEN);
            match resolved {
                Resolved::Hole(_) => now.fill(0),
                Resolved::Mapped(extent) => {
                    let read = self.device.read(extent.start.offset(), now).await;
                    read.map_err(|error| error.at_lba(lba))?;
                }
            }
            drop(ticket);
            lba = lba.plus(count);
            buffer = later;
        }
        Ok(())
    }
}
