//! Writing: look up; what is exclusive goes in place, anything else is redirected: reserve, write, remap, release.
//! Data reaches the device before any map names it, so after a crash a redirected block holds old bytes or new bytes.

use super::Io;
use crate::device::{BlockBuf, Device};
use crate::error::Result;
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::record::Record;
use crate::map::Mapping;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Extent, Lba};
use std::sync::atomic::Ordering;

impl<D: Device> Io<'_, D> {
    /// Writes `buffer` at byte `offset`. For a partial block, the caller keeps other writers of the block away.
    pub(crate) async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.ledger.check_poison()?;
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && buffer.len().is_multiple_of(BLOCK_LEN);
        let done = if is_whole {
            self.write_blocks(Lba(offset / BLOCK_BYTES), buffer).await
        } else {
            self.write_partial(offset, buffer).await
        };
        done.map_err(|error| self.name_volume(error))
    }

    /// Merges the range into the blocks around it.
    async fn write_partial(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        let first = offset / BLOCK_BYTES;
        let end = (offset + buffer.len() as u64).div_ceil(BLOCK_BYTES);
        let mut blocks = BlockBuf::zeroed(usize::try_from(end - first).unwrap_or(usize::MAX));
        let skip = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        let last = blocks.len() - BLOCK_LEN;
        // Only the first and the last block can be partial; those between are overwritten whole.
        self.read_blocks(Lba(first), &mut blocks[..BLOCK_LEN])
            .await?;
        if last > 0 {
            self.read_blocks(Lba(end - 1), &mut blocks[last..]).await?;
        }
        blocks[skip..skip + buffer.len()].copy_from_slice(buffer);
        self.write_blocks(Lba(first), &blocks).await
    }

    /// Writes `buffer`, whole blocks, at `lba`.
    pub(super) async fn write_blocks(&self, mut lba: Lba, mut buffer: &[u8]) -> Result<()> {
        while !buffer.is_empty() {
            let max = (buffer.len() / BLOCK_LEN) as u64;
            let (mapping, ticket) = self
                .ledger
                .view(self.device, |metadata| {
                    let root = metadata.catalog.get(self.volume)?.entry.root;
                    let mut mapping = metadata.map.lookup(&metadata.space, root, lba, max)?;
                    if let (Mapping::Exclusive(extent), true) = (mapping, self.redirects_always) {
                        mapping = Mapping::Shared(extent.count);
                    }
                    Ok((mapping, self.ledger.gate.enter()))
                })
                .await?;
            let count = match mapping {
                Mapping::Exclusive(extent) => {
                    let bytes = &buffer[..len(extent.count)];
                    let written = self.device.write(extent.start.offset(), bytes).await;
                    drop(ticket);
                    written.map_err(|error| error.at_lba(lba))?;
                    self.counters
                        .in_place_blocks
                        .fetch_add(extent.count, Ordering::Relaxed);
                    extent.count
                }
                Mapping::Hole(count) | Mapping::Shared(count) => {
                    drop(ticket);
                    self.redirect(lba, &buffer[..len(count)]).await?
                }
            };
            lba = lba.plus(count);
            buffer = &buffer[len(count)..];
        }
        Ok(())
    }

    /// Writes as many of the blocks as one free run takes to newly allocated blocks; how many that was.
    async fn redirect(&self, lba: Lba, buffer: &[u8]) -> Result<u64> {
        let want = (buffer.len() / BLOCK_LEN) as u64;
        let extent = self
            .change(|draft| {
                let metadata = draft.metadata();
                let goal = metadata.catalog.get(self.volume)?.goal;
                let extent = metadata.space.reserve(goal, want)?;
                if let Some(volume) = metadata.catalog.get_unsaved(self.volume) {
                    volume.goal = extent.end();
                }
                Ok(extent)
            })
            .await
            .map_err(|error| error.at_lba(lba))?;
        let written = self
            .device
            .write(extent.start.offset(), &buffer[..len(extent.count)])
            .await;
        if let Err(error) = written {
            self.ledger.adjust(|metadata| metadata.space.cancel(extent));
            return Err(error.at_lba(lba));
        }
        // One record a leaf.
        let mut done = 0;
        while done < extent.count {
            let at = lba.plus(done);
            let until_leaf_end = LEAF_ENTRIES as u64 - at.0 % LEAF_ENTRIES as u64;
            let run = Extent::new(
                extent.start.plus(done),
                until_leaf_end.min(extent.count - done),
            );
            let record = Record::Map {
                volume: self.volume,
                lba: at,
                pba: run.start,
                count: run.count,
            };
            if let Err(error) = self.change(|draft| draft.apply(&record)).await {
                let rest = Extent::new(run.start, extent.count - done);
                self.ledger.adjust(|metadata| metadata.space.cancel(rest));
                return Err(error.at_lba(at));
            }
            done += run.count;
        }
        self.counters
            .redirected_blocks
            .fetch_add(extent.count, Ordering::Relaxed);
        Ok(extent.count)
    }
}

fn len(blocks: u64) -> usize {
    usize::try_from(blocks)
        .unwrap_or(usize::MAX)
        .saturating_mul(BLOCK_LEN)
}
