//! `x kill` and `x churn`: rows of the scorecard that are one test of the guest's suites, run longer.
//!
//! The test prints what it measured as lines `@ METRIC VALUE`; here it is held against the targets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use score::{Card, Figure};

use crate::guest::{Job, Kernel};
use crate::{setup, test};

const LIMIT: Duration = Duration::from_secs(3 * 60 * 60);

/// How a row is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// How many cycles
    #[arg(long, value_name = "N")]
    cycles: Option<u64>,
    /// On this machine: as root, with ublk, and a /dev/ram0 that is overwritten
    #[arg(long, conflicts_with = "kernel")]
    here: bool,
    /// The guest's kernel: "new" or "6.12"
    #[arg(long, default_value = "new")]
    kernel: Kernel,
    /// Draws the moments
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// R7: the daemon killed and its devices taken back, under a load that verifies.
pub fn kill(options: &Options) -> Result<ExitCode> {
    let wanted = if options.quick { 25 } else { 200 };
    let run = run(
        "kills::no_kill_loses_an_acknowledged_write",
        wanted,
        options,
    )?;
    let mut card = Card::new("R7", options.quick, Some(options.seed));
    card.at_least("kills and recoveries", run.number("cycles"), wanted);
    card.none(
        "failures: I/O errors, lost writes or snapshots, devices gone, unclean pools",
        u64::from(!run.passed),
    );
    report(&card.into_figures(), options.json.as_deref())
}

/// R14, its second half: a device attached and detached.
pub fn churn(options: &Options) -> Result<ExitCode> {
    let wanted = if options.quick { 60 } else { 1000 };
    let run = run(
        "churn::devices_that_come_and_go_leave_nothing_behind",
        wanted,
        options,
    )?;
    let mut card = Card::new("R14", options.quick, None);
    card.at_least("devices added and deleted", run.number("cycles"), wanted);
    for (metric, name) in [
        ("files that the daemon kept", "files_gained"),
        ("threads that the daemon kept", "threads_gained"),
        ("nodes and links left", "nodes_left"),
    ] {
        card.none(metric, run.values.get(name).copied().unwrap_or(1));
    }
    card.none(
        "failures: commands hung or failed, memory that grew",
        u64::from(!run.passed),
    );
    report(&card.into_figures(), options.json.as_deref())
}

/// What came of the test.
struct Run {
    passed: bool,
    values: BTreeMap<String, u64>,
}

impl Run {
    fn number(&self, name: &str) -> u64 {
        self.values.get(name).copied().unwrap_or(0)
    }
}

fn run(name: &str, wanted: u64, options: &Options) -> Result<Run> {
    setup::install_missing()?;
    let (suites, ublkctl) = test::programs()?;
    let cycles = options.cycles.unwrap_or(wanted);
    let arguments = format!("--ignored --exact {name} --nocapture");
    let environment = [
        ("BLOCKFORK_CYCLES", cycles),
        ("BLOCKFORK_SEED", options.seed),
    ];
    let (passed, output) = if options.here {
        let mut command = Command::new(&suites);
        command
            .args(arguments.split(' '))
            .env("PATH", test::search_path(&ublkctl)?)
            .envs(environment.map(|(name, value)| (name, value.to_string())))
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        let output = command.output().context("cannot start the suites")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{text}");
        (output.status.success(), text)
    } else {
        let set = environment.map(|(name, value)| format!("{name}={value}"));
        let script = format!("{} /usr/bin/suites {arguments}", set.join(" "));
        let mut job = Job::new(options.kernel, &script, LIMIT);
        job.add_program(&suites, "suites");
        job.add_program(&ublkctl, "ublkctl");
        let outcome = job.run()?;
        (outcome.status == 0, outcome.output)
    };
    let values = output.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("@ ")?.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    Ok(Run {
        passed,
        values: values.collect(),
    })
}

/// Prints the figures and keeps them; whether all pass is the exit code.
pub fn report(figures: &[Figure], json: Option<&Path>) -> Result<ExitCode> {
    println!();
    score::print(figures, &mut std::io::stdout()).context("cannot print the figures")?;
    if let Some(path) = json {
        score::write_json(figures, path)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if score::all_pass(figures) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
