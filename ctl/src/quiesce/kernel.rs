//! The system calls behind a flush and a freeze.

#![expect(unsafe_code, reason = "no crate wraps these ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod ioctls {
    //! The requests of `linux/fs.h`.

    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

/// Writes back a file system, which this file is of.
pub(super) fn sync_file_system(file: &File) -> io::Result<()> {
    nix::unistd::syncfs(file).map_err(io::Error::from)
}

/// Freezes a file system, which this file is of: it is written back, and writes to it wait. EBUSY if it is frozen already.
pub(super) fn freeze(file: &File) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the kernel ignores the argument; the descriptor is open.
    let done = unsafe { ioctls::fifreeze(file.as_raw_fd(), &raw mut unused) };
    done.map(drop).map_err(io::Error::from)
}

/// Thaws a file system. EINVAL if it is not frozen.
pub(super) fn thaw(file: &File) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the kernel ignores the argument; the descriptor is open.
    let done = unsafe { ioctls::fithaw(file.as_raw_fd(), &raw mut unused) };
    done.map(drop).map_err(io::Error::from)
}

/// Asks the kernel to write back whatever file system is on a device, wherever that is mounted.
pub(super) fn sync_holder(device: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument; the descriptor is open.
    let done = unsafe { ioctls::blkflsbuf(device.as_raw_fd()) };
    done.map(drop).map_err(io::Error::from)
}
