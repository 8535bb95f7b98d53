//! Who has a device: what must let go before it can be detached or rolled back.

use super::sysfs;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process;

/// A process, for an error line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// Something that has a device or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A mounted file system.
    Mount {
        /// The mount point.
        at: String,
        /// A process that sees it, where this one does not: it is in another mount namespace.
        seen_by: Option<Process>,
    },
    /// Swap space.
    Swap,
    /// A block device on top: device mapper, RAID, a loop device.
    Device {
        /// Its name.
        name: String,
    },
    /// A process that has it open.
    Process(Process),
}

impl Process {
    fn of(pid: u32, folder: &Path) -> Self {
        Self {
            pid,
            name: read(&folder.join("comm")).trim_end().to_owned(),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, seen_by: None } => write!(f, "mounted on {at}"),
            Self::Mount {
                at,
                seen_by: Some(process),
            } => {
                write!(f, "mounted on {at} in the mount namespace of {process}")
            }
            Self::Swap => f.write_str("in use as swap"),
            Self::Device { name } => write!(f, "part of {name}"),
            Self::Process(process) => write!(f, "opened by {process}"),
        }
    }
}

/// Everything that has a device mounted or open; what cannot be read (processes that end meanwhile) is left out.
pub fn holders(dev_id: u32) -> Vec<Holder> {
    let target = Target::of(dev_id);
    let mut holders = BTreeSet::new();
    let is_swap = |line: &str| {
        line.split(' ')
            .next()
            .is_some_and(|path| target.is_node(path))
    };
    if read("/proc/swaps".as_ref()).lines().any(is_swap) {
        holders.insert(Holder::Swap);
    }
    holders.extend(target.devices_on_top().map(|name| Holder::Device { name }));
    let mut namespaces = BTreeSet::new();
    let ours = fs::read_link("/proc/self/ns/mnt").ok();
    // This process first: mounts that it sees need no witness.
    target.add_mounts(Path::new("/proc/self"), None, &mut holders);
    namespaces.extend(ours);
    for (pid, folder) in processes() {
        let process = || Process::of(pid, &folder);
        if let Ok(namespace) = fs::read_link(folder.join("ns/mnt"))
            && namespaces.insert(namespace)
        {
            target.add_mounts(&folder, Some(&process()), &mut holders);
        }
        if target.is_open_in(&folder) {
            holders.insert(Holder::Process(process()));
        }
    }
    holders.into_iter().collect()
}

/// Who has a device that a [`Claim`](super::Claim) was had of: loop devices over it, and processes other than this one that
/// merely opened it.
pub fn sharers(dev_id: u32) -> Vec<Holder> {
    let target = Target::of(dev_id);
    let loops = target.loops().map(|name| Holder::Device { name });
    let others = processes().filter(|(pid, _)| *pid != process::id());
    let openers = others.filter(|(_, folder)| target.is_open_in(folder));
    loops
        .chain(openers.map(|(pid, folder)| Holder::Process(Process::of(pid, &folder))))
        .collect()
}

/// The processes that have the file at `path` open under this name.
pub(super) fn openers(path: &Path) -> Vec<Process> {
    let has_it = |folder: &Path| descriptors(folder).any(|(_, target)| target == path);
    let openers = processes().filter(|(_, folder)| has_it(folder));
    openers
        .map(|(pid, folder)| Process::of(pid, &folder))
        .collect()
}

/// The open files of a process, each with what it leads to.
fn descriptors(process: &Path) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    let entries = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    entries.filter_map(|entry| Some((entry.path(), fs::read_link(entry.path()).ok()?)))
}

/// Where the kernel lists block devices.
const BLOCK_CLASS: &str = "/sys/class/block";

/// A device and its partitions, as the kernel's files name them.
struct Target {
    /// `ublkbN`, `ublkbNp1`, ...
    names: Vec<OsString>,
    /// `major:minor` of each.
    numbers: Vec<String>,
}

impl Target {
    fn of(dev_id: u32) -> Self {
        let folder = sysfs::block_folder(dev_id);
        let whole = OsString::from(format!("ublkb{dev_id}"));
        let prefix = format!("ublkb{dev_id}p");
        let mut names = vec![whole];
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let is_part = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with(&prefix));
        names.extend(entries.map(|entry| entry.file_name()).filter(is_part));
        let class = Path::new(BLOCK_CLASS);
        let number = |name: &OsString| read(&class.join(name).join("dev")).trim_end().to_owned();
        let numbers = names.iter().map(number).filter(|number| !number.is_empty());
        Self {
            numbers: numbers.collect(),
            names,
        }
    }

    /// Whether a path is the device or a link to it.
    fn is_node(&self, path: &str) -> bool {
        if !path.starts_with("/dev/") {
            return false;
        }
        let path = unescape(path);
        let node = fs::canonicalize(&path).unwrap_or_else(|_| PathBuf::from(path));
        node.file_name()
            .is_some_and(|name| self.names.iter().any(|own| own == name))
    }

    /// Block devices that the kernel lists as holding it, and loop devices over it.
    fn devices_on_top(&self) -> impl Iterator<Item = String> {
        let listed = self
            .names
            .iter()
            .flat_map(|name| fs::read_dir(Path::new(BLOCK_CLASS).join(name).join("holders")));
        let listed = listed.flatten().flatten().map(|entry| entry.file_name());
        listed.map(|name| shown(&name)).chain(self.loops())
    }

    /// Loop devices over it.
    fn loops(&self) -> impl Iterator<Item = String> {
        let devices = fs::read_dir(BLOCK_CLASS).into_iter().flatten().flatten();
        let loops = devices
            .map(|entry| entry.file_name())
            .filter(|name| name.as_encoded_bytes().starts_with(b"loop"));
        let over = loops.filter(|name| {
            let backing = Path::new(BLOCK_CLASS).join(name).join("loop/backing_file");
            let backing = read(&backing);
            !backing.is_empty() && self.is_node(backing.trim_end())
        });
        over.map(|name| shown(&name))
    }

    /// The mounts that a process sees.
    fn add_mounts(
        &self,
        process: &Path,
        seen_by: Option<&Process>,
        holders: &mut BTreeSet<Holder>,
    ) {
        for line in read(&process.join("mountinfo")).lines() {
            let Some(mount) = Mount::parse(line) else {
                continue;
            };
            // btrfs shows a number of its own, so its source counts too.
            if self.numbers.iter().any(|number| number == mount.number)
                || self.is_node(mount.source)
            {
                holders.insert(Holder::Mount {
                    at: unescape(mount.at),
                    seen_by: seen_by.cloned(),
                });
            }
        }
    }

    /// Whether a process has it open.
    fn is_open_in(&self, process: &Path) -> bool {
        descriptors(process).any(|(path, target)| {
            // Only device nodes are worth a `stat`: on a dead network file system it would wait.
            target.starts_with("/dev")
                && fs::metadata(&path).is_ok_and(|metadata| {
                    let number = metadata.rdev();
                    let number = format!("{}:{}", libc::major(number), libc::minor(number));
                    metadata.file_type().is_block_device() && self.numbers.contains(&number)
                })
        })
    }
}

/// The name of a block device, and what device mapper calls it.
fn shown(name: &OsStr) -> String {
    let folder = Path::new(BLOCK_CLASS).join(name);
    let name = name.to_string_lossy().into_owned();
    match read(&folder.join("dm/name")).trim_end() {
        "" => name,
        mapped => format!("{mapped} ({name})"),
    }
}

/// The fields of a line of `mountinfo` that matter here.
pub(super) struct Mount<'a> {
    pub(super) id: u64,
    pub(super) number: &'a str,
    pub(super) at: &'a str,
    pub(super) kind: &'a str,
    pub(super) source: &'a str,
}

impl<'a> Mount<'a> {
    pub(super) fn parse(line: &'a str) -> Option<Self> {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ');
        let id = head.next()?.parse().ok()?;
        let number = head.nth(1)?;
        let at = head.nth(1)?;
        let mut tail = tail.split(' ');
        Some(Self {
            id,
            number,
            at,
            kind: tail.next()?,
            source: tail.next()?,
        })
    }
}

/// All processes but those of the kernel itself, which have no program and no files.
pub(super) fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered =
        entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    numbered.filter(|(_, folder)| {
        fs::read_link(folder.join("exe")).map_or_else(|e| e.kind() != ErrorKind::NotFound, |_| true)
    })
}

/// A file of the kernel, empty where it cannot be read.
fn read(path: &Path) -> String {
    fs::read(path).map_or(String::new(), |bytes| {
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Undoes the kernel's `\040` for a blank.
pub(super) fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escape = (first == b'\\').then(|| after.get(..3)).flatten();
        let byte =
            escape.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_with_optional_fields_and_blanks() {
        let line = r"36 35 259:3 / /mnt/a\040b rw,noatime shared:1 master:2 - ext4 /dev/ublkb0 rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.number, mount.source), ("259:3", "/dev/ublkb0"));
        assert_eq!((mount.id, mount.kind), (36, "ext4"));
        assert_eq!(unescape(mount.at), "/mnt/a b");
        assert!(Mount::parse("36 35 259:3 / /mnt").is_none());
    }

    #[test]
    fn an_escape_cut_short_stays_as_it_is() {
        assert_eq!(unescape(r"a\04"), r"a\04");
        assert_eq!(unescape(r"a\999"), r"a\999");
    }

    #[test]
    fn holders_say_what_to_let_go() {
        let process = Process {
            pid: 812,
            name: String::from("fio"),
        };
        assert_eq!(
            Holder::Process(process.clone()).to_string(),
            "opened by process 812 (fio)"
        );
        let mount = Holder::Mount {
            at: String::from("/mnt"),
            seen_by: Some(process),
        };
        assert_eq!(
            mount.to_string(),
            "mounted on /mnt in the mount namespace of process 812 (fio)"
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc and /sys")]
    fn a_device_that_is_not_there_has_no_holders() {
        assert!(holders(u32::MAX).is_empty());
    }
}
