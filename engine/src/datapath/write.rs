//! Writing: look up; what is exclusive goes in place, anything else is redirected: reserve, write, remap, release.
//! Data reaches the device before any map names it, so after a crash a redirected block holds old bytes or new bytes.

use super::{Io, len};
use crate::device::{BlockBuf, Device, Source};
use crate::error::Result;
use crate::map::Mapping;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Lba};
use std::sync::atomic::Ordering;

impl<D: Device> Io<'_, D> {
    /// Writes `from` at byte `offset`. For a partial block, the caller keeps other writers of the block away.
    pub(crate) async fn write<S>(&self, offset: u64, from: &S) -> Result<()>
    where
        S: Source<D> + ?Sized,
    {
        self.ledger.check_poison()?;
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && from.size().is_multiple_of(BLOCK_LEN);
        let done = if is_whole {
            self.write_blocks(Lba(offset / BLOCK_BYTES), from).await
        } else {
            self.write_partial(offset, from).await
        };
        done.map_err(|error| self.name_volume(error))
    }

    /// Merges the range into the blocks around it.
    async fn write_partial<S>(&self, offset: u64, from: &S) -> Result<()>
    where
        S: Source<D> + ?Sized,
    {
        let bytes = from.size();
        let first = offset / BLOCK_BYTES;
        let end = (offset + bytes as u64).div_ceil(BLOCK_BYTES);
        let mut blocks = BlockBuf::zeroed(usize::try_from(end - first).unwrap_or(usize::MAX));
        let skip = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        let last = blocks.len() - BLOCK_LEN;
        // Only the first and the last block can be partial; those between are overwritten whole.
        self.read_blocks(Lba(first), &mut blocks[..BLOCK_LEN])
            .await?;
        if last > 0 {
            self.read_blocks(Lba(end - 1), &mut blocks[last..]).await?;
        }
        from.copy_to(self.device, &mut blocks[skip..skip + bytes])
            .await?;
        self.write_blocks(Lba(first), &blocks).await
    }

    /// Writes `from`, whole blocks, at `lba`.
    pub(super) async fn write_blocks<S>(&self, first: Lba, from: &S) -> Result<()>
    where
        S: Source<D> + ?Sized,
    {
        let blocks = (from.size() / BLOCK_LEN) as u64;
        let mut done = 0;
        while done < blocks {
            let lba = first.plus(done);
            let (mapping, ticket) = self
                .ledger
                .view(self.device, |metadata| {
                    self.locate(metadata, lba, blocks - done)
                })
                .await?;
            done += match mapping {
                Mapping::Exclusive(extent) => {
                    let part = len(done)..len(done + extent.count);
                    let written = from.store(self.device, part, extent.start.offset()).await;
                    drop(ticket);
                    written.map_err(|error| error.at_lba(lba))?;
                    self.counters
                        .in_place_blocks
                        .fetch_add(extent.count, Ordering::Relaxed);
                    extent.count
                }
                Mapping::Hole(count) => {
                    drop(ticket);
                    self.redirect(lba, from, done, count, false).await?
                }
                Mapping::Shared(count) => {
                    drop(ticket);
                    self.redirect(lba, from, done, count, true).await?
                }
            };
        }
        Ok(())
    }

    /// Writes as many of the `want` blocks of `from` behind its block `skip` as one free run takes to newly allocated
    /// blocks; how many that was.
    async fn redirect<S>(
        &self,
        lba: Lba,
        from: &S,
        skip: u64,
        want: u64,
        is_shared: bool,
    ) -> Result<u64>
    where
        S: Source<D> + ?Sized,
    {
        let extent = self
            .change(|draft| self.reserve(draft, lba, want, is_shared))
            .await
            .map_err(|error| error.at_lba(lba))?;
        let mut reserved = self.reserved(lba, extent);
        let part = len(skip)..len(skip + extent.count);
        let written = from.store(self.device, part, extent.start.offset()).await;
        written.map_err(|error| error.at_lba(lba))?;
        while let Some((record, at)) = reserved.next() {
            let mapped = self.change(|draft| draft.apply(&record)).await;
            mapped.map_err(|error| error.at_lba(at))?;
            reserved.advance();
        }
        self.counters
            .redirected_blocks
            .fetch_add(extent.count, Ordering::Relaxed);
        Ok(extent.count)
    }
}
