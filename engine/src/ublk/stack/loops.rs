//! Loop devices, and what is below each.

#![expect(unsafe_code, reason = "LOOP_GET_STATUS64 has no wrapper in std")]

use super::block::{self, Number, is_gone};
use super::mounts::Mounts;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// `LOOP_GET_STATUS64` of `linux/loop.h`.
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
/// `struct loop_info64` as numbers: the device of the file's file system, its inode, the file's own device number, and
/// what does not matter here.
type Status = [u64; 29];

/// What a loop device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// A block device.
    Device(Number),
    /// A file in the file system of this number.
    File(Number),
}

/// A loop device that is in use.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) name: String,
    pub(super) backing: Backing,
}

/// All loop devices that are in use.
pub(super) fn bound(mounts: &Mounts) -> Result<Vec<Loop>> {
    let mut loops = Vec::new();
    let names = block::devices()?;
    for name in names.into_iter().filter(|name| name.starts_with("loop")) {
        let Some(file) = block::loop_file(&name)? else {
            continue;
        };
        let backing = backing(&name, &file, mounts).map_err(|e| {
            Error::io(
                e,
                format!(
                    "/dev/{name}: cannot be asked for its file, {}",
                    file.display()
                ),
            )
        })?;
        loops.extend(backing.map(|backing| Loop { name, backing }));
    }
    Ok(loops)
}

/// What is below a loop device; none if that has just been taken away.
fn backing(name: &str, file: &Path, mounts: &Mounts) -> io::Result<Option<Backing>> {
    let Ok(opened) = File::open(block::node(name)) else {
        // In a container the node may be missing; the file may still be in sight.
        return by_path(file, mounts).map(Some);
    };
    let Some([file_system, _, device, ..]) = status(&opened)? else {
        return Ok(None);
    };
    if device != 0 {
        return Ok(Some(Backing::Device(Number::of_device(device))));
    }
    let file_system = Number::of_device(file_system);
    // btrfs tells the number of a subvolume, which no mount has.
    let by_path = file_system
        .is_anonymous()
        .then(|| by_path(file, mounts).ok());
    Ok(Some(
        by_path.flatten().unwrap_or(Backing::File(file_system)),
    ))
}

/// What the kernel says of a loop device; none if it is not in use.
fn status(opened: &File) -> io::Result<Option<Status>> {
    let mut status: Status = [0; 29];
    // SAFETY: the ioctl writes a `loop_info64`, 232 bytes, to which the pointer leads.
    match unsafe { libc::ioctl(opened.as_raw_fd(), LOOP_GET_STATUS64, status.as_mut_ptr()) } {
        0 => Ok(Some(status)),
        _ => match io::Error::last_os_error() {
            e if is_gone(&e) => Ok(None),
            e => Err(e),
        },
    }
}

/// The block device that a loop device is over; none if it is over a file, or not in use.
pub(in crate::ublk) fn device_below(node: &Path) -> io::Result<Option<(u32, u32)>> {
    let opened = match File::open(node) {
        Ok(opened) => opened,
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(e) => return Err(e),
    };
    let device = status(&opened)?.map_or(0, |[_, _, device, ..]| device);
    Ok((device != 0).then(|| (libc::major(device), libc::minor(device))))
}

fn by_path(file: &Path, mounts: &Mounts) -> io::Result<Backing> {
    let metadata = fs::metadata(file)?;
    if metadata.file_type().is_block_device() {
        return Ok(Backing::Device(Number::of_device(metadata.rdev())));
    }
    mounts.file_system_of(file).map(Backing::File)
}
