//! What udev's rules are told about a device: a file of properties for each, which `ctl/udev/60-blockfork.rules` reads.
//!
//! The file is there before the kernel announces the device, so already the first event finds it. The rule reads nothing
//! else, so it never waits for a daemon. The device works without the file, so a failure is only logged.

use crate::exit_code::one_line;
use crate::state;
use blockfork::error::{Error, Result};
use blockfork::name::{Name, VolumePath};
use std::fs;
use std::path::{Path, PathBuf};
use tracing::warn;

/// Where the files are. Device numbers belong to the machine, so this does not follow `$UBLKCTL_RUNTIME_DIR`.
const DIRECTORY: &str = "/run/blockfork/devices";

/// What decides which links a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A volume that is no clone.
    Volume,
    /// A volume that began with the content of another one, so with its UUIDs.
    Clone,
    /// A snapshot, which has the UUIDs of its volume.
    Snapshot,
}

/// Describes the device with this number.
pub(crate) fn describe(dev_id: u32, pool: &Name, path: &VolumePath, kind: Kind) {
    if let Err(e) = describe_in(Path::new(DIRECTORY), dev_id, pool, path, kind) {
        warn!(volume = %path, "udev makes no links: {}", one_line(&e));
    }
}

/// Removes the description of a device that is gone.
pub(crate) fn forget(dev_id: u32, pool: &Name, path: &VolumePath) {
    if let Err(e) = forget_in(Path::new(DIRECTORY), dev_id, pool, path) {
        warn!(volume = %path, "{}", one_line(&e));
    }
}

/// Lets udev look again at a device and its partitions: their content changed, and nobody wrote it through the device.
pub(crate) fn announce_change(dev_id: u32) {
    let device = PathBuf::from(format!("/sys/class/block/ublkb{dev_id}"));
    let is_partition = |folder: &PathBuf| folder.join("partition").exists();
    let folders = fs::read_dir(&device).map(|entries| {
        let below = entries.filter_map(|entry| Some(entry.ok()?.path()));
        below.filter(is_partition).collect::<Vec<_>>()
    });
    let announced = folders.and_then(|partitions| {
        let all = std::iter::once(device.clone()).chain(partitions);
        all.map(|folder| folder.join("uevent"))
            .try_for_each(|file| fs::write(file, "change"))
    });
    if let Err(e) = announced {
        warn!(device = %device.display(), "udev does not look at it again: {e}");
    }
}

fn describe_in(
    directory: &Path,
    dev_id: u32,
    pool: &Name,
    path: &VolumePath,
    kind: Kind,
) -> Result<()> {
    let kind = match kind {
        Kind::Volume => "volume",
        Kind::Clone => "clone",
        Kind::Snapshot => "snapshot",
    };
    let text = format!("{}BLOCKFORK_KIND={kind}\n", identity(pool, path));
    fs::create_dir_all(directory)
        .map_err(|e| Error::io(e, format!("{}: cannot be made", directory.display())))?;
    state::write_file(&file(directory, dev_id), text.as_bytes())
}

/// Leaves the file alone if it describes another volume: as soon as a device is gone, the kernel may give its number to
/// a device of another pool.
fn forget_in(directory: &Path, dev_id: u32, pool: &Name, path: &VolumePath) -> Result<()> {
    let file = file(directory, dev_id);
    let is_ours = |text: String| text.starts_with(&identity(pool, path));
    if fs::read_to_string(&file).is_ok_and(is_ours) {
        state::remove_file(&file)?;
    }
    Ok(())
}

fn file(directory: &Path, dev_id: u32) -> PathBuf {
    directory.join(format!("ublkb{dev_id}"))
}

/// The first lines of a description. A name has no character that would need quotes.
fn identity(pool: &Name, path: &VolumePath) -> String {
    format!("BLOCKFORK_POOL={pool}\nBLOCKFORK_VOLUME={path}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_went_to_another_pool_keeps_its_description() {
        let directory = tempfile::tempdir().unwrap();
        let describe = |pool: &str, path: &str, kind| {
            let (pool, path) = (pool.parse().unwrap(), path.parse().unwrap());
            describe_in(directory.path(), 7, &pool, &path, kind).unwrap();
        };
        let forget = |pool: &str, path: &str| {
            let (pool, path) = (pool.parse().unwrap(), path.parse().unwrap());
            forget_in(directory.path(), 7, &pool, &path).unwrap();
        };
        let file = directory.path().join("ublkb7");
        describe("tank", "db@monday", Kind::Snapshot);
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "BLOCKFORK_POOL=tank\nBLOCKFORK_VOLUME=db@monday\nBLOCKFORK_KIND=snapshot\n"
        );
        describe("other", "db", Kind::Clone);
        forget("tank", "db@monday");
        forget("other", "d");
        assert!(file.exists());
        forget("other", "db");
        assert!(!file.exists());
        forget("other", "db");
    }
}
