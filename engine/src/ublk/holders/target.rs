//! A device and its partitions, by their numbers and names, and the block devices on top of them.

use super::processes::Sought;
use super::{Holder, is_gone, names, noted, read};
use crate::error::{Error, Result};
use crate::ublk::stack::loops;
use crate::ublk::sysfs;
use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel lists block devices.
const BLOCK_CLASS: &str = "/sys/class/block";

/// The number of a device: major and minor.
pub(in crate::ublk) type Number = (u32, u32);

/// A device and its partitions, as the kernel's files name them.
pub(super) struct Target {
    /// `ublkbN`, `ublkbNp1`, ...
    names: Vec<OsString>,
    numbers: Vec<Number>,
}

impl Target {
    /// The device of a number, which may be gone.
    pub(super) fn of(dev_id: u32) -> Result<Self> {
        let mut target = Self {
            names: vec![sysfs::block_name(dev_id)],
            numbers: Vec::new(),
        };
        target.names.extend(sysfs::partitions(dev_id)?);
        for name in &target.names {
            target.numbers.extend(number_of(name)?);
        }
        Ok(target)
    }

    /// Whether the kernel has the device or a partition of it.
    pub(super) fn is_there(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// What to look for in processes; `files` of its file systems too.
    pub(super) fn sought(&self, files: bool) -> Sought {
        Sought::block_devices(self.numbers.clone(), files)
    }

    /// Whether `major:minor` is the device or a partition.
    pub(super) fn has_number(&self, text: &str) -> bool {
        parsed(text).is_some_and(|number| self.numbers.contains(&number))
    }

    /// Whether a path is the device, a partition, or a link to one.
    pub(super) fn is_node(&self, path: &str) -> bool {
        if !path.starts_with("/dev/") {
            return false;
        }
        let node = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
        node.file_name()
            .is_some_and(|name| self.names.iter().any(|own| own == name))
    }

    /// Adds the block devices that the kernel lists as holding the device, and loop devices over it.
    pub(super) fn add_devices_on_top(&self, found: &mut BTreeSet<Holder>) {
        for name in &self.names {
            let holders = names(&Path::new(BLOCK_CLASS).join(name).join("holders"));
            let holders = noted(found, holders).unwrap_or_default();
            found.extend(holders.iter().map(|name| device(name)));
        }
        self.add_loops(found);
    }

    /// Adds loop devices over the device: they open it as any program does, without a claim.
    pub(super) fn add_loops(&self, found: &mut BTreeSet<Holder>) {
        let devices = noted(found, names(Path::new(BLOCK_CLASS))).unwrap_or_default();
        let loops = devices
            .iter()
            .filter(|name| name.as_encoded_bytes().starts_with(b"loop"));
        for name in loops {
            if noted(found, self.is_below(name)) == Some(true) {
                found.insert(device(name));
            }
        }
    }

    /// Whether a loop device is over the device.
    fn is_below(&self, name: &OsStr) -> std::result::Result<bool, Holder> {
        let backing = Path::new(BLOCK_CLASS).join(name).join("loop/backing_file");
        let Some(backing) = read(&backing)? else {
            return Ok(false);
        };
        let backing = Path::new(backing.trim_end_matches('\n'));
        // The path can be from another mount namespace or of a file that is deleted, so only a regular file is an answer.
        let is_file =
            status(backing).is_ok_and(|status| file_type(&status) == FileType::RegularFile);
        if is_file {
            return Ok(false);
        }
        let node = Path::new("/dev").join(name);
        let number = loops::device_below(&node).map_err(|e| super::unseen(&node, &e))?;
        Ok(number.is_some_and(|number| self.numbers.contains(&number)))
    }
}

/// The number of a block device; none if there is none of this name.
pub(in crate::ublk) fn number_of(name: &OsStr) -> Result<Option<Number>> {
    number(&Path::new(BLOCK_CLASS).join(name))
}

/// The number of a device's control file; none if there is no such device.
pub(super) fn control_file(dev_id: u32) -> Result<Option<Number>> {
    number(&sysfs::control_folder(dev_id))
}

/// The number of the device of a folder below /sys; none if the folder is gone.
fn number(folder: &Path) -> Result<Option<Number>> {
    let path = folder.join("dev");
    let failed = |e| Error::io(e, format!("{}: cannot be read", path.display()));
    match fs::read_to_string(&path) {
        Ok(text) => match parsed(text.trim_end()) {
            Some(number) => Ok(Some(number)),
            None => Err(failed(io::ErrorKind::InvalidData.into())),
        },
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

fn parsed(text: &str) -> Option<Number> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What a path leads to. Nobody is asked who would have to answer over a network, if the kernel knows enough.
pub(super) fn status(path: &Path) -> io::Result<Statx> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::TYPE | StatxFlags::MODE;
    Ok(rustix::fs::statx(CWD, path, flags, wanted)?)
}

/// The type of what was looked at.
pub(super) fn file_type(status: &Statx) -> FileType {
    FileType::from_raw_mode(status.stx_mode.into())
}

/// A block device, with what device mapper calls it.
fn device(name: &OsStr) -> Holder {
    let folder = Path::new(BLOCK_CLASS).join(name);
    let name = name.to_string_lossy().into_owned();
    // Only for people: a device that is none of device mapper's has no such file.
    let mapped = fs::read_to_string(folder.join("dm/name")).unwrap_or_default();
    let name = match mapped.trim_end() {
        "" => name,
        mapped => format!("{mapped} ({name})"),
    };
    Holder::Device { name }
}
