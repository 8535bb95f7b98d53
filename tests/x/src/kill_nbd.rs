//! `x kill-nbd`: R7 of the scorecard over NBD. Builds `ublkctl` and the program that kills it, and runs that.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// Kills [default: 1000, or 60 with --quick]
    #[arg(long)]
    cycles: Option<u64>,
    /// The seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The negative control: remove the ring after each kill; acknowledged writes must then be missing
    #[arg(long)]
    without_ring: bool,
}

/// Runs it; its exit status is that of the figures.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut build = command::cargo();
    build.args(["build", "--quiet", "--locked", "--bins"]);
    build.args(["--package", "ublkctl", "--package", "blockfork-tests"]);
    command::run_shown(&mut build)?;
    let programs = paths::target().join("debug");
    let mut prove = Command::new(programs.join("prove"));
    prove.arg("kill-nbd").stdin(Stdio::null());
    prove.arg("--program").arg(programs.join("ublkctl"));
    prove.args(["--seed", &options.seed.to_string()]);
    if options.quick {
        prove.arg("--quick");
    }
    if let Some(cycles) = options.cycles {
        prove.args(["--cycles", &cycles.to_string()]);
    }
    if let Some(json) = &options.json {
        prove.arg("--json").arg(json);
    }
    if options.without_ring {
        prove.arg("--without-ring");
    }
    eprintln!("+ {}", command::shown(&prove));
    let status = prove.status().context("cannot start prove")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
