//! A device for oneself: a claim keeps everybody from mounting it, and a sealed claim from opening it. And what only its sole user may do: write its dirty pages, drop its cached pages, read its
//! partition table anew.
//!
//! All of it waits for the daemon that serves the device. So a claim belongs in a process that is not the daemon:
//! a daemon that is killed while one of its own threads waits for it would never end, and keep its pool locked.

#![expect(
    unsafe_code,
    reason = "BLKFLSBUF, BLKRRPART and cachestat have no wrapper in std"
)]

use super::holders::{self, Holder};
use super::nodes::{self, HiddenNodes};
use super::{block_path, partitions, sysfs};
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// `BLKFLSBUF` of `linux/fs.h`.
const BLKFLSBUF: libc::c_ulong = 0x1261;
/// How often cached pages are dropped before those that stay count as in use. Somebody may just be reading them.
const DROP_TRIES: u32 = 50;
const DROP_POLL: Duration = Duration::from_millis(20);

/// Until this is dropped nobody can mount a device or a partition of it, swap to it, or make it part of another one.
#[derive(Debug)]
pub struct Claim {
    dev_id: u32,
    path: PathBuf,
    /// Before the open device: the nodes come back while the claim lasts.
    hidden: Option<HiddenNodes>,
    device: File,
}

/// What came of claiming a device.
#[derive(Debug)]
pub enum Claimed {
    /// Nobody else has the device.
    Claim(Claim),
    /// These have it.
    Held(Vec<Holder>),
    /// There is no such block device.
    Gone,
}

impl Claim {
    /// Claims a device, unless somebody else has it mounted, open or mapped. Opening waits for whoever serves the device
    /// if the kernel has to read the partition table first.
    pub fn take(dev_id: u32) -> Result<Claimed> {
        let Some(number) = holders::number_of(&sysfs::block_name(dev_id))? else {
            return Ok(Claimed::Gone);
        };
        nodes::show_all(dev_id)?;
        let path = block_path(dev_id);
        let mut options = File::options();
        match options.read(true).custom_flags(libc::O_EXCL).open(&path) {
            Ok(device) => {
                refuse_other(&device, &path, number)?;
                let sharers = holders::sharers(dev_id);
                if !sharers.is_empty() {
                    return Ok(Claimed::Held(sharers));
                }
                Ok(Claimed::Claim(Self {
                    dev_id,
                    path,
                    hidden: None,
                    device,
                }))
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let mut holders = holders::holders(dev_id);
                if holders.is_empty() {
                    holders.push(Holder::Hidden);
                }
                Ok(Claimed::Held(holders))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (shown, (major, minor)) = (path.display(), number);
                let fact =
                    format!("{shown}: has no node; `mknod {shown} b {major} {minor}` makes one");
                Err(Error::with(ErrorKind::Unsupported, fact))
            }
            // It went while it was opened.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                Ok(Claimed::Gone)
            }
            Err(e) => Err(Error::io(
                e,
                format!("{}: cannot be opened", path.display()),
            )),
        }
    }

    /// Hides the device's nodes and looks once more who has the device. If nobody has it, nobody gets it until
    /// [`Claim::unseal`]. Otherwise the nodes stay in sight.
    pub fn seal(&mut self) -> Result<Vec<Holder>> {
        self.hidden = Some(HiddenNodes::hide(self.dev_id)?);
        let sharers = holders::sharers(self.dev_id);
        if !sharers.is_empty() {
            self.unseal();
        }
        Ok(sharers)
    }

    /// Shows the nodes again.
    pub fn unseal(&mut self) {
        self.hidden = None;
    }

    /// Writes the dirty pages that an earlier user left.
    pub fn flush(&self) -> Result<()> {
        let done = self.device.sync_all();
        done.map_err(|e| {
            let shown = self.path.display();
            Error::io(e, format!("{shown}: its dirty pages cannot be written"))
        })
    }

    /// Drops what the page cache holds of the device, so that the next read asks the volume. An error if a page cannot be
    /// dropped: somebody has it mapped, or is using it in another way.
    pub fn drop_cached_pages(&self) -> Result<()> {
        for _ in 0..DROP_TRIES {
            // SAFETY: the ioctl takes no argument; the descriptor is open.
            if unsafe { libc::ioctl(self.device.as_raw_fd(), BLKFLSBUF, 0) } != 0 {
                let shown = self.path.display();
                return Err(Error::io(
                    io::Error::last_os_error(),
                    format!("{shown}: its cached pages cannot be dropped"),
                ));
            }
            if self.cached_pages()? == 0 {
                return Ok(());
            }
            thread::sleep(DROP_POLL);
        }
        let shown = self.path.display();
        Err(Error::with(
            ErrorKind::Busy,
            format!("{shown}: somebody uses cached pages of it, so they cannot be dropped"),
        ))
    }

    /// Reads the partition table anew.
    pub fn reread_partitions(&self) -> Result<()> {
        let reread = partitions::reread(&self.device);
        reread.map_err(|e| {
            let shown = self.path.display();
            Error::io(
                e,
                format!("{shown}: its partition table cannot be read anew"),
            )
        })?;
        partitions::await_nodes(self.dev_id)
    }

    /// How many pages the page cache holds of the device.
    fn cached_pages(&self) -> Result<u64> {
        let everything = [0_u64; 2];
        let mut counts = [0_u64; CACHESTAT_WORDS];
        // SAFETY: the descriptor is open, and the kernel reads one `struct cachestat_range` of two words, where a length
        // of 0 means all, and writes one `struct cachestat` of five words.
        let done = unsafe {
            libc::syscall(
                SYS_CACHESTAT,
                self.device.as_raw_fd(),
                everything.as_ptr(),
                counts.as_mut_ptr(),
                0,
            )
        };
        if done == 0 {
            return Ok(counts[0]);
        }
        let error = io::Error::last_os_error();
        let shown = self.path.display();
        if error.raw_os_error() == Some(libc::ENOSYS) {
            let fact = format!(
                "{shown}: this kernel (older than 6.5) cannot say whether its cached pages are gone; detach the volume"
            );
            return Err(Error::with(ErrorKind::Unsupported, fact));
        }
        Err(Error::io(
            error,
            format!("{shown}: its cached pages cannot be counted"),
        ))
    }
}

/// An error if a node is that of another device.
fn refuse_other(device: &File, path: &Path, number: (u32, u32)) -> Result<()> {
    let shown = path.display();
    let metadata = device.metadata();
    let metadata = metadata.map_err(|e| Error::io(e, format!("{shown}: cannot be looked at")))?;
    let (major, minor) = number;
    if (libc::major(metadata.rdev()), libc::minor(metadata.rdev())) == number {
        return Ok(());
    }
    let fact = format!("{shown}: is the node of another device; it should be {major}:{minor}");
    Err(Error::with(ErrorKind::Unsupported, fact))
}

/// The number of cachestat(2), the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;
/// Words of `struct cachestat`: cached, dirty, under writeback, evicted, recently evicted.
const CACHESTAT_WORDS: usize = 5;
