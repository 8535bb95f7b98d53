//! What a process does to itself before it may serve a block device: a session and mounts of its own, no deadlock in
//! memory reclaim, no OOM kill. Each step is best effort; what could not be done is returned, to be logged.

#![expect(unsafe_code, reason = "no crate wraps PR_SET_IO_FLUSHER")]

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;
use std::fs;
use std::io;
use std::path::Path;

/// Leaves the terminal's session, so that closing it or ^C does not reach the daemon.
pub(super) fn leave_session() -> io::Result<()> {
    setsid().map(drop).map_err(io::Error::from)
}

/// Makes this process fit to serve block devices. To be called before any thread is started.
pub(super) fn prepare() -> Vec<String> {
    umask(Mode::from_bits_truncate(0o077));
    let steps: [(&str, io::Result<()>); 3] = [
        ("no mount namespace of its own", own_mounts()),
        (
            "memory reclaim may wait for its own devices",
            set_io_flusher(),
        ),
        (
            "it may be chosen by the OOM killer",
            fs::write("/proc/self/oom_score_adj", "-1000"),
        ),
    ];
    steps
        .into_iter()
        .filter_map(|(fact, done)| done.err().map(|e| format!("{fact}: {e}")))
        .collect()
}

/// A file system on one of the daemon's own devices must not be kept mounted by the daemon alone: when it dies, nobody
/// could unmount what only it could write back. So it leaves a mount namespace that may end before it does: any but
/// init's. It stays in init's, because a copy keeps every mount of the machine, also after others have unmounted it.
fn own_mounts() -> io::Result<()> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    if namespace("1").ok() == Some(namespace("self")?) {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Slaves: what is unmounted there is unmounted here too.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )?;
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    // The latest first: they may stand on one another.
    for point in mountinfo.lines().rev().filter_map(ublk_mount) {
        umount2(Path::new(&point), MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// The mount point of a line of mountinfo, if what is mounted there lies on a ublk device.
fn ublk_mount(line: &str) -> Option<String> {
    let (place, source) = line.split_once(" - ")?;
    let mut place = place.split(' ');
    let device = place.nth(2)?;
    let point = place.nth(1)?;
    // A btrfs has an anonymous number, but names its device as the source.
    let source = source.split(' ').nth(1)?;
    let name = source.strip_prefix("/dev/").unwrap_or_default();
    let is_ublk = lies_on_ublk(&Path::new("/sys/dev/block").join(device), 4)
        || (!name.is_empty() && lies_on_ublk(&Path::new("/sys/class/block").join(name), 4));
    is_ublk.then(|| unescape(point))
}

/// Whether a block device in sysfs is a ublk device, a partition of one, or stacked on one.
fn lies_on_ublk(device: &Path, depth: u32) -> bool {
    let Ok(device) = fs::canonicalize(device) else {
        return false;
    };
    let is_ublk =
        |part: &std::ffi::OsStr| part.to_str().is_some_and(|part| part.starts_with("ublkb"));
    if device.iter().any(is_ublk) {
        return true;
    }
    let Ok(below) = fs::read_dir(device.join("slaves")) else {
        return false;
    };
    depth > 0
        && below
            .flatten()
            .any(|slave| lies_on_ublk(&slave.path(), depth - 1))
}

/// The path behind mountinfo's octal escapes.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (code, rest) = part.split_at_checked(3).unwrap_or(("", part));
        match u8::from_str_radix(code, 8) {
            Ok(byte) => out.push(char::from(byte)),
            Err(_) => out.push_str(code),
        }
        out.push_str(rest);
    }
    out
}

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this process writes back what memory reclaim waits for. Threads inherit it.
fn set_io_flusher() -> io::Result<()> {
    // SAFETY: this prctl takes integers only.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape("/mnt"), "/mnt");
    }

    #[test]
    fn other_mounts_are_kept() {
        for line in [
            "",
            "22 1 0:20 / /proc rw - proc proc rw",
            "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        ] {
            assert_eq!(ublk_mount(line), None);
        }
    }
}
