//! A device for oneself.

#![expect(unsafe_code, reason = "BLKFLSBUF has no wrapper in std")]

use super::block_path;
use crate::error::{Error, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// `BLKFLSBUF` of `linux/fs.h`.
const BLKFLSBUF: libc::c_ulong = 0x1261;

/// Until this is dropped nobody can mount a device or a partition of it, swap to it, or make it part of another one.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    device: File,
}

impl Claim {
    /// Claims a device; none where somebody has it in one of these ways, see [`holders`](super::holders()). Who merely
    /// opened it does not matter here, see [`sharers`](super::sharers).
    pub fn take(dev_id: u32) -> Result<Option<Self>> {
        let path = block_path(dev_id);
        let mut options = File::options();
        match options.read(true).custom_flags(libc::O_EXCL).open(&path) {
            Ok(device) => Ok(Some(Self { path, device })),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(e) => Err(Error::io(
                e,
                format!("{}: cannot be opened", path.display()),
            )),
        }
    }

    /// Writes the device's dirty pages and drops what the page cache holds of it, so that the next read asks the volume.
    pub fn drop_cached_pages(&self) -> Result<()> {
        // SAFETY: the ioctl takes no argument; the descriptor is open.
        match unsafe { libc::ioctl(self.device.as_raw_fd(), BLKFLSBUF, 0) } {
            0 => Ok(()),
            _ => Err(Error::io(
                io::Error::last_os_error(),
                format!(
                    "{}: its cached pages cannot be dropped",
                    self.path.display()
                ),
            )),
        }
    }
}
