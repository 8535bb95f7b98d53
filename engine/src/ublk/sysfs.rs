//! What the kernel shows of ublk devices below `/sys` and `/dev`.

use super::block_path;
use crate::error::{Error, Result};
use crate::units::SECTOR_BYTES;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The driver's limit for devices.
pub(super) const DEVICES_MAX_PATH: &str = "/sys/module/ublk_drv/parameters/ublks_max";
const CLASS: &str = "/sys/class/ublk-char";
const NODE_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// The driver's limit for devices, where it tells.
pub(super) fn devices_max() -> Option<u32> {
    fs::read_to_string(DEVICES_MAX_PATH)
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The numbers of all ublk devices, ascending.
pub(super) fn devices() -> Vec<u32> {
    let entries = fs::read_dir(CLASS).into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix("ublkc")?.parse().ok();
    let mut devices: Vec<u32> = entries
        .filter_map(|entry| number(entry.file_name().to_str()?))
        .collect();
    devices.sort_unstable();
    devices
}

/// Whether there is a ublk device of this number.
pub(super) fn has_device(dev_id: u32) -> bool {
    Path::new(CLASS).join(format!("ublkc{dev_id}")).exists()
}

/// The block device's folder.
pub(super) fn block_folder(dev_id: u32) -> PathBuf {
    Path::new("/sys/class/block").join(format!("ublkb{dev_id}"))
}

/// The size of a block device in bytes.
pub(super) fn size(dev_id: u32) -> Option<u64> {
    let sectors = fs::read_to_string(block_folder(dev_id).join("size")).ok()?;
    sectors
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(SECTOR_BYTES)
}

/// The kernel's name for a block device.
pub(super) fn block_name(dev_id: u32) -> OsString {
    OsString::from(format!("ublkb{dev_id}"))
}

/// The folder of a device's control file.
pub(super) fn control_folder(dev_id: u32) -> PathBuf {
    Path::new(CLASS).join(format!("ublkc{dev_id}"))
}

/// The names of a block device's partitions: `ublkbNp1`, ...; none if there is no such device.
pub(super) fn partitions(dev_id: u32) -> Result<Vec<OsString>> {
    let folder = block_folder(dev_id);
    let failed = |e| Error::io(e, format!("{}: cannot be read", folder.display()));
    let prefix = format!("ublkb{dev_id}p");
    let mut names = Vec::new();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(names),
        Err(e) => return Err(failed(e)),
    };
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if name.as_encoded_bytes().starts_with(prefix.as_bytes()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Takes the I/O scheduler away from a block device.
pub(super) fn disable_scheduler(dev_id: u32) {
    if let Err(error) = fs::write(block_folder(dev_id).join("queue/scheduler"), "none") {
        tracing::debug!(
            "{}: keeps its I/O scheduler: {error}",
            block_path(dev_id).display()
        );
    }
}

/// Waits, for a while, until a device node exists: udev may be slower than the kernel.
pub(super) fn await_node(path: &Path) {
    await_existence(path, true);
}

/// Waits, for a while, until a device node is gone.
pub(super) fn await_no_node(path: &Path) {
    await_existence(path, false);
}

fn await_existence(path: &Path, exists: bool) {
    let mut waited = Duration::ZERO;
    while path.exists() != exists {
        if waited >= NODE_LIMIT {
            let fact = if exists {
                "has no node"
            } else {
                "still has its node"
            };
            tracing::warn!("{}: {fact}", path.display());
            return;
        }
        thread::sleep(POLL);
        waited += POLL;
    }
}
