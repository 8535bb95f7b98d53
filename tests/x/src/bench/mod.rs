//! `x bench`: ublkctl against its peers, in one guest whose clock counts instructions.
//!
//! The same RAM disk, the same queues and depth, in alternating order. What is compared is the work
//! per request, so a busy machine does not change the numbers. Or on this machine, if it has ublk, or against ourselves.

mod chart;
mod earlier;
mod here;
mod results;
mod scenarios;
mod table;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{command, guest, paths, setup};
use results::Results;

const PEER_VERSION: &str = "0.2.15";
const SCRIPT: &str = include_str!("guest.sh");
const SNAPSHOTS: &str = include_str!("snapshots.sh");
const SCENARIOS: &str = include_str!("scenarios.sh");
const LIMIT: Duration = Duration::from_secs(60 * 60);
/// Peers that are rublk's.
const RUBLK: [&str; 3] = ["null", "loop", "loop-z"];
/// Peers that are programs of this machine, put into the guest where they are measured.
const PROGRAMS: [(&str, &[&str]); 1] = [("qcow2", &["qemu-img", "qemu-nbd"])];

/// What is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The guest's kernel: "new" or "6.12"
    #[arg(long, default_value = "new")]
    kernel: guest::Kernel,
    /// Only the jobs whose name contains one of these
    #[arg(long, value_delimiter = ',')]
    job: Vec<String>,
    /// The targets, in this order: raw, null, loop, loop-z (these three are rublk's), dm-thin, dm-snapshot, btrfs, qcow2,
    /// ublkctl
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "loop-z,ublkctl,dm-thin,loop,null,raw,dm-snapshot,btrfs,qcow2,dm-thin,ublkctl,loop-z"
    )]
    targets: Vec<String>,
    /// Queues of each ublk device
    #[arg(long, default_value_t = 2)]
    queues: u16,
    /// With one processor, so that the time of a daemon on it is its own: instructions per request, instead of speeds
    #[arg(long)]
    instructions: bool,
    /// Measure how long a snapshot takes, instead: for 1 GiB and for LARGEST GiB of mapped blocks
    #[arg(long)]
    snapshots: bool,
    /// See --snapshots
    #[arg(long, default_value_t = 64, value_name = "GIB")]
    largest: u32,
    /// Measure what a job on one volume does not show, instead; all of it, or only these
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SCENARIO",
        num_args = 0..,
        default_missing_values = scenarios::NAMES,
        value_parser = scenarios::NAMES
    )]
    scenarios: Vec<String>,
    /// On this machine itself, as root, with ublk, and a /dev/ram0 that is overwritten: five turns of each target
    #[arg(long, conflicts_with_all = ["instructions", "snapshots", "scenarios"])]
    native: bool,
    /// Only ublkctl, as it is and as it was at a commit: what became faster or slower since
    #[arg(long, value_name = "REV", conflicts_with_all = ["snapshots", "scenarios", "native"])]
    against: Option<String>,
    /// Print the tables, leave docs/performance.md as it is
    #[arg(long)]
    dry_run: bool,
}

/// What the script printed, and where it ran.
struct Measured {
    results: Results,
    kernel: String,
}

/// Runs the jobs and prints the tables.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::install_missing()?;
    if options.snapshots {
        return snapshots(options);
    }
    if !options.scenarios.is_empty() {
        return around_a_load(options);
    }
    if let Some(revision) = &options.against {
        return against(options, revision);
    }
    if options.native {
        return natively(options);
    }
    let ours = if options.targets.iter().any(|target| target == results::OURS) {
        Some(command::build_ublkctl()?)
    } else {
        None
    };
    let measured = in_guest(options, &options.targets, ours.as_deref())?;
    let results = &measured.results;
    let machine = machine(options, &measured);
    let (part, text) = if options.instructions {
        ("instructions", table::instructions(results) + &machine)
    } else {
        let tables = table::goals(results) + "\n" + &table::speeds(results);
        ("speeds", tables + &machine)
    };
    print!("{text}");
    if options.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = text;
    if !options.instructions {
        for (name, title) in chart::write(results, &page().with_file_name("performance"))? {
            writeln!(text, "\n![{title}](performance/{name}.svg)")?;
        }
    }
    table::write(&page(), part, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the jobs on the targets in the guest; `ours` is the ublkctl that is measured.
fn in_guest(options: &Options, targets: &[String], ours: Option<&Path>) -> Result<Measured> {
    let queues = if options.instructions {
        1
    } else {
        options.queues
    };
    let script = format!("TARGETS='{}' QUEUES={queues}\n{SCRIPT}", targets.join(" "));
    let mut job = guest::Job::new(options.kernel, &script, LIMIT);
    job.instruction_clock = true;
    job.silent = true;
    if options.instructions {
        job.processors = 1;
    }
    for file in jobs(&options.job)? {
        job.add_to_root(&file)?;
    }
    let measures = |name: &str| targets.iter().any(|target| target == name);
    if RUBLK.into_iter().any(measures) {
        job.add_to_root(&peer()?)?;
    }
    for (target, programs) in PROGRAMS {
        if measures(target) {
            for program in programs {
                job.add_installed(program)?;
            }
        }
    }
    if let Some(ours) = ours {
        job.add_program(ours, "ublkctl");
    }
    eprintln!("x: measuring in a guest; this takes some minutes");
    let outcome = job.run()?;
    if outcome.status != 0 {
        bail!("the guest failed:\n{}", without_results(&outcome.output));
    }
    let results = Results::read(&outcome.output)?;
    results.show_turns();
    Ok(Measured {
        results,
        kernel: outcome.kernel,
    })
}

/// What a script said besides its figures.
fn without_results(output: &str) -> String {
    let said: Vec<_> = output
        .lines()
        .filter(|line| !line.starts_with('@'))
        .collect();
    said.join("\n")
}

fn against(options: &Options, revision: &str) -> Result<ExitCode> {
    let (commit, then) = earlier::build(revision)?;
    let now = command::build_ublkctl()?;
    let ours = [results::OURS.to_owned()];
    let before = in_guest(options, &ours, Some(&then))?;
    let after = in_guest(options, &ours, Some(&now))?;
    print!(
        "{}",
        table::since(
            &commit,
            &before.results,
            &after.results,
            options.instructions
        )
    );
    Ok(ExitCode::SUCCESS)
}

fn natively(options: &Options) -> Result<ExitCode> {
    let wanted = jobs(&options.job)?;
    let measured = here::run(
        options.queues,
        &wanted,
        &command::build_ublkctl()?,
        &peer()?,
    )?;
    let results = &measured.results;
    let text = format!(
        "{}\n{}\nMeasured with `cargo x bench --native`: {} in turns, {} each, on the same RAM disk (brd); the medians. The \
         same target differed by at most {:.0} % between its turns. Linux {}, {}.\n",
        table::goals(results),
        table::speeds(results),
        here::TARGETS.join(", "),
        here::TURNS,
        results.spread() * 100.0,
        measured.kernel,
        here::processor()
    );
    print!("{text}");
    if !options.dry_run {
        table::write(&page(), "native", &text)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How the figures came about.
fn machine(options: &Options, measured: &Measured) -> String {
    let kernel = &measured.kernel;
    let processors = if options.instructions { 1 } else { 2 };
    let command = if options.instructions {
        "cargo x bench --instructions"
    } else {
        "cargo x bench"
    };
    format!(
        "\nMeasured with `{command}`: each target on the same RAM disk (brd), in the order {}; null, loop and loop-z are \
         rublk {PEER_VERSION}'s. The median is shown; the same target differed by at most {:.1} % between its turns. \
         Linux {kernel}, qemu with `-smp {processors} -accel tcg,thread=single -icount shift=1,sleep=off`: the guest's \
         clock counts instructions, so these are not the speeds of real hardware, and only the ratios mean something.\n",
        options.targets.join(", "),
        measured.results.spread() * 100.0
    )
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

fn around_a_load(options: &Options) -> Result<ExitCode> {
    let script = format!("SCENARIOS='{}'\n{SCENARIOS}", options.scenarios.join(" "));
    let mut job = guest::Job::new(options.kernel, &script, LIMIT);
    job.instruction_clock = true;
    job.silent = true;
    job.add_program(&command::build_ublkctl()?, "ublkctl");
    job.add_to_root(&peer()?)?;
    eprintln!("x: measuring in a guest; this takes some minutes");
    let outcome = job.run()?;
    if outcome.status != 0 {
        bail!("the guest failed:\n{}", outcome.output);
    }
    let figures = scenarios::Figures::read(&outcome.output)?;
    figures.show_turns();
    let text = format!(
        "{}\nMeasured with `cargo x bench --scenarios`, the medians of the turns, on a RAM disk (brd). Linux {}, qemu with \
         `-smp 2 -accel tcg,thread=single -icount shift=1,sleep=off`.\n",
        figures.table()?,
        outcome.kernel
    );
    print!("{text}");
    if !options.dry_run {
        table::write(&page(), "scenarios", &text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page() -> PathBuf {
    paths::root().join("docs/performance.md")
}

fn jobs(wanted: &[String]) -> Result<Vec<PathBuf>> {
    let folder = paths::root().join("fio-jobs");
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = files
        .filter(|file| file.extension().is_some_and(|extension| extension == "fio"))
        .filter(|file| {
            file.file_stem().is_some_and(|name| {
                let name = name.to_string_lossy();
                wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))
            })
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
