//! The pool file as a queue thread uses it: every operation is one entry of the thread's own ring, so that all of one
//! tick go to the kernel in one system call.
//!
//! Invariant: an operation that the kernel has is never forgotten. Its buffer belongs to the caller's frame, so a future
//! dropped meanwhile ends the process: the kernel would write into memory that is somebody else's by then.

use crate::device::whole::{read_whole, write_whole};
use crate::device::{PoolFile, SystemCalls};
use crate::error::Result;
use io_uring::{opcode, squeue, types};
use libublk::UblkUringData;
use libublk::uring_async::ublk_submit_sqe_async;
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

/// Where the pool file stands in each queue's table of registered files; the device's own control file is 0.
pub(super) const POOL_FILE: types::Fixed = types::Fixed(1);
/// Where clients' pages are registered, `/dev/zero` and the file in memory stand there too.
pub(super) const ZERO_FILE: types::Fixed = types::Fixed(2);
pub(super) const SCRATCH_FILE: types::Fixed = types::Fixed(3);
/// The longest single transfer: what `read(2)` moves at most, down to a whole block.
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;

/// The pool file on the calling thread's ring; of use only in a queue thread.
#[derive(Debug)]
pub(super) struct RingDevice {
    file: Arc<PoolFile>,
    can_punch: Cell<bool>,
}

/// Ends the process when it is dropped before the operation ended.
#[derive(Debug)]
pub(super) struct InFlight {
    has_ended: bool,
}

impl InFlight {
    pub(super) fn begin() -> Self {
        Self { has_ended: false }
    }

    pub(super) fn end(mut self) {
        self.has_ended = true;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.has_ended {
            tracing::error!("an operation was abandoned while the kernel worked on it");
            std::process::abort();
        }
    }
}

/// Runs one entry on this thread's ring: its result, or a negative errno.
pub(super) async fn run_entry(entry: squeue::Entry) -> i32 {
    let in_flight = InFlight::begin();
    let answer = ublk_submit_sqe_async(entry, UblkUringData::Target as u64).await;
    in_flight.end();
    answer.unwrap_or(-libc::EIO)
}

/// What a completed entry says: a count, or an error.
fn outcome(result: i32) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(count) => Ok(count),
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    }
}

/// A length as an entry takes it.
fn entry_length(bytes: usize) -> u32 {
    u32::try_from(bytes.min(TRANSFER_BYTES_MAX)).unwrap_or(u32::MAX)
}

impl RingDevice {
    pub(super) fn new(file: Arc<PoolFile>) -> Self {
        Self {
            file,
            can_punch: Cell::new(true),
        }
    }

    /// Fills a part of registered pages from a file.
    pub(super) async fn fill_registered(
        &self,
        file: types::Fixed,
        index: u16,
        part: Range<usize>,
        offset: u64,
    ) -> Result<()> {
        read_whole(self.path(), offset, part.len(), async |done| {
            // For registered pages of a request an address is an offset among them.
            let place = ptr::without_provenance_mut(part.start + done);
            let entry = opcode::ReadFixed::new(file, place, entry_length(part.len() - done), index);
            let entry = entry.offset(offset + done as u64).build();
            outcome(run_entry(entry).await)
        })
        .await
    }

    /// Writes a part of registered pages to a file.
    pub(super) async fn store_registered(
        &self,
        file: types::Fixed,
        index: u16,
        part: Range<usize>,
        offset: u64,
    ) -> Result<()> {
        write_whole(self.path(), offset, part.len(), async |done| {
            let place = ptr::without_provenance(part.start + done);
            let length = entry_length(part.len() - done);
            let entry = opcode::WriteFixed::new(file, place, length, index);
            let entry = entry.offset(offset + done as u64).build();
            outcome(run_entry(entry).await)
        })
        .await
    }
}

/// Room is kept back and given by other threads: to change what a file occupies waits for direct I/O on it, which may in
/// turn wait for its own thread to take its completion.
impl SystemCalls for RingDevice {
    fn path(&self) -> &Path {
        self.file.path()
    }

    async fn read_once(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let entry = opcode::Read::new(POOL_FILE, buffer.as_mut_ptr(), entry_length(buffer.len()));
        outcome(run_entry(entry.offset(offset).build()).await)
    }

    async fn write_once(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        let entry = opcode::Write::new(POOL_FILE, buffer.as_ptr(), entry_length(buffer.len()));
        outcome(run_entry(entry.offset(offset).build()).await)
    }

    async fn sync_once(&self) -> io::Result<()> {
        let entry = opcode::Fsync::new(POOL_FILE).flags(types::FsyncFlags::DATASYNC);
        outcome(run_entry(entry.build()).await).map(drop)
    }

    async fn punch_once(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if !self.can_punch.get() {
            return Ok(());
        }
        let entry = opcode::Fallocate::new(POOL_FILE, bytes)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        let result = run_entry(entry.build()).await;
        if matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) {
            self.can_punch.set(false);
            return Ok(());
        }
        outcome(result).map(drop)
    }

    async fn pause_once(&self, duration: Duration) {
        let time = types::Timespec::from(duration);
        // Its end is an error, ETIME, and no other one would change what is to be done next.
        run_entry(opcode::Timeout::new(&raw const time).build()).await;
    }
}
