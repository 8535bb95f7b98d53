//! A device in memory for the rows that are about the processor. Blocks of zeros take no room: the data of the scenes is
//! zeros, so only what the engine writes of its own is kept.

use blockfork::device::Device;
use blockfork::error::Result;
use blockfork::units::{BLOCK_BYTES, BLOCK_LEN};
use rustc_hash::FxHashMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// A bit for each block that is kept: so reading data costs the same however many pages there are.
    kept: Vec<AtomicU64>,
}

impl Ram {
    /// A device of so many blocks of zeros.
    pub(super) fn new(blocks: u64) -> Self {
        let words = usize::try_from(blocks.div_ceil(64)).expect("it fits memory");
        Self {
            kept: (0..words).map(|_| AtomicU64::new(0)).collect(),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        }
    }

    fn shard(&self, block: u64) -> &RwLock<Shard> {
        let index = usize::try_from(block / SHARD_BLOCKS % SHARDS as u64).unwrap_or(0);
        &self.shards[index]
    }

    fn bit(&self, block: u64) -> (&AtomicU64, u64) {
        let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
        (&self.kept[word], 1 << (block % 64))
    }

    fn is_kept(&self, block: u64) -> bool {
        let (word, bit) = self.bit(block);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Makes a block zeros.
    fn drop_block(&self, block: u64) {
        if self.is_kept(block) {
            let mut shard = self.shard(block).write().expect("no writer panicked");
            shard.remove(&block);
            let (word, bit) = self.bit(block);
            word.fetch_and(!bit, Ordering::Relaxed);
        }
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
            if self.is_kept(block) {
                let shard = self.shard(block).read().expect("no writer panicked");
                if let Some(page) = shard.get(&block) {
                    to.copy_from_slice(&**page);
                    continue;
                }
            }
            to.fill(0);
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        for (block, from) in (first_block(offset)..).zip(buffer.chunks_exact(BLOCK_LEN)) {
            // Whatever the engine writes of its own begins with a magic number.
            if from.starts_with(&[0; 8]) {
                self.drop_block(block);
                continue;
            }
            let mut shard = self.shard(block).write().expect("no writer panicked");
            let page = shard
                .entry(block)
                .or_insert_with(|| Box::new([0; BLOCK_LEN]));
            page.copy_from_slice(from);
            let (word, bit) = self.bit(block);
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let first = first_block(offset);
        (first..first + bytes / BLOCK_BYTES).for_each(|block| self.drop_block(block));
        Ok(())
    }
}
