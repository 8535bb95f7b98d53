//! What the rest needs on a Debian machine, installed when it is missing.
//!
//! The network is touched only when something is missing.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::command;

/// Compilers and libclang for the ublk bindings, then what the guest is made of, and clients of NBD.
const PACKAGES: [&str; 17] = [
    "clang",
    "gcc",
    "libc6-dev",
    "libclang-dev",
    "pkg-config",
    "btrfs-progs",
    "busybox-static",
    "dmsetup",
    "e2fsprogs",
    "fdisk",
    "fio",
    "libnbd-bin",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
    "xfsprogs",
    "xz-utils",
];

/// Makes sure that every package is there, or says in one line what to install.
pub fn install_missing() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    let Some(become_root) = become_root() else {
        bail!(
            "missing packages: {0}; install them with: sudo apt-get install {0}",
            missing.join(" ")
        );
    };
    eprintln!("x: installing {}", missing.join(" "));
    let apt = || {
        let mut words = become_root.iter().copied().chain([
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "-q",
        ]);
        let mut command = Command::new(words.next().unwrap_or("env"));
        command.args(words).stdout(std::io::stderr());
        command
    };
    command::run_shown(apt().arg("update"))?;
    command::run_shown(
        apt()
            .args(["install", "-y", "--no-install-recommends"])
            .args(&missing),
    )?;
    Ok(())
}

fn missing() -> Result<Vec<&'static str>> {
    // dpkg-query fails when a name is unknown to it, and still prints the others.
    let known = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .context("cannot start dpkg-query: this needs Debian or a system made from it")?;
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let installed = |package: &str| {
        known
            .lines()
            .any(|line| line == format!("{package} installed"))
    };
    Ok(PACKAGES
        .into_iter()
        .filter(|package| !installed(package))
        .collect())
}

/// The words to put before a command to run it as root; none where that needs a person.
fn become_root() -> Option<&'static [&'static str]> {
    if is_root() {
        return Some(&[]);
    }
    let sudo = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    sudo.is_ok_and(|status| status.success())
        .then_some(&["sudo", "-n"])
}

/// Whether this process may do everything.
pub fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1));
    effective == Some("0")
}
