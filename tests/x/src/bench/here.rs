//! The same jobs on this machine itself, where it has ublk.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::results::{OURS, Results};
use super::{Measured, SCRIPT};
use crate::{command, paths, test};

/// Who is measured: a machine's speed swings, so each has its turn again and again.
pub(super) const TARGETS: [&str; 3] = ["loop-z", OURS, "dm-thin"];
pub(super) const TURNS: usize = 5;

/// Runs the jobs.
pub(super) fn run(queues: u16, jobs: &[PathBuf], ours: &Path, rublk: &Path) -> Result<Measured> {
    for needed in ["/dev/ublk-control", "/dev/ram0"] {
        if !Path::new(needed).exists() {
            bail!(
                "{needed} is not there: modprobe ublk_drv; modprobe brd rd_size=1048576; and be root"
            );
        }
    }
    let folder = paths::target().join("bench-jobs");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    for job in jobs {
        let name = job.file_name().context("a job without a name")?;
        fs::copy(job, folder.join(name))?;
    }
    let turns = [TARGETS.join(" ").as_str()].repeat(TURNS).join(" ");
    let path: OsString = test::search_path(ours)?;
    let mut script = Command::new("sh");
    script
        .args(["-c", SCRIPT])
        .env("PATH", path)
        .env("TARGETS", turns)
        .env("QUEUES", queues.to_string())
        .env("JOBS", &folder)
        .env("RUBLK", rublk);
    eprintln!("x: measuring on this machine; this takes some minutes");
    let output = command::output(&mut script)?;
    let results = Results::read(&output)?;
    results.show_turns();
    let release = command::output(Command::new("uname").arg("-r"))?;
    Ok(Measured {
        results,
        kernel: release.trim().to_owned(),
    })
}

/// What it runs on.
pub(super) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = model.map_or("an unknown processor", |rest| {
        rest.trim_start_matches([' ', '\t', ':'])
    });
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} processors, {name}")
}
