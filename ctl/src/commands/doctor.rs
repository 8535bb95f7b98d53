//! `doctor`: is this machine able to attach volumes, and if not, what to do.

use crate::exit_code::{FAILED, OK};
use crate::output::{self, Align, Format, Table};
use crate::state;
use crate::ublk_stub as ublk;
use blockfork::error::Result;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::getuid;
use serde::Serialize;
use std::fs;
use std::path::Path;

/// Descriptors that a device takes: its node, the pool's file, a ring a queue.
const DESCRIPTORS_WANTED: u64 = 4096;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    check: String,
    ok: bool,
    fact: String,
    way_out: Option<String>,
}

impl Finding {
    fn new(check: impl Into<String>, ok: bool, fact: impl Into<String>, way_out: &str) -> Self {
        Self {
            check: check.into(),
            ok,
            fact: fact.into(),
            way_out: (!ok).then(|| way_out.to_owned()),
        }
    }
}

pub(super) fn doctor(format: Format) -> Result<u8> {
    let mut findings = vec![kernel(), user(), descriptors(), own_boot_id()];
    for (variable, path) in state::directories()? {
        findings.push(directory(variable, &path));
    }
    for check in ublk::driver().checks {
        findings.push(Finding::new(
            check.name,
            check.ok,
            check.fact,
            &check.way_out,
        ));
    }
    let is_able = findings.iter().all(|finding| finding.ok);
    if format.json {
        output::json(&findings)?;
    } else {
        let columns = ["check", "ok", "fact", "way out"].map(|name| (name, Align::Left));
        let mut table = Table::new(columns);
        for finding in findings {
            let ok = if finding.ok { "yes" } else { "NO" };
            table.row(vec![
                finding.check,
                ok.to_owned(),
                finding.fact,
                finding.way_out.unwrap_or_default(),
            ]);
        }
        table.print(format)?;
    }
    Ok(if is_able { OK } else { FAILED })
}

fn kernel() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(release) => Finding::new("kernel", true, release.trim(), ""),
        Err(e) => Finding::new("kernel", false, format!("unknown: {e}"), "mount /proc"),
    }
}

fn user() -> Finding {
    let uid = getuid();
    Finding::new(
        "root",
        uid.is_root(),
        format!("user {uid}"),
        "run as root: devices need CAP_SYS_ADMIN",
    )
}

fn descriptors() -> Finding {
    let way_out = "raise it with `ulimit -n` or LimitNOFILE=: each device takes some";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) => Finding::new(
            "open files",
            hard >= DESCRIPTORS_WANTED,
            format!("at most {hard}"),
            way_out,
        ),
        Err(e) => Finding::new("open files", false, format!("unknown: {e}"), way_out),
    }
}

fn own_boot_id() -> Finding {
    match state::boot_id() {
        Ok(_) => Finding::new("boot id", true, "there", ""),
        Err(e) => Finding::new("boot id", false, e.to_string(), "mount /proc"),
    }
}

/// A directory that is there, or can be made.
fn directory(variable: &str, path: &Path) -> Finding {
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let is_writable = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK).is_ok();
    let fact = match (is_writable, existing == path) {
        (true, true) => "writable",
        (true, false) => "made when it is needed",
        (false, _) => "not writable",
    };
    Finding::new(
        path.display().to_string(),
        is_writable,
        fact,
        &format!("run as root, or set {variable}"),
    )
}
