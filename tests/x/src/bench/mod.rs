//! `x bench`: ublkctl against `rublk add loop`, in one guest whose clock counts instructions.
//!
//! The same RAM disk, the same queues and depth, in alternating order. What is compared is the work
//! per request, so a busy machine does not change the numbers.

mod table;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{command, guest, paths, setup};
use table::Results;

const PEER_VERSION: &str = "0.2.15";
const SCRIPT: &str = include_str!("guest.sh");
const SNAPSHOTS: &str = include_str!("snapshots.sh");
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// What is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The guest's kernel: "new" or "6.12"
    #[arg(long, default_value = "new")]
    kernel: guest::Kernel,
    /// Only the jobs whose name contains this
    #[arg(long, default_value = "")]
    job: String,
    /// The targets, in this order: rublk, rublk-zc (its zero-copy mode), ublkctl
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "rublk,ublkctl,ublkctl,rublk,rublk,ublkctl"
    )]
    targets: Vec<String>,
    /// Measure how long a snapshot takes, instead: for 1 GiB and for LARGEST GiB of mapped blocks
    #[arg(long)]
    snapshots: bool,
    /// See --snapshots
    #[arg(long, default_value_t = 64, value_name = "GIB")]
    largest: u32,
    /// Print the table, leave docs/performance.md as it is
    #[arg(long)]
    dry_run: bool,
}

/// Runs the jobs and prints the table.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::install_missing()?;
    if options.snapshots {
        return snapshots(options);
    }
    let mut job = guest::Job::new(
        options.kernel,
        &format!("TARGETS='{}'\n{SCRIPT}", options.targets.join(" ")),
        LIMIT,
    );
    job.instruction_clock = true;
    job.silent = true;
    for file in jobs(&options.job)? {
        job.add_to_root(&file)?;
    }
    if options
        .targets
        .iter()
        .any(|target| target.starts_with("rublk"))
    {
        job.add_to_root(&peer()?)?;
    }
    if options.targets.iter().any(|target| target == "ublkctl") {
        job.add_program(&command::build_ublkctl()?, "ublkctl");
    }
    eprintln!("x: measuring in a guest; this takes some minutes");
    let outcome = job.run()?;
    if outcome.status != 0 {
        bail!("the guest failed:\n{}", outcome.output);
    }
    let results = Results::read(&outcome.output)?;
    results.show_turns();
    let text = results.text(&outcome.kernel, &options.targets);
    print!("{text}");
    if !options.dry_run {
        table::write(&page(), "speeds", &text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn snapshots(options: &Options) -> Result<ExitCode> {
    let script = format!("LARGEST={}\n{SNAPSHOTS}", options.largest);
    let mut job = guest::Job::new(options.kernel, &script, LIMIT);
    job.instruction_clock = true;
    job.silent = true;
    job.add_program(&command::build_ublkctl()?, "ublkctl");
    eprintln!(
        "x: writing {} GiB in a guest; this takes some minutes",
        options.largest
    );
    let outcome = job.run()?;
    if outcome.status != 0 {
        bail!("the guest failed:\n{}", outcome.output);
    }
    let text = table::snapshots(&outcome.output, &outcome.kernel)?;
    print!("{text}");
    if !options.dry_run {
        table::write(&page(), "snapshots", &text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page() -> PathBuf {
    paths::root().join("docs/performance.md")
}

fn jobs(wanted: &str) -> Result<Vec<PathBuf>> {
    let folder = paths::root().join("fio-jobs");
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = files
        .filter(|file| file.extension().is_some_and(|extension| extension == "fio"))
        .filter(|file| {
            file.file_stem()
                .is_some_and(|name| name.to_string_lossy().contains(wanted))
        })
        .collect();
    files.sort();
    if files.is_empty() {
        bail!("no job in {} is called so", folder.display());
    }
    Ok(files)
}

/// The peer's program, built once.
fn peer() -> Result<PathBuf> {
    let root = paths::target().join("peers");
    let program = root.join("bin/rublk");
    if !program.exists() {
        let mut cargo: Command = command::cargo();
        cargo
            .args([
                "install",
                "--quiet",
                "--locked",
                "rublk",
                "--version",
                PEER_VERSION,
                "--root",
            ])
            .arg(&root);
        command::run_shown(&mut cargo)?;
    }
    Ok(program)
}
