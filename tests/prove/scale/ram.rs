//! A device in memory for the rows that are about the processor. Blocks of zeros take no room: the data of the scenes is
//! zeros, so only what the engine writes of its own is kept.

use blockfork::device::Device;
use blockfork::error::Result;
use blockfork::units::{BLOCK_BYTES, BLOCK_LEN};
use rustc_hash::FxHashMap;
use std::sync::RwLock;

/// Neighbours are in one shard.
const SHARDS: usize = 256;
const SHARD_BLOCKS: u64 = 64;
/// Where the header of a metadata page has its kind, and the kinds of count pages; see docs/format.md.
const KIND_AT: usize = 40;
const COUNT_KINDS: [u8; 3] = [2, 3, 4];

type Shard = FxHashMap<u64, Box<[u8; BLOCK_LEN]>>;

/// The device.
#[derive(Debug)]
pub(super) struct Ram {
    shards: Vec<RwLock<Shard>>,
}

impl Ram {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        }
    }

    fn shard(&self, block: u64) -> &RwLock<Shard> {
        let index = usize::try_from(block / SHARD_BLOCKS % SHARDS as u64).unwrap_or(0);
        &self.shards[index]
    }

    /// Count pages and the pages above them. They stand at fixed places, which the pool counts as used whether they were
    /// ever written or not.
    pub(super) fn count_pages(&self) -> u64 {
        let is_counts = |page: &[u8; BLOCK_LEN]| {
            page.starts_with(b"BFpg") && COUNT_KINDS.contains(&page[KIND_AT])
        };
        let shards = self.shards.iter().map(|shard| {
            let shard = shard.read().expect("no writer panicked");
            shard.values().filter(|page| is_counts(page)).count() as u64
        });
        shards.sum()
    }
}

fn first_block(offset: u64) -> u64 {
    assert!(offset.is_multiple_of(BLOCK_BYTES), "whole blocks only");
    offset / BLOCK_BYTES
}

impl Device for Ram {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        for (block, to) in (first_block(offset)..).zip(buffer.chunks_exact_mut(BLOCK_LEN)) {
            let shard = self.shard(block).read().expect("no writer panicked");
            match shard.get(&block) {
                Some(page) => to.copy_from_slice(&**page),
                None => to.fill(0),
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        for (block, from) in (first_block(offset)..).zip(buffer.chunks_exact(BLOCK_LEN)) {
            let mut shard = self.shard(block).write().expect("no writer panicked");
            // Whatever the engine writes of its own begins with a magic number.
            if from.starts_with(&[0; 8]) {
                shard.remove(&block);
            } else {
                let page = shard
                    .entry(block)
                    .or_insert_with(|| Box::new([0; BLOCK_LEN]));
                page.copy_from_slice(from);
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let first = first_block(offset);
        for block in first..first + bytes / BLOCK_BYTES {
            let mut shard = self.shard(block).write().expect("no writer panicked");
            shard.remove(&block);
        }
        Ok(())
    }
}
