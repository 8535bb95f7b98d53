//! The pool's storage below the engine: byte ranges read, written, flushed and discarded, asynchronously.
//! This is the one seam that tests replace. Everything above it is deterministic.

mod backing;
pub mod buffer;
pub mod file;
#[cfg(test)]
pub(crate) mod memory;
pub mod payload;
mod place;
pub mod whole;

pub use buffer::BlockBuf;
pub use file::{Access, FileDevice, PoolFile};
pub use payload::{Destination, Source};
pub use place::Place;
pub use whole::SystemCalls;

use crate::error::Result;
use std::time::Duration;

/// A pool's storage, as one thread uses it.
///
/// A future that was polled once must be driven to its end: the kernel may be using its buffer.
#[expect(
    async_fn_in_trait,
    reason = "each thread drives its own futures; none crosses threads"
)]
pub trait Device {
    /// Fills `buffer` with the bytes from `offset`. Both are multiples of 512; the buffer is aligned to 512.
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Fills each of these blocks with the bytes from its offset, many at a time where that is faster; which of them it
    /// could. Why not is told by [`Device::read`].
    async fn read_blocks(&self, blocks: &mut [(u64, BlockBuf)]) -> Vec<bool> {
        read_one_by_one(self, blocks).await
    }

    /// Writes the whole of `buffer` at `offset`; volatile until a [`Device::flush`] that starts after this ended.
    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()>;

    /// Makes every write that ended before this call durable.
    async fn flush(&self) -> Result<()>;

    /// Says that the bytes are not needed any more; what they read as afterwards is unspecified.
    async fn discard(&self, offset: u64, bytes: u64) -> Result<()>;

    /// Lets time pass without keeping this thread's other futures up. At once where nobody gains by waiting.
    async fn pause(&self, _duration: Duration) {}

    /// Gives the bytes from `offset` their room in the file system below, so that writing them cannot lack it. Success
    /// also where that cannot be had in advance.
    fn allocate(&self, _offset: u64, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// Keeps so much room of the file system below back, for [`Device::release_ballast`] to give. Whether it is kept.
    fn hold_ballast(&self, _bytes: u64) -> bool {
        false
    }

    /// Gives the room that was kept back to whoever writes next.
    fn release_ballast(&self) {}
}

async fn read_one_by_one<D: Device + ?Sized>(
    device: &D,
    blocks: &mut [(u64, BlockBuf)],
) -> Vec<bool> {
    let mut done = Vec::with_capacity(blocks.len());
    for (offset, block) in blocks {
        done.push(device.read(*offset, block).await.is_ok());
    }
    done
}
