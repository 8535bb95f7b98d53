//! What the kernel shows of block devices below `/sys/class/block`.

use crate::error::{Error, Result};
use crate::ublk::holders::unescape;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const CLASS: &str = "/sys/class/block";

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Number {
    /// The number in a `dev_t`.
    pub(super) fn of_device(device: libc::dev_t) -> Self {
        Self {
            major: libc::major(device),
            minor: libc::minor(device),
        }
    }

    /// `MAJOR:MINOR`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    /// Whether it names no device: the kernel gives such numbers to file systems without a device, and to btrfs.
    pub(super) fn is_anonymous(self) -> bool {
        self.major == 0
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new(CLASS).join(name)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |e| Error::io(e, format!("{}: cannot be read", path.display()))
}

/// A file of the kernel; none if it is not there, or if what it describes has just gone.
pub(super) fn read(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(failed(path)(e)),
    }
}

/// The names in a folder of the kernel; none if it is not there.
pub(super) fn names(path: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        Err(e) => return Err(failed(path)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed(path))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Whether an error says that a device or process has just gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(
            error.raw_os_error(),
            Some(libc::ESRCH | libc::ENODEV | libc::ENXIO)
        )
}

/// The number of a block device; none if there is no such device.
pub(super) fn number(name: &str) -> Result<Option<Number>> {
    let path = folder(name).join("dev");
    let Some(text) = read(&path)? else {
        return Ok(None);
    };
    let number = Number::parse(text.trim_end());
    number
        .map(Some)
        .ok_or_else(|| Error::corrupt(format!("{}: not a device number", path.display())))
}

/// All block devices.
pub(super) fn devices() -> Result<Vec<String>> {
    names(Path::new(CLASS))
}

/// The partitions of a disk.
pub(super) fn partitions(name: &str) -> Result<Vec<String>> {
    let folder = folder(name);
    let mut names = names(&folder)?;
    names.retain(|entry| folder.join(entry).join("partition").exists());
    Ok(names)
}

/// The disk of a partition; none for a disk.
pub(super) fn disk_of(name: &str) -> Result<Option<String>> {
    let folder = folder(name);
    if !folder.join("partition").exists() {
        return Ok(None);
    }
    let real = fs::canonicalize(&folder).map_err(failed(&folder))?;
    let disk = real.parent().and_then(Path::file_name);
    Ok(disk.map(|disk| disk.to_string_lossy().into_owned()))
}

/// The devices that the kernel lists as made of a device: device mapper, RAID.
pub(super) fn holders(name: &str) -> Result<Vec<String>> {
    names(&folder(name).join("holders"))
}

/// What a loop device has as its file; none if it is not in use.
pub(super) fn loop_file(name: &str) -> Result<Option<PathBuf>> {
    let text = read(&folder(name).join("loop/backing_file"))?;
    Ok(text.map(|text| PathBuf::from(text.trim_end_matches('\n'))))
}

/// The devices that are used as swap space.
pub(super) fn swaps() -> Result<BTreeSet<Number>> {
    let text = read(Path::new("/proc/swaps"))?.unwrap_or_default();
    let paths = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next());
    Ok(paths.filter_map(|path| at_node(&unescape(path))).collect())
}

/// The number of the block device at a path; none if there is none.
pub(super) fn at_node(path: &str) -> Option<Number> {
    let metadata = fs::metadata(path).ok()?;
    let is_device = metadata.file_type().is_block_device();
    is_device.then(|| Number::of_device(metadata.rdev()))
}

/// Where a device's node is: names with a slash have a `!` below /sys.
pub(super) fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

/// Opens a device for reading. Its number decides: where udev or a container has renamed nodes, the others are tried.
pub(super) fn open(name: &str, number: Number, flags: i32) -> io::Result<File> {
    let Number { major, minor } = number;
    let mut nodes = vec![
        node(name),
        PathBuf::from(format!("/dev/block/{major}:{minor}")),
    ];
    if let Ok(mapped) = fs::read_to_string(folder(name).join("dm/name")) {
        nodes.push(Path::new("/dev/mapper").join(mapped.trim_end()));
    }
    let is_it = |path: &&PathBuf| path.to_str().and_then(at_node) == Some(number);
    let Some(path) = nodes.iter().find(is_it) else {
        let message = format!("no node below /dev is the device {major}:{minor}");
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    };
    let mut options = File::options();
    options.read(true).custom_flags(flags).open(path)
}

/// How often, and how far apart, to look whether a device is free of exclusive holders. Other commands, of ours too, hold
/// devices for moments.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Whether something has a device exclusively, and not just for a moment.
pub(super) fn is_held(name: &str, number: Number) -> io::Result<bool> {
    for look in 0..LOOKS {
        match open(name, number, libc::O_EXCL) {
            Ok(_) => return Ok(false),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => return Err(e),
        }
        if look + 1 < LOOKS {
            thread::sleep(BETWEEN_LOOKS);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_two_numbers() {
        let number = Number::parse("259:3").unwrap();
        assert_eq!((number.major, number.minor), (259, 3));
        assert!(Number::parse("0:45").unwrap().is_anonymous());
        for text in ["", "259", "a:b", "259:", ":3", "-1:0"] {
            assert_eq!(Number::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_slash_in_a_name_is_a_folder() {
        assert_eq!(node("cciss!c0d0"), Path::new("/dev/cciss/c0d0"));
    }
}
