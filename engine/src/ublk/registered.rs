//! The pages of a client's request, registered with the queue's ring by the driver: the kernel moves bytes between them
//! and files, and none passes through this process.
//!
//! What the engine has to see or make itself, the parts of a block and zeros, goes through two files: a file in memory, and
//! `/dev/zero`.

use super::ring_device::{POOL_FILE, RingDevice, SCRATCH_FILE, ZERO_FILE};
use crate::device::{Destination, Source};
use crate::error::{Error, Result};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// What the files are registered for; shared by a device's queues.
#[derive(Debug)]
pub(super) struct Helpers {
    /// Reads as zeros.
    pub(super) zeros: File,
    /// In memory; each tag of each queue has its own part.
    pub(super) scratch: File,
}

impl Helpers {
    pub(super) fn open() -> Result<Self> {
        const ZEROS: &str = "/dev/zero";
        let failed = |name: &str, e| Error::io(e, format!("{name}: cannot be opened"));
        let scratch = rustix::fs::memfd_create("blockfork-scratch", MemfdFlags::CLOEXEC)
            .map_err(|e| failed("a file in memory", io::Error::from(e)))?;
        Ok(Self {
            zeros: File::open(ZEROS).map_err(|e| failed(ZEROS, e))?,
            scratch: scratch.into(),
        })
    }
}

/// The pages of one request.
#[derive(Debug)]
pub(super) struct Registered<'a> {
    /// Their place in the ring's table of buffers: the tag.
    pub(super) index: u16,
    pub(super) bytes: usize,
    pub(super) scratch: &'a File,
    /// Where the tag's part of it begins; as long as the longest request.
    pub(super) scratch_at: u64,
}

impl Registered<'_> {
    fn scratch_failed(error: io::Error) -> Error {
        Error::io(error, "the file in memory for parts of blocks")
    }
}

impl Source<RingDevice> for Registered<'_> {
    fn size(&self) -> usize {
        self.bytes
    }

    async fn store(&self, device: &RingDevice, part: Range<usize>, offset: u64) -> Result<()> {
        device
            .store_registered(POOL_FILE, self.index, part, offset)
            .await
    }

    async fn copy_to(&self, device: &RingDevice, buffer: &mut [u8]) -> Result<()> {
        device
            .store_registered(SCRATCH_FILE, self.index, 0..buffer.len(), self.scratch_at)
            .await?;
        (self.scratch.read_exact_at(buffer, self.scratch_at)).map_err(Self::scratch_failed)
    }
}

impl Destination<RingDevice> for Registered<'_> {
    fn size(&self) -> usize {
        self.bytes
    }

    async fn load(&mut self, device: &RingDevice, part: Range<usize>, offset: u64) -> Result<()> {
        device
            .fill_registered(POOL_FILE, self.index, part, offset)
            .await
    }

    async fn zero(&mut self, device: &RingDevice, part: Range<usize>) -> Result<()> {
        device.fill_registered(ZERO_FILE, self.index, part, 0).await
    }

    async fn copy_from(&mut self, device: &RingDevice, buffer: &[u8]) -> Result<()> {
        (self.scratch.write_all_at(buffer, self.scratch_at)).map_err(Self::scratch_failed)?;
        device
            .fill_registered(SCRATCH_FILE, self.index, 0..buffer.len(), self.scratch_at)
            .await
    }
}
