//! A pool's file or block device, opened exclusively, and blocking I/O on it.
//!
//! The lock belongs to the open file that carries the I/O, so it outlives a killed process for as long as the kernel
//! still works on what that process submitted: whoever gets the lock knows that nothing of the old owner can land.

#![expect(
    unsafe_code,
    reason = "flock, fallocate and the block-device ioctls have no safe wrapper in std"
)]

use super::place::{self, Place};
use super::{BlockBuf, SystemCalls, backing};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Mutex;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::process::{Resource, getrlimit};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How to open a pool's file.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// For writing, and so alone; otherwise shared with other readers.
    pub write: bool,
    /// How long to wait for a lock whose owner died with I/O under way, in milliseconds.
    pub lock_wait_ms: u64,
}

/// An open, locked pool file or block device.
#[derive(Debug)]
pub struct PoolFile {
    file: File,
    /// The locked file below a loop device.
    _below: Option<File>,
    path: PathBuf,
    bytes: u64,
    is_direct: bool,
    is_block_device: bool,
    is_writable: bool,
    sector_bytes: u64,
    /// Whoever changes the file's length, or relies on it for a moment.
    length: Mutex<()>,
}

const DIRECT_MEMORY_ALIGNMENT: u32 = 512;
/// Threads that read many blocks together. Disks do more at a time, but not much faster.
const READERS: usize = 16;
const LOCK_POLL: Duration = Duration::from_millis(20);

impl PoolFile {
    /// Opens `path` with `O_DIRECT`, or buffered where the file system refuses that, and locks it.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let shown = path.display();
        let metadata = std::fs::metadata(path)
            .map_err(|e| Error::io(e, format!("{shown}: cannot be opened")))?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.file_type().is_file() {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{shown}: neither a file nor a block device"),
            ));
        }
        // O_EXCL without O_CREAT claims a block device: it fails while a mount or another claim holds it.
        let claim = if is_block_device && access.write {
            libc::O_EXCL
        } else {
            0
        };
        if is_block_device && access.write {
            refuse_read_only_device(path)?;
        }
        let mut waited_ms = 0;
        let (file, below, is_direct) = loop {
            let attempt =
                open_direct_or_buffered(path, access.write, claim).and_then(|(file, is_direct)| {
                    let below = is_block_device.then(|| backing::open(&metadata)).flatten();
                    for file in below.iter().chain([&file]) {
                        lock(file, access.write)?;
                    }
                    Ok((file, below, is_direct))
                });
            match attempt {
                Ok(opened) => break opened,
                Err(e) if is_contention(&e) && waited_ms < access.lock_wait_ms => {
                    thread::sleep(LOCK_POLL);
                    waited_ms += 20;
                }
                Err(e) if is_contention(&e) => {
                    return Err(Error::with(
                        ErrorKind::Busy,
                        busy_message(path, &metadata, is_block_device),
                    ));
                }
                Err(e) => return Err(Error::io(e, format!("{shown}: cannot be opened"))),
            }
        };
        let (bytes, sector_bytes) = if is_block_device {
            (block_device_bytes(&file), block_device_sector(&file))
        } else {
            (file.metadata().map(|m| m.len()), Ok(SECTOR_BYTES))
        };
        let failed = |e| Error::io(e, format!("{shown}: its size cannot be read"));
        let bytes = bytes.map_err(failed)?;
        if access.write && !is_block_device {
            refuse_limited(path, bytes)?;
        }
        Ok(Self {
            bytes,
            sector_bytes: sector_bytes.map_err(failed)?,
            file,
            _below: below,
            path: path.to_owned(),
            is_direct,
            is_block_device,
            is_writable: access.write,
            length: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is still at its path. An error says that this cannot be seen.
    pub fn place(&self) -> io::Result<Place> {
        place::find(&self.file, &self.path)
    }

    /// Its size when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its size in whole blocks.
    pub fn blocks(&self) -> u64 {
        self.bytes / BLOCK_BYTES
    }

    /// Whether I/O goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// What the file asks of the memory that it is read into and written from, in bytes: a power of two up to a block.
    pub fn memory_alignment(&self) -> u32 {
        if !self.is_direct {
            return 1;
        }
        let told = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let bytes = told.map_or(0, |told| told.stx_dio_mem_align);
        if bytes.is_power_of_two() && u64::from(bytes) <= BLOCK_BYTES {
            return bytes;
        }
        // Kernels that do not tell ask for no more than a sector.
        DIRECT_MEMORY_ALIGNMENT
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Whether it is a block device rather than a file.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// The smallest unit of I/O, in bytes.
    pub fn sector_bytes(&self) -> u64 {
        self.sector_bytes
    }

    /// Sets the length of a file (not of a device) and makes that durable.
    pub fn set_bytes(&mut self, bytes: u64) -> Result<()> {
        let failed = |e| Error::io(e, format!("{}: cannot be resized", self.path.display()));
        self.file.set_len(bytes).map_err(failed)?;
        self.file.sync_all().map_err(failed)?;
        self.bytes = bytes;
        Ok(())
    }

    /// Makes a file at least so long; the next flush makes that durable. A device has to be so long already.
    pub fn extend(&self, bytes: u64) -> Result<()> {
        let failed = |e| Error::io(e, format!("{}: cannot be extended", self.path.display()));
        let _alone = self.length.lock();
        if self.is_block_device {
            let held = block_device_bytes(&self.file).map_err(failed)?;
            if bytes > held {
                return Err(Error::with(
                    ErrorKind::Invalid,
                    format!(
                        "{}: the device holds only {held} bytes; extend the device first",
                        self.path.display()
                    ),
                ));
            }
        } else if bytes > self.file.metadata().map_err(failed)?.len() {
            self.file.set_len(bytes).map_err(failed)?;
        }
        Ok(())
    }

    /// Gives a range its blocks in the file system, without a change of the file's length; success also where the file
    /// system cannot.
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.is_block_device {
            return Ok(());
        }
        unless_unsupported(self.fallocate(libc::FALLOC_FL_KEEP_SIZE, offset, bytes)).map(drop)
    }

    /// Keeps blocks of the file system back, beyond the end of the file. Whether it could.
    fn hold_ballast(&self, bytes: u64) -> io::Result<bool> {
        if self.is_block_device {
            return Ok(false);
        }
        let _alone = self.length.lock();
        let end = self.file.metadata()?.len();
        unless_unsupported(self.fallocate(libc::FALLOC_FL_KEEP_SIZE, end, bytes))
    }

    /// Frees the blocks beyond the end of the file.
    fn release_ballast(&self) -> io::Result<()> {
        if self.is_block_device {
            return Ok(());
        }
        let _alone = self.length.lock();
        // Setting the length that it has frees what lies behind it; to punch there does not on ext4.
        self.file.set_len(self.file.metadata()?.len())
    }

    fn fallocate(&self, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: fallocate takes integers; the descriptor is open.
        match unsafe { libc::fallocate(self.as_raw_fd(), mode, offset, bytes) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Whether it was done, where a file system or a device that has no such operation is no failure.
fn unless_unsupported(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) => match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS) => Ok(false),
            _ => Err(e),
        },
    }
}

impl AsRawFd for PoolFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open_direct_or_buffered(path: &Path, write: bool, claim: i32) -> io::Result<(File, bool)> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(path)
    };
    match open(claim | libc::O_DIRECT) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok((open(claim)?, false)),
        other => Ok((other?, true)),
    }
}

/// Refuses a block device that takes no writes. The kernel lets a process open such a device for writing, and refuses each
/// write later.
fn refuse_read_only_device(path: &Path) -> Result<()> {
    let shown = path.display();
    let device =
        File::open(path).map_err(|e| Error::io(e, format!("{shown}: cannot be opened")))?;
    let mut is_read_only: libc::c_int = 0;
    // SAFETY: the ioctl writes one int, to which the pointer leads.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut is_read_only) } {
        0 if is_read_only == 0 => Ok(()),
        0 => Err(Error::with(
            ErrorKind::ReadOnly,
            format!("{shown}: the device is read-only"),
        )),
        _ => Err(Error::io(
            io::Error::last_os_error(),
            format!("{shown}: whether it is read-only cannot be read"),
        )),
    }
}

/// Refuses a file of which this process may not write all: sooner or later a write of metadata would fail, after which
/// the pool takes no more writes at all.
fn refuse_limited(path: &Path, bytes: u64) -> Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if limit < bytes => Err(Error::with(
            ErrorKind::Permission,
            format!(
                "{}: has {bytes} bytes, and this process may write only the first {limit} of a file; raise that limit with `ulimit -f unlimited`, or as root",
                path.display()
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let operation = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: flock takes a descriptor and an integer; the descriptor is open.
    match unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_contention(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EWOULDBLOCK | libc::EBUSY))
}

/// Names the process that holds the lock, where `/proc/locks` tells.
fn busy_message(path: &Path, metadata: &std::fs::Metadata, is_block_device: bool) -> String {
    let shown = path.display();
    let inode = format!(":{}", metadata.ino());
    let holder = std::fs::read_to_string("/proc/locks")
        .ok()
        .and_then(|locks| {
            locks.lines().find_map(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                match fields.as_slice() {
                    [_, "FLOCK", _, _, pid, place, ..] if place.ends_with(&inode) => {
                        pid.parse::<u32>().ok()
                    }
                    _ => None,
                }
            })
        });
    match holder {
        Some(pid) => {
            format!("{shown}: in use by process {pid}; stop it, or talk to the pool through it")
        }
        None if is_block_device => {
            format!("{shown}: in use (mounted, or claimed by another process)")
        }
        None => format!("{shown}: in use by another process"),
    }
}

/// `BLKGETSIZE64` of `linux/fs.h`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `BLKROGET` of `linux/fs.h`.
const BLKROGET: libc::c_ulong = 0x125e;
/// `BLKSSZGET` of `linux/fs.h`.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// `BLKDISCARD` of `linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;

fn block_device_bytes(file: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the ioctl writes one u64, to which the pointer leads.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

fn block_device_sector(file: &File) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the ioctl writes one int, to which the pointer leads.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut bytes) } {
        0 => Ok(u64::try_from(bytes).unwrap_or(SECTOR_BYTES)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Blocking I/O on a pool file, for threads that have no ring.
#[derive(Clone, Debug)]
pub struct FileDevice {
    file: Arc<PoolFile>,
}

impl FileDevice {
    /// A device over `file`.
    pub fn new(file: Arc<PoolFile>) -> Self {
        Self { file }
    }

    /// The file below.
    pub fn file(&self) -> &Arc<PoolFile> {
        &self.file
    }
}

impl SystemCalls for FileDevice {
    fn path(&self) -> &Path {
        &self.file.path
    }

    async fn read_once(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.file.read_at(buffer, offset)
    }

    fn read_together(&self, blocks: &mut [(u64, BlockBuf)]) -> Option<Vec<bool>> {
        let file = &self.file.file;
        let each = blocks.len().div_ceil(READERS).max(1);
        Some(thread::scope(|scope| {
            let readers: Vec<_> = blocks
                .chunks_mut(each)
                .map(|part| {
                    let count = part.len();
                    let read = move |(offset, block): &mut (u64, BlockBuf)| {
                        file.read_exact_at(block, *offset).is_ok()
                    };
                    let work = move || part.iter_mut().map(read).collect::<Vec<_>>();
                    (count, thread::Builder::new().spawn_scoped(scope, work))
                })
                .collect();
            let done = readers.into_iter().flat_map(|(count, reader)| {
                let done = reader.ok().and_then(|reader| reader.join().ok());
                done.unwrap_or_else(|| vec![false; count])
            });
            done.collect()
        }))
    }

    async fn write_once(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        self.file.file.write_at(buffer, offset)
    }

    async fn sync_once(&self) -> io::Result<()> {
        self.file.file.sync_data()
    }

    async fn punch_once(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let punched = if self.file.is_block_device {
            let range = [offset, bytes];
            // SAFETY: the ioctl reads two u64, to which the pointer leads.
            match unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        } else {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            self.file.fallocate(mode, offset, bytes)
        };
        unless_unsupported(punched).map(drop)
    }

    async fn pause_once(&self, duration: Duration) {
        thread::sleep(duration);
    }

    fn allocate_once(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.allocate(offset, bytes)
    }

    fn hold_once(&self, bytes: u64) -> io::Result<bool> {
        self.file.hold_ballast(bytes)
    }

    fn release_once(&self) -> io::Result<()> {
        self.file.release_ballast()
    }
}
