//! Reading: look up, read what is mapped, zero what is not.

use super::{Io, len};
use crate::device::{BlockBuf, Destination, Device};
use crate::error::Result;
use crate::map::Resolved;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Extent, Lba};

impl<D: Device> Io<'_, D> {
    /// Fills `to` from byte `offset`.
    pub(crate) async fn read<T>(&self, offset: u64, to: &mut T) -> Result<()>
    where
        T: Destination<D> + ?Sized,
    {
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && to.size().is_multiple_of(BLOCK_LEN);
        let done = if is_whole {
            self.read_blocks(Lba(offset / BLOCK_BYTES), to).await
        } else {
            self.read_partial(offset, to).await
        };
        done.map_err(|error| self.name_volume(error))
    }

    /// Reads the blocks around the range and copies out what was asked for.
    async fn read_partial<T>(&self, offset: u64, to: &mut T) -> Result<()>
    where
        T: Destination<D> + ?Sized,
    {
        let bytes = to.size();
        let first = offset / BLOCK_BYTES;
        let end = (offset + bytes as u64).div_ceil(BLOCK_BYTES);
        let mut blocks = BlockBuf::zeroed(usize::try_from(end - first).unwrap_or(usize::MAX));
        self.read_blocks(Lba(first), &mut blocks).await?;
        let skip = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        to.copy_from(self.device, &blocks[skip..skip + bytes]).await
    }

    /// Fills `to`, whole blocks, from `lba`.
    pub(super) async fn read_blocks<T>(&self, first: Lba, to: &mut T) -> Result<()>
    where
        T: Destination<D> + ?Sized,
    {
        let blocks = (to.size() / BLOCK_LEN) as u64;
        let mut done = 0;
        while done < blocks {
            let lba = first.plus(done);
            let (resolved, ticket) = self
                .ledger
                .view(self.device, |metadata| {
                    self.resolve(metadata, lba, blocks - done)
                })
                .await?;
            let (Resolved::Hole(count) | Resolved::Mapped(Extent { count, .. })) = resolved;
            let part = len(done)..len(done + count);
            match resolved {
                Resolved::Hole(_) => to.zero(self.device, part).await?,
                Resolved::Mapped(extent) => {
                    let read = to.load(self.device, part, extent.start.offset()).await;
                    read.map_err(|error| error.at_lba(lba))?;
                }
            }
            drop(ticket);
            done += count;
        }
        Ok(())
    }
}
