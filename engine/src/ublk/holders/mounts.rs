//! Mounts and swap space on a device, in every mount namespace that a process is in.

use super::target::Target;
use super::{Holder, Process, is_gone, noted, processes, read, unseen};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Adds everything that claims a device: mounts, swap space, block devices on top.
pub(super) fn add(target: &Target, found: &mut BTreeSet<Holder>) {
    let has_swap = has_swap(target);
    if noted(found, has_swap) == Some(true) {
        found.insert(Holder::Swap);
    }
    target.add_devices_on_top(found);
    let mut namespaces = BTreeSet::new();
    // This process first: mounts that it sees need no witness.
    let own = PathBuf::from("/proc/self");
    let added = add_mounts(target, &own, None, &mut namespaces, found);
    noted(found, added);
    for pid in noted(found, processes()).unwrap_or_default() {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let added = add_mounts(target, &folder, Some(pid), &mut namespaces, found);
        noted(found, added);
    }
}

fn has_swap(target: &Target) -> Result<bool, Holder> {
    let is_swap = |line: &str| {
        let path = line.split(' ').next().map(unescape);
        path.is_some_and(|path| target.is_node(&path))
    };
    let swaps = read(Path::new("/proc/swaps"))?.unwrap_or_default();
    Ok(swaps.lines().any(is_swap))
}

/// Adds the mounts that a process sees, if its mount namespace was not looked at yet.
fn add_mounts(
    target: &Target,
    process: &Path,
    pid: Option<u32>,
    namespaces: &mut BTreeSet<PathBuf>,
    found: &mut BTreeSet<Holder>,
) -> Result<(), Holder> {
    let namespace = process.join("ns/mnt");
    match fs::read_link(&namespace) {
        Ok(namespace) => {
            if !namespaces.insert(namespace) {
                return Ok(());
            }
        }
        // A process that has ended, but that nobody waited for yet, is in no namespace.
        Err(e) if is_gone(&e) => return Ok(()),
        Err(e) => return Err(unseen(&namespace, &e)),
    }
    let mountinfo = read(&process.join("mountinfo"))?.unwrap_or_default();
    for line in mountinfo.lines() {
        let Some(mount) = Mount::parse(line) else {
            continue;
        };
        // btrfs shows a number of its own, so its source counts too.
        if target.has_number(mount.number) || target.is_node(&unescape(mount.source)) {
            found.insert(Holder::Mount {
                at: unescape(mount.at),
                seen_by: pid.map(Process::of),
            });
        }
    }
    Ok(())
}

/// The fields of a line of `mountinfo` that matter here.
pub(in crate::ublk) struct Mount<'a> {
    pub(in crate::ublk) id: u64,
    pub(in crate::ublk) number: &'a str,
    pub(in crate::ublk) at: &'a str,
    pub(in crate::ublk) kind: &'a str,
    pub(in crate::ublk) source: &'a str,
}

impl<'a> Mount<'a> {
    pub(in crate::ublk) fn parse(line: &'a str) -> Option<Self> {
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

/// Undoes the kernel's `\040` for a blank.
pub(in crate::ublk) fn unescape(field: &str) -> String {
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
}
