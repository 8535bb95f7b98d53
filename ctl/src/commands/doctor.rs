//! `doctor`: is this machine able to attach volumes, and if not, what to do.

use super::{device, trial};
use crate::exit_code::{FAILED, OK, one_line};
use crate::output::{self, Align, Format, Table};
use crate::state;
use blockfork::error::{ErrorKind, Result};
use blockfork::ublk::{self, Check};
use nix::unistd::{AccessFlags, access};
use std::path::Path;

pub(super) fn doctor(format: Format) -> Result<u8> {
    let mut driver = ublk::driver();
    driver.checks.push(boot_id());
    for (variable, path) in state::directories()? {
        driver.checks.push(directory(variable, &path));
    }
    driver.checks.push(orphans());
    // What is known to be amiss would only fail again.
    if driver.is_able() {
        driver.checks.push(trial(&driver.kernel_release));
    }
    let is_able = driver.is_able();
    if format.json {
        output::json(&driver)?;
    } else {
        let columns = ["check", "ok", "fact", "way out"].map(|name| (name, Align::Left));
        let mut table = Table::new(columns);
        for check in driver.checks {
            let ok = if check.ok { "yes" } else { "NO" };
            table.row(vec![
                check.name,
                ok.to_owned(),
                check.fact,
                check.way_out.unwrap_or_default(),
            ]);
        }
        table.print(format)?;
    }
    Ok(if is_able { OK } else { FAILED })
}

fn check(
    name: impl Into<String>,
    ok: bool,
    fact: impl Into<String>,
    way_out: impl Into<String>,
) -> Check {
    Check {
        name: name.into(),
        ok,
        fact: fact.into(),
        way_out: (!ok).then(|| way_out.into()),
    }
}

fn boot_id() -> Check {
    let (ok, fact) = match state::boot_id() {
        Ok(_) => (true, "known".to_owned()),
        Err(e) => (false, one_line(&e)),
    };
    check("boot id", ok, fact, "mount /proc")
}

/// Does what `attach` does, with a device of its own. No look at rights and files tells as much: in a container the
/// driver may answer, and yet the nodes of its devices appear in another `/dev`, or may not be opened.
fn trial(kernel_release: &str) -> Check {
    const NAME: &str = "trial device";
    // How Ubuntu names its kernels of that version, some of which crash in ADD_DEV.
    if kernel_release.starts_with("6.17.0-") {
        let fact = "not tried: some kernels of this name crash when a ublk device is added";
        return check(NAME, true, fact, "");
    }
    match trial::run() {
        Ok(()) => check(NAME, true, "added, read and removed", ""),
        Err(e) => {
            let way_out = match e.kind() {
                ErrorKind::NotFound | ErrorKind::Permission => {
                    "the nodes of ublk devices must appear in /dev, and opening them must be allowed: in a container, \
                     mount the host's /dev and allow its devices (`docker run --privileged -v /dev:/dev`), or run \
                     ublkctl on the host"
                }
                ErrorKind::AlreadyExists
                | ErrorKind::Busy
                | ErrorKind::Invalid
                | ErrorKind::OutOfSpace
                | ErrorKind::Corrupt
                | ErrorKind::Unsupported
                | ErrorKind::Poisoned
                | ErrorKind::ReadOnly
                | ErrorKind::Io
                | ErrorKind::OverQuota => "see the kernel's log (`dmesg`)",
            };
            check(NAME, false, one_line(&e), way_out)
        }
    }
}

/// A directory that is there, or can be made.
fn directory(variable: &str, path: &Path) -> Check {
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let is_writable = access(existing, AccessFlags::W_OK).is_ok();
    let fact = match (is_writable, existing == path) {
        (true, true) => "writable",
        (true, false) => "made when it is needed",
        (false, _) => "not writable",
    };
    check(
        path.display().to_string(),
        is_writable,
        fact,
        format!("run as root, or set {variable}"),
    )
}

/// Devices of a daemon that was killed just when it made them, so that no pool knows them.
fn orphans() -> Check {
    match device::strays() {
        Ok(strays) if strays.is_empty() => check("stray devices", true, "none", ""),
        Ok(strays) => {
            let nodes = strays.join(" ");
            check(
                "stray devices",
                false,
                &*nodes,
                format!("run `ublkctl detach --force {nodes}`"),
            )
        }
        // Without the driver there are none, and the lines above say so.
        Err(e) => check(
            "stray devices",
            true,
            format!("unknown: {}", one_line(&e)),
            "",
        ),
    }
}
