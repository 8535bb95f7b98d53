//! Mounted file systems, in every mount namespace that has a process.

use super::block::{self, Number, is_gone};
use crate::error::{Error, ErrorKind, Result};
use crate::ublk::holders::{Mount, processes, unescape};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A mounted file system.
#[derive(Debug)]
pub struct FileSystem {
    /// Its type, for example `ext4`.
    pub kind: String,
    /// Where it is mounted: at least one place.
    pub mounts: Vec<MountPoint>,
    pub(super) number: Number,
}

impl FileSystem {
    /// The first of its mount points that can be opened, opened; none if every one is hidden below another mount or
    /// has just gone.
    pub fn open(&self) -> Option<File> {
        self.mounts.iter().find_map(MountPoint::open)
    }

    /// Whether the kernel finds it by its device's number. It does not find a btrfs so.
    pub fn is_known_by_device(&self) -> bool {
        !self.number.is_anonymous()
    }

    /// Its type and where it is mounted, for messages.
    pub fn shown(&self) -> String {
        let at = self.mounts.first().map(|mount| mount.at.display());
        at.map_or_else(|| self.kind.clone(), |at| format!("{} on {at}", self.kind))
    }
}

/// A place where a file system is mounted, as a process sees it.
#[derive(Clone, Debug)]
pub struct MountPoint {
    /// The path in the process's mount namespace.
    pub at: PathBuf,
    id: u64,
    process: PathBuf,
}

impl MountPoint {
    /// Opens it, if this very mount is what the path leads to.
    fn open(&self) -> Option<File> {
        let inside = self.at.strip_prefix("/").unwrap_or(&self.at);
        let path = self.process.join("root").join(inside);
        let place = open_place(&path).ok()?;
        if mount_id(&place).ok()? != self.id {
            return None;
        }
        // What is mounted on a file may be a pipe or a device. To open one of these does more than to look at it.
        let kind = place.metadata().ok()?.file_type();
        if !kind.is_dir() && !kind.is_file() {
            return None;
        }
        File::open(format!("/proc/self/fd/{}", place.as_raw_fd())).ok()
    }
}

/// A mount of a process.
#[derive(Debug)]
struct Seen {
    point: MountPoint,
    number: Number,
    kind: String,
    source: String,
}

/// All mounts that any process sees.
#[derive(Debug)]
pub(super) struct Mounts {
    seen: Vec<Seen>,
    /// The members of each mounted btrfs.
    btrfs: Vec<BTreeSet<Number>>,
}

impl Mounts {
    /// Reads the mounts of each mount namespace, this process's first.
    pub(super) fn of_all_processes() -> Result<Self> {
        let mut seen = Vec::new();
        let mut views = BTreeSet::new();
        let pids = processes().map_err(|unseen| Error::with(ErrorKind::Io, unseen.to_string()))?;
        let others = pids.iter().map(|pid| PathBuf::from(format!("/proc/{pid}")));
        let this = std::iter::once(PathBuf::from("/proc/self"));
        for process in this.chain(others) {
            match view(&process) {
                Ok(view) => {
                    if views.insert(view) {
                        add(&process, &mut seen)?;
                    }
                }
                // The process has ended. Or it may not be looked at: a mount that only it sees shows as a hidden holder
                // of its device.
                Err(e) if is_gone(&e) || e.kind() == io::ErrorKind::PermissionDenied => {}
                Err(e) => {
                    let shown = process.display();
                    return Err(Error::io(e, format!("{shown}: its mounts cannot be read")));
                }
            }
        }
        Ok(Self {
            seen,
            btrfs: btrfs()?,
        })
    }

    /// The file systems on a device.
    pub(super) fn on_device(&self, name: &str, number: Number) -> Vec<FileSystem> {
        let mut found: Vec<FileSystem> = Vec::new();
        for seen in self
            .seen
            .iter()
            .filter(|seen| self.lies_on(seen, name, number))
        {
            let known = found.iter_mut().find(|known| known.number == seen.number);
            match known {
                Some(known) => known.mounts.push(seen.point.clone()),
                None => found.push(FileSystem {
                    kind: seen.kind.clone(),
                    mounts: vec![seen.point.clone()],
                    number: seen.number,
                }),
            }
        }
        found
    }

    fn lies_on(&self, seen: &Seen, name: &str, number: Number) -> bool {
        if !seen.number.is_anonymous() {
            return seen.number == number;
        }
        // Such a file system names its devices as the source, and a btrfs only one of them.
        let mut sources = seen.source.split(':').filter(|path| path.starts_with('/'));
        sources.any(|path| match block::at_node(path) {
            Some(source) => {
                let is_member = |members: &BTreeSet<Number>| {
                    members.contains(&source) && members.contains(&number)
                };
                source == number || (seen.kind == "btrfs" && self.btrfs.iter().any(is_member))
            }
            // The node is in sight of others only.
            None => Path::new(path).file_name().is_some_and(|last| last == name),
        })
    }

    /// The number of the file system that a path leads to, as mounts have it.
    pub(super) fn file_system_of(&self, path: &Path) -> io::Result<Number> {
        let place = open_place(path)?;
        let id = mount_id(&place)?;
        let seen = self.seen.iter().find(|seen| seen.point.id == id);
        match seen {
            Some(seen) => Ok(seen.number),
            None => Ok(Number::of_device(place.metadata()?.dev())),
        }
    }
}

/// What decides which mounts a process sees: its mount namespace, and the folder that is its root.
fn view(process: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let namespace = fs::read_link(process.join("ns/mnt"))?;
    Ok((namespace, fs::read_link(process.join("root"))?))
}

/// Adds the mounts that a process sees.
fn add(process: &Path, seen: &mut Vec<Seen>) -> Result<()> {
    let path = process.join("mountinfo");
    let Some(text) = block::read(&path)? else {
        return Ok(());
    };
    for line in text.lines() {
        let mount = Mount::parse(line);
        let number = mount.as_ref().and_then(|mount| Number::parse(mount.number));
        let (Some(mount), Some(number)) = (mount, number) else {
            let message = format!("{}: {line:?} is not understood", path.display());
            return Err(Error::corrupt(message));
        };
        seen.push(Seen {
            point: MountPoint {
                at: PathBuf::from(unescape(mount.at)),
                id: mount.id,
                process: process.to_owned(),
            },
            number,
            kind: mount.kind.to_owned(),
            source: unescape(mount.source),
        });
    }
    Ok(())
}

fn btrfs() -> Result<Vec<BTreeSet<Number>>> {
    let class = Path::new("/sys/fs/btrfs");
    let mut all = Vec::new();
    for name in block::names(class)? {
        let members = block::names(&class.join(name).join("devices"))?;
        let numbers = members.iter().map(|member| block::number(member));
        let numbers: Result<Vec<Option<Number>>> = numbers.collect();
        all.push(numbers?.into_iter().flatten().collect());
    }
    Ok(all)
}

/// Opens a path only to ask about it, which works for whatever is there.
fn open_place(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}

/// The number of the mount that an open file was reached through.
fn mount_id(file: &File) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let id = line.and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel tells no mount id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc")]
    fn a_path_is_found_in_its_file_system_and_a_mount_point_can_be_opened() {
        let mounts = Mounts::of_all_processes().unwrap();
        let proc = mounts
            .file_system_of(Path::new("/proc/self/status"))
            .unwrap();
        let seen = mounts.seen.iter().find(|seen| seen.number == proc).unwrap();
        assert_eq!(seen.kind, "proc");
        assert!(seen.point.open().is_some());
    }
}
