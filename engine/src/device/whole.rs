//! Whole transfers out of single system calls, which the kernel may cut short, interrupt or put off.

use super::{BlockBuf, Device};
use crate::error::{Error, Result};
use std::io;
use std::path::Path;
use std::time::Duration;

/// How often the kernel may put one transfer off before that counts as an error.
const RETRIES_MAX: u32 = 1000;

/// The system calls of a pool file, each tried once; [`Device`] is built on them for whoever has them.
#[expect(
    async_fn_in_trait,
    reason = "each thread drives its own futures; none crosses threads"
)]
pub trait SystemCalls {
    /// The pool file, for messages.
    fn path(&self) -> &Path;

    /// `pread(2)`: fills a part of `buffer`, 0 bytes at the end of the file.
    async fn read_once(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// `pread(2)` of each of these blocks, many at a time; which of them were read as wholes. None where that is no faster
    /// than one after the other.
    fn read_together(&self, _blocks: &mut [(u64, BlockBuf)]) -> Option<Vec<bool>> {
        None
    }

    /// `pwrite(2)`: writes a part of `buffer`.
    async fn write_once(&self, offset: u64, buffer: &[u8]) -> io::Result<usize>;

    /// `fdatasync(2)`.
    async fn sync_once(&self) -> io::Result<()>;

    /// Frees the bytes below; success also where the file system or the device cannot, since a discard is advice.
    async fn punch_once(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// `nanosleep(2)`; at once where nobody gains by waiting.
    async fn pause_once(&self, _duration: Duration) {}

    /// `fallocate(2)` within the file; success also where the file system has no such thing.
    fn allocate_once(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    /// `fallocate(2)` beyond the end of the file, which stays where it is. Whether there is something to give back.
    fn hold_once(&self, _bytes: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Frees what lies beyond the end of the file.
    fn release_once(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts how often an operation was put off.
struct Patience {
    left: u32,
}

impl Patience {
    fn new() -> Self {
        Self { left: RETRIES_MAX }
    }

    /// The result, or none if the call is to be made again.
    fn judge<T>(&mut self, result: io::Result<T>) -> io::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_put_off(&error) && self.left > 0 => {
                self.left -= 1;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

fn is_put_off(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

#[cold]
fn failed(path: &Path, source: io::Error, operation: &str, offset: u64) -> Error {
    Error::io(
        source,
        format!("{}: {operation} at byte {offset} failed", path.display()),
    )
}

#[cold]
fn truncated(path: &Path, offset: u64) -> Error {
    Error::corrupt(format!(
        "{}: ends before byte {offset}, which the pool uses; it was truncated",
        path.display()
    ))
}

/// Reads `bytes` from `offset` on, by as many calls of `once` as that takes: each is told how many bytes are there
/// already, and says how many it added.
pub(crate) async fn read_whole(
    path: &Path,
    offset: u64,
    bytes: usize,
    mut once: impl AsyncFnMut(usize) -> io::Result<usize>,
) -> Result<()> {
    let mut patience = Patience::new();
    let mut done = 0;
    while done < bytes {
        let at = offset + done as u64;
        let judged = patience.judge(once(done).await);
        match judged.map_err(|e| failed(path, e, "read", at))? {
            Some(0) => return Err(truncated(path, at)),
            Some(more) => done += more,
            None => {}
        }
    }
    Ok(())
}

/// Writes `bytes` from `offset` on, as [`read_whole`] reads.
pub(crate) async fn write_whole(
    path: &Path,
    offset: u64,
    bytes: usize,
    mut once: impl AsyncFnMut(usize) -> io::Result<usize>,
) -> Result<()> {
    let mut patience = Patience::new();
    let mut done = 0;
    while done < bytes {
        let at = offset + done as u64;
        let failed = |source| failed(path, source, "write", at);
        match patience.judge(once(done).await).map_err(failed)? {
            Some(0) => return Err(failed(io::ErrorKind::WriteZero.into())),
            Some(more) => done += more,
            None => {}
        }
    }
    Ok(())
}

impl<C: SystemCalls> Device for C {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_whole(self.path(), offset, buffer.len(), async |done| {
            let at = offset + done as u64;
            self.read_once(at, &mut buffer[done..]).await
        })
        .await
    }

    async fn read_blocks(&self, blocks: &mut [(u64, BlockBuf)]) -> Vec<bool> {
        if let Some(done) = self.read_together(blocks) {
            return done;
        }
        super::read_one_by_one(self, blocks).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        write_whole(self.path(), offset, buffer.len(), async |done| {
            let at = offset + done as u64;
            self.write_once(at, &buffer[done..]).await
        })
        .await
    }

    async fn flush(&self) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let judged = patience.judge(self.sync_once().await);
            if judged
                .map_err(|e| failed(self.path(), e, "flush", 0))?
                .is_some()
            {
                return Ok(());
            }
        }
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let judged = patience.judge(self.punch_once(offset, bytes).await);
            if judged
                .map_err(|e| failed(self.path(), e, "discard", offset))?
                .is_some()
            {
                return Ok(());
            }
        }
    }

    async fn pause(&self, duration: Duration) {
        self.pause_once(duration).await;
    }

    fn allocate(&self, offset: u64, bytes: u64) -> Result<()> {
        let mut patience = Patience::new();
        loop {
            let judged = patience.judge(self.allocate_once(offset, bytes));
            if judged
                .map_err(|e| failed(self.path(), e, "allocating", offset))?
                .is_some()
            {
                return Ok(());
            }
        }
    }

    fn hold_ballast(&self, bytes: u64) -> bool {
        self.hold_once(bytes).unwrap_or_else(|error| {
            tracing::debug!(%error, "no room of the file system below is kept back");
            false
        })
    }

    fn release_ballast(&self) {
        if let Err(error) = self.release_once() {
            tracing::debug!(%error, "what was kept back cannot be given");
        }
    }
}
