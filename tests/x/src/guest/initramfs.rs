//! The guest's file system: busybox, the programs under test and their libraries, all in memory.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel::Installed;
use crate::{command, paths};

/// Prepares the guest, runs /command, and says how it ended.
const INIT: &str = include_str!("init.sh");

/// Taken from this machine. What else a script needs, busybox has.
const PROGRAMS: [&str; 35] = [
    "blkdiscard",
    "blockdev",
    "btrfs",
    "cmp",
    "cp",
    "dash",
    "date",
    "dd",
    "dmsetup",
    "dumpe2fs",
    "e2fsck",
    "fallocate",
    "find",
    "findmnt",
    "fio",
    "fsfreeze",
    "losetup",
    "lsblk",
    "mkfs.btrfs",
    "mkfs.ext4",
    "mkfs.xfs",
    "mount",
    "prlimit",
    "resize2fs",
    "sfdisk",
    "sha256sum",
    "sync",
    "tail",
    "truncate",
    "umount",
    "unshare",
    "wipefs",
    "xfs_growfs",
    "xfs_io",
    "xfs_repair",
];

/// Where programs are looked for: the administrator's come first, and not everybody has them in PATH.
const SEARCH: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// A program of this machine.
pub(super) fn find(name: &str) -> Result<PathBuf> {
    SEARCH
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed: run cargo x setup"))
}

/// An image on this machine's disk, removed when dropped.
#[derive(Debug)]
pub(super) struct Image(PathBuf);

impl Image {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("x: cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Packs everything that one boot needs.
pub(super) fn build(
    kernel: &Installed,
    script: &str,
    files: &[(PathBuf, String)],
    trees: &[(PathBuf, String)],
) -> Result<Image> {
    // Guests of one process may run beside each other.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("initramfs.{}.{number}", std::process::id());
    let path = paths::guest_cache().join(name);
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let image = Image(path);
    let mut tree = Tree {
        archive: Archive::new(BufWriter::new(file)),
        present: BTreeSet::new(),
    };
    tree.system(kernel)?;
    for name in PROGRAMS {
        tree.program(&find(name)?, &format!("/usr/bin/{name}"))?;
    }
    tree.program(
        &std::env::current_exe().context("cannot find this program")?,
        "/usr/bin/x",
    )?;
    for (from, to) in files {
        tree.program(from, to)?;
    }
    for (from, to) in trees {
        tree.folder(from, to)?;
    }
    tree.busybox()?;
    tree.put("/command", script.as_bytes())?;
    tree.archive
        .finish()
        .context("cannot write the guest's file system")?;
    Ok(image)
}

struct Tree {
    archive: Archive<BufWriter<File>>,
    present: BTreeSet<String>,
}

impl Tree {
    fn put(&mut self, path: &str, content: &[u8]) -> Result<()> {
        if self.present.insert(path.to_owned()) {
            self.archive
                .file(path, content)
                .with_context(|| format!("cannot pack {path}"))?;
        }
        Ok(())
    }

    fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.put(to, &content)
    }

    /// A folder with all that is in it, nothing added.
    fn folder(&mut self, from: &Path, to: &str) -> Result<()> {
        let failed = || format!("cannot list {}", from.display());
        for entry in fs::read_dir(from).with_context(failed)? {
            let entry = entry.with_context(failed)?;
            let to = format!("{to}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().with_context(failed)?;
            if kind.is_dir() {
                self.folder(&entry.path(), &to)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).with_context(failed)?;
                let linked = self.archive.link(&to, &target.to_string_lossy());
                linked.context("cannot pack a link")?;
            } else {
                self.copy(&entry.path(), &to)?;
            }
        }
        Ok(())
    }

    /// The skeleton: folders to mount on, a few lines of /etc, the kernel's modules.
    fn system(&mut self, kernel: &Installed) -> Result<()> {
        for folder in [
            "/dev", "/proc", "/sys", "/run", "/tmp", "/mnt", "/srv", "/root", "/var/lib", "/sbin",
            "/etc",
        ] {
            self.archive
                .folder(folder)
                .context("cannot pack a folder")?;
        }
        self.put("/init", INIT.as_bytes())?;
        self.put("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")?;
        self.put("/etc/group", b"root:x:0:\ndisk:x:6:\n")?;
        if Path::new("/etc/mke2fs.conf").exists() {
            self.copy(Path::new("/etc/mke2fs.conf"), "/etc/mke2fs.conf")?;
        }
        self.archive
            .link("/etc/mtab", "/proc/self/mounts")
            .context("cannot pack a link")?;
        for file in fs::read_dir(&kernel.modules).context("cannot list the modules")? {
            let file = file.context("cannot list the modules")?;
            let name = file.file_name();
            self.copy(
                &file.path(),
                &format!("/lib/modules/{}/{}", kernel.release, name.to_string_lossy()),
            )?;
        }
        Ok(())
    }

    /// A program with the libraries that it loads; a file that is no program stays alone.
    fn program(&mut self, from: &Path, to: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let is_program = content.starts_with(b"\x7fELF");
        self.put(to, &content)?;
        if !is_program {
            return Ok(());
        }
        // ldd fails for a static program, which needs nothing.
        let listed = Command::new("ldd")
            .arg(from)
            .output()
            .context("cannot start ldd")?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"
            let library = line.split_once("=> ").map_or(line, |(_, path)| path).trim();
            let library = library.split(" (").next().unwrap_or(library);
            if library.starts_with('/') && !self.present.contains(library) {
                self.copy(Path::new(library), library)?;
            }
        }
        Ok(())
    }

    /// Busybox, under every name for which the real program is not there.
    fn busybox(&mut self) -> Result<()> {
        let busybox = find("busybox")?;
        self.copy(&busybox, "/bin/busybox")?;
        // Busybox's own shell would prefer its applets to the real programs.
        self.archive
            .link("/bin/sh", "/usr/bin/dash")
            .context("cannot pack a link")?;
        let applets = command::output(Command::new(&busybox).arg("--list"))?;
        for applet in applets
            .lines()
            .filter(|applet| !["busybox", "sh"].contains(applet))
        {
            if !self.present.contains(&format!("/usr/bin/{applet}")) {
                self.archive
                    .link(&format!("/bin/{applet}"), "busybox")
                    .context("cannot pack a link")?;
            }
        }
        // The kernel asks this one for the module of a file system.
        self.archive
            .link("/sbin/modprobe", "/bin/busybox")
            .context("cannot pack a link")
    }
}
