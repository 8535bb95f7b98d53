//! The axes of the engine, one type each: a block of a volume, a block of the pool, a run of blocks, an order.
//! Types that differ cannot be swapped silently; arithmetic that could leave the axis goes through methods.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a block: the unit of mapping, allocation and metadata.
pub const BLOCK_BYTES: u64 = 4096;
/// [`BLOCK_BYTES`] as a buffer length.
pub const BLOCK_LEN: usize = 4096;
/// Bytes in a sector as the kernel counts them, whatever a device's logical sector is.
pub const SECTOR_BYTES: u64 = 512;

/// A block of a volume (logical block address).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba(pub u64);

/// A block of the pool (physical block address). Block 0 holds a superblock, so no mapping ever names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pba(pub u64);

/// A run of `count` pool blocks from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// The first block.
    pub start: Pba,
    /// How many blocks.
    pub count: u64,
}

/// The number of a checkpoint; a metadata page carries that of the checkpoint that writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// The number of a journal record, ascending by one without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

/// The number of a volume or a snapshot within its pool; never used twice.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VolumeId(pub u64);

/// The identity of a pool, drawn at random when it is created.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PoolId(pub [u8; 16]);

/// The id that a pool's metadata pages and journal blocks carry. It equals the pool's id until the pool gets another id:
/// its pages are not rewritten for that, so they keep this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct MetadataId(pub(crate) [u8; 16]);

/// Nanoseconds since the Unix epoch.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Lba {
    /// The block `count` further on.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl Pba {
    /// The byte at which this block begins in the pool.
    pub fn offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }

    /// The block `count` further on.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl Extent {
    /// A run of `count` blocks from `start`.
    pub fn new(start: Pba, count: u64) -> Self {
        Self { start, count }
    }

    /// The first block after the run.
    pub fn end(self) -> Pba {
        self.start.plus(self.count)
    }

    /// The blocks of the run in order.
    pub fn blocks(self) -> impl Iterator<Item = Pba> {
        (self.start.0..self.start.0 + self.count).map(Pba)
    }
}

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Seq {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

impl fmt::Display for Pba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool block {}", self.0)
    }
}

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolId({self})")
    }
}
