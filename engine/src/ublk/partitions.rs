//! The partitions of a device: the kernel finds them when the device starts, some kernels only a moment later.

#![expect(unsafe_code, reason = "BLKRRPART has no wrapper in std")]

use super::{block_path, sysfs};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// `BLKRRPART` of `linux/fs.h`.
const BLKRRPART: libc::c_ulong = 0x125f;

/// How long the kernel may take to begin its own search.
const SEARCH_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// Returns once the kernel has found the partitions of a device that was started, and their nodes are there. Not for the
/// process that serves the device, because the search waits for it.
///
/// Since 7.0 a search of the kernel's own begins after the device was started. Until then it refuses searches, and says
/// so in `partscan`.
pub fn await_partitions(dev_id: u32) -> Result<()> {
    let path = block_path(dev_id);
    let failed = |e| {
        Error::io(
            e,
            format!("{}: its partitions cannot be read", path.display()),
        )
    };
    let mut waited = Duration::ZERO;
    while is_search_to_come(dev_id).map_err(failed)? {
        if waited >= SEARCH_LIMIT {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        thread::sleep(POLL);
        waited += POLL;
    }
    // Opening waits for a search that has begun.
    let device = File::open(&path).map_err(failed)?;
    if !sysfs::partitions(dev_id)?.is_empty() {
        return await_nodes(dev_id);
    }
    match reread(&device) {
        Ok(()) => {}
        // Somebody uses a partition, or has claimed the device: so it was searched.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        Err(e) => return Err(failed(e)),
    }
    // The kernel's own search may have begun between the two looks above, and waits for the lock that `reread` held.
    // Opening waits for that lock too.
    drop(File::open(&path).map_err(failed)?);
    await_nodes(dev_id)
}

/// Makes the kernel forget the partitions and search anew. The caller needs the only claim of the device, or none may be.
pub(super) fn reread(device: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument; the descriptor is open.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKRRPART, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for the nodes of all partitions, in case udev is slower than the kernel.
pub(super) fn await_nodes(dev_id: u32) -> Result<()> {
    for name in sysfs::partitions(dev_id)? {
        sysfs::await_node(&Path::new("/dev").join(name));
    }
    Ok(())
}

/// Whether the kernel is about to search by itself. Kernels before 6.10 don't say so, and have searched already.
fn is_search_to_come(dev_id: u32) -> io::Result<bool> {
    match fs::read_to_string(sysfs::block_folder(dev_id).join("partscan")) {
        Ok(text) => Ok(text.trim_end() == "0"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
