//! The pool file as a queue thread uses it: every operation is one entry of the thread's own ring, so that all of one
//! tick go to the kernel in one system call.
//!
//! Invariant: an operation that the kernel has is never forgotten. Its buffer belongs to the caller's frame, so a future
//! dropped meanwhile ends the process: the kernel would write into memory that is somebody else's by then.

use crate::device::{Device, PoolFile};
use crate::error::{Error, Result};
use io_uring::{opcode, squeue, types};
use libublk::UblkUringData;
use libublk::uring_async::ublk_submit_sqe_async;
use std::cell::Cell;
use std::io;
use std::sync::Arc;

/// Where the pool file stands in each queue's table of registered files; the device's own control file is 0.
const POOL_FILE: types::Fixed = types::Fixed(1);
/// The longest single transfer: what `read(2)` moves at most, down to a whole block.
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;
/// How often the kernel may put an operation off before that counts as an error.
const RETRIES_MAX: u32 = 1000;

/// The pool file on the calling thread's ring; of use only in a queue thread.
#[derive(Debug)]
pub(super) struct RingDevice {
    file: Arc<PoolFile>,
    can_punch: Cell<bool>,
}

/// Ends the process when it is dropped before the operation ended.
struct InFlight {
    has_ended: bool,
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
    let mut in_flight = InFlight { has_ended: false };
    let answer = ublk_submit_sqe_async(entry, UblkUringData::Target as u64).await;
    in_flight.has_ended = true;
    answer.unwrap_or(-libc::EIO)
}

/// Counts how often an operation was put off.
struct Patience {
    left: u32,
}

/// What became of one operation.
enum Outcome {
    /// It moved so many bytes.
    Moved(usize),
    /// It is to be sent again.
    Again,
}

impl Patience {
    fn new() -> Self {
        Self { left: RETRIES_MAX }
    }

    fn judge(&mut self, result: i32) -> io::Result<Outcome> {
        match usize::try_from(result) {
            Ok(bytes) => Ok(Outcome::Moved(bytes)),
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) && self.left > 0 => {
                self.left -= 1;
                Ok(Outcome::Again)
            }
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        }
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

    #[cold]
    fn failed(&self, source: io::Error, operation: &str, offset: u64) -> Error {
        Error::io(
            source,
            format!(
                "{}: {operation} at byte {offset} failed",
                self.file.path().display()
            ),
        )
    }

    #[cold]
    fn truncated(&self, offset: u64) -> Error {
        Error::corrupt(format!(
            "{}: ends before byte {offset}, which the pool uses; it was truncated",
            self.file.path().display()
        ))
    }
}

impl Device for RingDevice {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut patience = Patience::new();
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            let at = offset + done as u64;
            let entry = opcode::Read::new(POOL_FILE, rest.as_mut_ptr(), entry_length(rest.len()));
            let result = run_entry(entry.offset(at).build()).await;
            match patience
                .judge(result)
                .map_err(|e| self.failed(e, "read", at))?
            {
                Outcome::Moved(0) => return Err(self.truncated(at)),
                Outcome::Moved(bytes) => done += bytes,
                Outcome::Again => {}
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        let mut patience = Patience::new();
        let mut done = 0;
        while done < buffer.len() {
            let rest = &buffer[done..];
            let at = offset + done as u64;
            let entry = opcode::Write::new(POOL_FILE, rest.as_ptr(), entry_length(rest.len()));
            let result = run_entry(entry.offset(at).build()).await;
            match patience
                .judge(result)
                .map_err(|e| self.failed(e, "write", at))?
            {
                Outcome::Moved(0) => {
                    return Err(self.failed(io::ErrorKind::WriteZero.into(), "write", at));
                }
                Outcome::Moved(bytes) => done += bytes,
                Outcome::Again => {}
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let entry = opcode::Fsync::new(POOL_FILE).flags(types::FsyncFlags::DATASYNC);
            let result = run_entry(entry.build()).await;
            match patience
                .judge(result)
                .map_err(|e| self.failed(e, "flush", 0))?
            {
                Outcome::Moved(_) => return Ok(()),
                Outcome::Again => {}
            }
        }
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let mut patience = Patience::new();
        while self.can_punch.get() {
            let entry = opcode::Fallocate::new(POOL_FILE, bytes)
                .offset(offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
            let result = run_entry(entry.build()).await;
            if matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) {
                // A discard is advice: a file system or a device that cannot take it loses nothing.
                self.can_punch.set(false);
                break;
            }
            match patience
                .judge(result)
                .map_err(|e| self.failed(e, "discard", offset))?
            {
                Outcome::Moved(_) => break,
                Outcome::Again => {}
            }
        }
        Ok(())
    }
}
