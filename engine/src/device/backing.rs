//! The file below a loop device. A lock on the device says nothing to who opens the file, so whoever opens a loop device
//! locks the file below it too: a pool is open once, by whatever name.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The file below a loop device or a partition of one; none below anything else, and none that cannot be opened, as one
/// of another mount namespace or one that was deleted.
pub(super) fn open(device: &Metadata) -> Option<File> {
    let (major, minor) = (libc::major(device.rdev()), libc::minor(device.rdev()));
    let node = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // sysfs has a partition in the folder of its device.
    let places = ["loop/backing_file", "../loop/backing_file"];
    let path = places
        .iter()
        .find_map(|place| fs::read_to_string(node.join(place)).ok())?;
    File::open(path.strip_suffix('\n').unwrap_or(&path)).ok()
}
