//! Where the bytes of a request are: in memory of this process, or in pages of the client that only the kernel reaches.

use super::Device;
use crate::error::Result;
use std::ops::Range;

/// What a write takes its bytes from.
#[expect(
    async_fn_in_trait,
    reason = "each thread drives its own futures; none crosses threads"
)]
pub trait Source<D> {
    /// How many bytes there are.
    fn size(&self) -> usize;

    /// Writes a part of them to the device, at byte `offset`.
    async fn store(&self, device: &D, part: Range<usize>, offset: u64) -> Result<()>;

    /// Copies the first of them into `buffer`, as many as it takes.
    async fn copy_to(&self, device: &D, buffer: &mut [u8]) -> Result<()>;
}

/// What a read fills.
#[expect(
    async_fn_in_trait,
    reason = "each thread drives its own futures; none crosses threads"
)]
pub trait Destination<D> {
    /// How many bytes are to be filled.
    fn size(&self) -> usize;

    /// Fills a part with what the device holds at byte `offset`.
    async fn load(&mut self, device: &D, part: Range<usize>, offset: u64) -> Result<()>;

    /// Fills a part with zeros.
    async fn zero(&mut self, device: &D, part: Range<usize>) -> Result<()>;

    /// Fills the beginning with a copy of `buffer`.
    async fn copy_from(&mut self, device: &D, buffer: &[u8]) -> Result<()>;
}

impl<D: Device, B: AsRef<[u8]> + ?Sized> Source<D> for B {
    fn size(&self) -> usize {
        self.as_ref().len()
    }

    async fn store(&self, device: &D, part: Range<usize>, offset: u64) -> Result<()> {
        device.write(offset, &self.as_ref()[part]).await
    }

    async fn copy_to(&self, _device: &D, buffer: &mut [u8]) -> Result<()> {
        buffer.copy_from_slice(&self.as_ref()[..buffer.len()]);
        Ok(())
    }
}

impl<D: Device, B: AsRef<[u8]> + AsMut<[u8]> + ?Sized> Destination<D> for B {
    fn size(&self) -> usize {
        self.as_ref().len()
    }

    async fn load(&mut self, device: &D, part: Range<usize>, offset: u64) -> Result<()> {
        device.read(offset, &mut self.as_mut()[part]).await
    }

    async fn zero(&mut self, _device: &D, part: Range<usize>) -> Result<()> {
        self.as_mut()[part].fill(0);
        Ok(())
    }

    async fn copy_from(&mut self, _device: &D, buffer: &[u8]) -> Result<()> {
        self.as_mut()[..buffer.len()].copy_from_slice(buffer);
        Ok(())
    }
}
