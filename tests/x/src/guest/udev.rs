//! udev of Debian's releases, as trees to change root into: the guest runs the one that a test asks for, with the libraries
//! that it was built for, whatever this machine has.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use crate::{command, paths};

/// A release with the packages that its udev needs.
struct Release {
    name: &'static str,
    packages: &'static [&'static str],
}

/// Debian 12 has systemd 252, which does not know ublk's devices; Debian 13 has 257, which does.
const RELEASES: [Release; 2] = [
    Release {
        name: "bookworm",
        packages: &[
            "udev",
            "libacl1",
            "libblkid1",
            "libc6",
            "libcap2",
            "libkmod2",
            "liblzma5",
            "libpcre2-8-0",
            "libselinux1",
            "libssl3",
            "libudev1",
            "libzstd1",
            "lvm2",
        ],
    },
    Release {
        name: "trixie",
        packages: &[
            "udev",
            "libacl1",
            "libaudit1",
            "libblkid1",
            "libc6",
            "libcap-ng0",
            "libcap2",
            "libcrypt1",
            "libkmod2",
            "libmount1",
            "libpam0g",
            "libpcre2-8-0",
            "libseccomp2",
            "libselinux1",
            "libssl3t64",
            "libsystemd-shared",
            "libudev1",
            "libzstd1",
            "zlib1g",
            "lvm2",
        ],
    },
];

/// What a tree has besides: the folders' other names, the place that programs load their loader from, and udevd, which is
/// udevadm under another name.
const LINKS: [(&str, &str); 4] = [
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib/x86_64-linux-gnu"),
    ("usr/lib/systemd/systemd-udevd", "../../bin/udevadm"),
];

/// What of the packages is kept: udev itself, the rules of all of them, and libraries.
fn is_wanted(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    let is_below = |folder| path.starts_with(folder);
    (is_below("usr/bin") && name == "udevadm")
        || is_below("usr/lib/udev/rules.d")
        || (name.contains(".so")
            && (path.parent() == Some(Path::new("usr/lib/x86_64-linux-gnu"))
                || is_below("usr/lib/x86_64-linux-gnu/systemd")))
}

/// The folder with a tree for each release, fetched where it is not there yet.
pub(super) fn ensure() -> Result<PathBuf> {
    let folder = paths::guest_cache().join("udev");
    let wanted = RELEASES
        .map(|release| release.packages.join(" "))
        .join("\n");
    let is_cached = fs::read_to_string(folder.join("wanted")).is_ok_and(|cached| cached == wanted);
    if is_cached {
        return Ok(folder);
    }
    // Built beside and then renamed: the folder is there only as a whole.
    let unfinished = paths::guest_cache().join("udev.new");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).context("cannot clear udev's folder")?;
    }
    for release in &RELEASES {
        let root = unfinished.join(release.name);
        fetch(release, &root)
            .with_context(|| format!("cannot fetch udev of Debian {}", release.name))?;
    }
    fs::write(unfinished.join("wanted"), wanted).context("cannot write the list of packages")?;
    if folder.exists() {
        fs::remove_dir_all(&folder).context("cannot remove the older udev")?;
    }
    fs::rename(&unfinished, &folder).context("cannot name udev's folder")?;
    Ok(folder)
}

fn fetch(release: &Release, root: &Path) -> Result<()> {
    let unpacked = root.join("unpacked");
    fs::create_dir_all(&unpacked).context("cannot make a folder")?;
    let apt = Apt::of_release(
        &paths::guest_cache().join(format!("apt-{}", release.name)),
        release.name,
    )?;
    let packages: Vec<String> = release.packages.iter().map(|&name| name.into()).collect();
    apt.download(&packages, root)?;
    for file in fs::read_dir(root).context("cannot list the downloads")? {
        let file = file.context("cannot list the downloads")?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            command::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked))?;
            fs::remove_file(&file).context("cannot remove a download")?;
        }
    }
    keep(&unpacked, Path::new(""), root)?;
    fs::create_dir_all(root.join("usr/lib/systemd")).context("cannot make a folder")?;
    for (link, to) in LINKS {
        symlink(to, root.join(link)).with_context(|| format!("cannot make the link {link}"))?;
    }
    fs::remove_dir_all(&unpacked).context("cannot remove the unpacked packages")?;
    let loader = root.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    if !loader.exists() || !root.join("usr/bin/udevadm").exists() {
        bail!("the packages hold no udevadm, or nothing to load it");
    }
    Ok(())
}

/// Copies what is wanted below a folder of the unpacked packages. Debian 12 still packs some of it in /bin and /lib,
/// which are links to folders in /usr.
fn keep(unpacked: &Path, folder: &Path, root: &Path) -> Result<()> {
    let listed = unpacked.join(folder);
    for entry in
        fs::read_dir(&listed).with_context(|| format!("cannot list {}", listed.display()))?
    {
        let entry = entry.context("cannot list the packages' files")?;
        let path = folder.join(entry.file_name());
        let kind = entry.file_type().context("cannot see a file's type")?;
        if kind.is_dir() {
            keep(unpacked, &path, root)?;
            continue;
        }
        let merged = match path.starts_with("usr") {
            true => path.clone(),
            false => Path::new("usr").join(&path),
        };
        if !is_wanted(&merged) {
            continue;
        }
        // A library's other name is a link beside it: copied as a file.
        let content = fs::read(entry.path());
        let content = content.with_context(|| format!("cannot read {}", path.display()))?;
        let to = root.join(&merged);
        fs::create_dir_all(to.parent().unwrap_or(root)).context("cannot make a folder")?;
        fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
}
