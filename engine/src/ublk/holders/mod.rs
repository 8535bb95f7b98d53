//! Who has a device: what must let go before the device can be detached or rolled back.
//!
//! What cannot be looked at is a [`Holder::Unseen`], so it counts as in use: a full table of descriptors, a process of
//! another user, a file of a dead network file system. The look has a time limit, because some of what it asks can hang.

mod mounts;
mod processes;
mod target;

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use target::Target;

pub(super) use mounts::{Mount, unescape};
pub(super) use target::number_of;

use super::task;

/// How long a look at the whole machine may take.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// A process, for an error line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// Something that has a device or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Holder {
    /// A mounted file system.
    Mount {
        /// The mount point.
        at: String,
        /// A process that sees the mount, if this process does not: that process is in another mount namespace.
        seen_by: Option<Process>,
    },
    /// Swap space.
    Swap,
    /// A block device on top: device mapper, RAID, a loop device.
    Device {
        /// Its name.
        name: String,
    },
    /// A process that has the device open.
    Process(Process),
    /// A process that has the device mapped into its memory.
    Mapping(Process),
    /// A process that has a file open on a file system of the device, or a working directory there.
    File(Process),
    /// Somebody claimed the device, and nothing on this machine shows who it is.
    Hidden,
    /// Something that could not be looked at.
    Unseen(String),
}

impl Holder {
    /// Whether the holder may let go by itself in a moment, as a program does that only reads the device's labels.
    pub fn may_be_brief(&self) -> bool {
        match self {
            Self::Process(_) | Self::Hidden | Self::Unseen(_) => true,
            Self::Mount { .. }
            | Self::Swap
            | Self::Device { .. }
            | Self::Mapping(_)
            | Self::File(_) => false,
        }
    }
}

impl Process {
    /// The process of this number. Its name is for people, so a process that ended meanwhile has none.
    fn of(pid: u32) -> Self {
        let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self {
            pid,
            name: String::from_utf8_lossy(&name).trim_end().to_owned(),
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
            Self::Mapping(process) => write!(f, "mapped by {process}"),
            Self::File(process) => {
                write!(
                    f,
                    "in use through a file or directory on it by {process}, whose mount is not to be seen"
                )
            }
            Self::Hidden => f.write_str(
                "in use by a mount that no process shows: unmounted lazily, or kept by a file of its mount namespace",
            ),
            Self::Unseen(fact) => write!(f, "possibly in use: {fact}"),
        }
    }
}

/// Everything that has a device mounted, open or mapped, except this process.
pub(super) fn holders(dev_id: u32) -> Vec<Holder> {
    look(dev_id, |target, found| {
        mounts::add(target, found);
        let has_mount = found
            .iter()
            .any(|holder| matches!(holder, Holder::Mount { .. }));
        // Where a mount is visible, the files that are open on it say nothing more.
        processes::add(&target.sought(!has_mount), found);
    })
}

/// Who has a device that this process has claimed, see [`Claim`](super::Claim): loop devices over it, and other processes
/// that have it open or mapped.
pub(super) fn sharers(dev_id: u32) -> Vec<Holder> {
    look(dev_id, |target, found| {
        target.add_loops(found);
        processes::add(&target.sought(false), found);
    })
}

/// Who has the control file of a device open: the daemon that serves it.
pub(super) fn servers(dev_id: u32) -> Vec<Holder> {
    watched(move |found| {
        let number = target::control_file(dev_id).map_err(|e| Holder::Unseen(e.to_string()));
        if let Some(number) = noted(found, number).flatten() {
            processes::add(&processes::Sought::control_file(number), found);
        }
    })
}

fn look(
    dev_id: u32,
    add: impl FnOnce(&Target, &mut BTreeSet<Holder>) + Send + 'static,
) -> Vec<Holder> {
    watched(move |found| {
        let target = Target::of(dev_id).map_err(|e| Holder::Unseen(e.to_string()));
        // Nobody can have a device that the kernel does not have, so then nothing is looked at that might be unreadable.
        if let Some(target) = noted(found, target).filter(Target::is_there) {
            add(&target, found);
        }
    })
}

/// Runs a look in a thread of its own. If the thread does not end in time, the device counts as in use.
fn watched(look: impl FnOnce(&mut BTreeSet<Holder>) + Send + 'static) -> Vec<Holder> {
    let (answers, answered) = mpsc::channel();
    let job = move || {
        let mut found = BTreeSet::new();
        look(&mut found);
        // Fails if the caller no longer waits, who then took the device for used.
        drop(answers.send(found));
    };
    if let Err(e) = task::spawn("ublk-look", job) {
        return vec![Holder::Unseen(e.to_string())];
    }
    answered.recv_timeout(LOOK_LIMIT).map_or_else(
        |_| {
            let seconds = LOOK_LIMIT.as_secs();
            vec![Holder::Unseen(format!(
                "the look at all processes has not ended within {seconds} seconds, as when a network file system is dead"
            ))]
        },
        |found| found.into_iter().collect(),
    )
}

/// Whether what was asked about is gone, as opposed to out of reach. A process that ends answers ESRCH.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODEV))
}

/// A file of the kernel; none if it is gone.
fn read(path: &Path) -> Result<Option<String>, Holder> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(unseen(path, &e)),
    }
}

/// The names in a folder of the kernel; none if it is gone.
fn names(folder: &Path) -> Result<Vec<std::ffi::OsString>, Holder> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if is_gone(&e) => return Ok(names),
        Err(e) => return Err(unseen(folder, &e)),
    };
    for entry in entries {
        match entry {
            Ok(entry) => names.push(entry.file_name()),
            Err(e) if is_gone(&e) => break,
            Err(e) => return Err(unseen(folder, &e)),
        }
    }
    Ok(names)
}

fn unseen(path: &Path, error: &io::Error) -> Holder {
    Holder::Unseen(format!("{}: cannot be read: {error}", path.display()))
}

/// The numbers among the names in a folder: processes, threads.
fn numbers(folder: &Path) -> Result<Vec<u32>, Holder> {
    let names = names(folder)?;
    Ok(names
        .iter()
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect())
}

/// The processes of this machine.
pub(super) fn processes() -> Result<Vec<u32>, Holder> {
    numbers(Path::new("/proc"))
}

/// What a look gave; a look that failed leaves its reason among the holders.
fn noted<T>(found: &mut BTreeSet<Holder>, looked: Result<T, Holder>) -> Option<T> {
    match looked {
        Ok(seen) => Some(seen),
        Err(holder) => {
            found.insert(holder);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(holders(u32::MAX), []);
        assert_eq!(servers(u32::MAX), []);
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc")]
    fn what_is_gone_is_nobody_and_what_cannot_be_read_is_somebody() {
        assert_eq!(names(Path::new("/proc/0/fd")), Ok(Vec::new()));
        // A file where a folder should be: not gone, and not readable as a folder.
        assert!(matches!(
            names(Path::new("/proc/self/stat")),
            Err(Holder::Unseen(_))
        ));
        assert!(matches!(
            read(Path::new("/proc/self/fd")),
            Err(Holder::Unseen(_))
        ));
    }
}
