//! Processes that have a device open or mapped, under whatever path: each descriptor and each mapped file of every thread
//! is compared by device number.

#![expect(unsafe_code, reason = "kcmp has no wrapper")]

use super::target::{Number, file_type, status};
use super::{Holder, Process, is_gone, names, noted, numbers, processes, unseen};
use rustix::fs::{FileType, Statx};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// How often the mapped files of a process are listed again because some went away meanwhile.
const MAPPINGS_TRIES: u32 = 8;

/// What is looked for.
pub(super) struct Sought {
    file_type: FileType,
    numbers: Vec<Number>,
    /// Whether files on the file systems of these devices count too.
    files: bool,
    /// A process that does not count.
    leaves_out: Option<u32>,
}

impl Sought {
    /// Block devices, in all processes but this one, which may have claimed them.
    pub(super) fn block_devices(numbers: Vec<Number>, files: bool) -> Self {
        Self {
            file_type: FileType::BlockDevice,
            numbers,
            files,
            leaves_out: Some(std::process::id()),
        }
    }

    /// A control file, in all processes: this one may be serving the device.
    pub(super) fn control_file(number: Number) -> Self {
        Self {
            file_type: FileType::CharacterDevice,
            numbers: vec![number],
            files: false,
            leaves_out: None,
        }
    }

    fn is_device(&self, status: &Statx) -> bool {
        file_type(status) == self.file_type
            && self
                .numbers
                .contains(&(status.stx_rdev_major, status.stx_rdev_minor))
    }

    fn is_file(&self, status: &Statx) -> bool {
        self.files
            && self
                .numbers
                .contains(&(status.stx_dev_major, status.stx_dev_minor))
    }
}

/// Adds the processes that have what is sought.
pub(super) fn add(sought: &Sought, found: &mut BTreeSet<Holder>) {
    if sought.numbers.is_empty() {
        return;
    }
    let pids = noted(found, processes()).unwrap_or_default();
    for pid in pids {
        if sought.leaves_out == Some(pid) {
            continue;
        }
        let added = add_process(pid, sought, found);
        noted(found, added);
    }
}

fn add_process(pid: u32, sought: &Sought, found: &mut BTreeSet<Holder>) -> Result<(), Holder> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let tasks = folder.join("task");
    let threads = numbers(&tasks)?;
    for &thread in &threads {
        // A thread can have a table of descriptors of its own, and outlive the first one.
        if thread != pid && shares_descriptors(pid, thread) {
            continue;
        }
        let descriptors = tasks.join(thread.to_string()).join("fd");
        for name in names(&descriptors)? {
            match look_at(&descriptors.join(name), sought)? {
                Seen::Device => found.insert(Holder::Process(Process::of(pid))),
                Seen::File => found.insert(Holder::File(Process::of(pid))),
                // A descriptor that was closed meanwhile has let go.
                Seen::Other | Seen::Gone => false,
            };
        }
    }
    let mappings = add_mappings(pid, &folder, sought, found)?;
    if mappings == 0 && threads.len() > 1 {
        // The first thread has ended, and the kernel shows mapped files only through it.
        let process = Process::of(pid);
        let fact =
            format!("the mapped files of {process} cannot be seen, its first thread has ended");
        return Err(Holder::Unseen(fact));
    }
    for place in ["cwd", "root"] {
        // They name who is in the way of an unmount, and are no more than that: unreadable says nothing.
        if sought.files && status(&folder.join(place)).is_ok_and(|status| sought.is_file(&status)) {
            found.insert(Holder::File(Process::of(pid)));
        }
    }
    Ok(())
}

/// Adds the process if it has the device mapped; how many files it has mapped.
fn add_mappings(
    pid: u32,
    folder: &Path,
    sought: &Sought,
    found: &mut BTreeSet<Holder>,
) -> Result<usize, Holder> {
    let mappings = folder.join("map_files");
    for _ in 0..MAPPINGS_TRIES {
        let names = names(&mappings)?;
        let mut is_whole = true;
        for name in &names {
            match look_at(&mappings.join(name), sought)? {
                Seen::Device => {
                    found.insert(Holder::Mapping(Process::of(pid)));
                }
                Seen::File => {
                    found.insert(Holder::File(Process::of(pid)));
                }
                Seen::Other => {}
                // Unmapped, or split or joined: then it has another name now.
                Seen::Gone => is_whole = false,
            }
        }
        if is_whole || !folder.exists() {
            return Ok(names.len());
        }
    }
    let fact = format!(
        "the mapped files of {} change all the time",
        Process::of(pid)
    );
    Err(Holder::Unseen(fact))
}

/// What a link below /proc leads to.
enum Seen {
    Device,
    File,
    Other,
    Gone,
}

fn look_at(link: &Path, sought: &Sought) -> Result<Seen, Holder> {
    let named = match fs::read_link(link) {
        Ok(named) => named,
        Err(e) if is_gone(&e) => return Ok(Seen::Gone),
        Err(e) => return Err(unseen(link, &e)),
    };
    // Sockets, pipes and the like have no path: `socket:[4711]`.
    if !named.is_absolute() && !named.as_os_str().as_encoded_bytes().starts_with(b"(") {
        return Ok(Seen::Other);
    }
    match status(link) {
        Ok(status) if sought.is_device(&status) => Ok(Seen::Device),
        Ok(status) if sought.is_file(&status) => Ok(Seen::File),
        Ok(_) => Ok(Seen::Other),
        Err(e) if is_gone(&e) => Ok(Seen::Gone),
        // A file of a network file system that the server removed: no device.
        Err(e) if e.raw_os_error() == Some(libc::ESTALE) => Ok(Seen::Other),
        Err(e) => Err(unseen(link, &e)),
    }
}

/// `KCMP_FILES` of `linux/kcmp.h`.
const KCMP_FILES: libc::c_int = 2;

/// Whether two threads have one table of descriptors. If the kernel does not say so, they count as apart.
fn shares_descriptors(first: u32, second: u32) -> bool {
    // SAFETY: this system call takes integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, first, second, KCMP_FILES, 0_u64, 0_u64) };
    order == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc")]
    fn a_process_that_has_a_device_open_is_found_and_a_closed_one_is_not() {
        // /dev/full stands for a control file: nobody else has it open.
        let number = (1, 7);
        let sought = Sought::control_file(number);
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(fs::File::open("/dev/full").unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut found = BTreeSet::new();
        add_process(child.id(), &sought, &mut found).unwrap();
        assert!(
            matches!(found.first(), Some(Holder::Process(process)) if process.pid == child.id()),
            "{found:?}"
        );
        child.kill().unwrap();
        // Ended, but not waited for: it has nothing open any more.
        child.wait().unwrap();
        found.clear();
        add_process(child.id(), &sought, &mut found).unwrap();
        assert!(found.is_empty());
    }
}
