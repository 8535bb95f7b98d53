//! `x sched`: scorecard row R10. Whole pools in schedules that shuttle chooses, every lock-free cell in every memory
//! order that loom knows, and histories that must be linearizable.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use score::Card;

use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Another seed than the usual one
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A `prove` that is built already
    #[arg(long, value_name = "FILE", hide = true)]
    prove: Option<PathBuf>,
}

/// The cells that `engine/src/sync/models.rs` has a model of, each with a broken twin.
const MODELS: u64 = 9;

/// Runs the three and prints the figures of R10.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut card = Card::new("R10", options.quick, Some(options.seed));
    schedules(options, &mut card)?;
    models(&mut card)?;
    let mut figures = card.into_figures();
    figures.extend(histories(options)?);
    crate::row::report(&figures, options.json.as_deref())
}

/// A cargo that builds with another `cfg`, in a folder of its own, so that the usual build stays as it is.
fn with_cfg(name: &str, folder: &str) -> Command {
    let mut cargo = command::cargo();
    cargo.env("RUSTFLAGS", format!("--cfg {name}"));
    cargo.env("CARGO_TARGET_DIR", paths::target().join(folder));
    cargo
}

fn schedules(options: &Options, card: &mut Card) -> Result<()> {
    let wanted: u64 = if options.quick { 2200 } else { 100_100 };
    let least = if options.quick { 2000 } else { 100_000 };
    command::run_shown(with_cfg("shuttle", "shuttle").args([
        "build",
        "--locked",
        "--profile",
        "prove",
        "-p",
        "sched",
    ]))?;
    let folder = paths::target().join("shuttle");
    let output = Command::new(folder.join("prove/sched"))
        .args([
            "--schedules",
            &wanted.to_string(),
            "--seed",
            &options.seed.to_string(),
        ])
        .arg("--failures")
        .arg(&folder)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start sched")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let count = |name: &str| {
        let mut words = text.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).and_then(|word| word.parse().ok())
    };
    let done = count("schedules").context("sched printed no count")?;
    let failures = count("failures").context("sched printed no count")?;
    card.at_least("shuttle schedules", done, least);
    card.none("scenarios with a failing schedule", failures);
    Ok(())
}

fn models(card: &mut Card) -> Result<()> {
    let mut test = with_cfg("loom_cells", "loom");
    test.args([
        "test",
        "--locked",
        "--profile",
        "prove",
        "-p",
        "blockfork-engine",
        "--lib",
    ]);
    test.args(["sync::models", "--", "--nocapture"]);
    eprintln!("+ {}", command::shown(&test));
    let output = test
        .stdin(Stdio::null())
        .output()
        .context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stderr);
    // A model's line can stand behind a name that the test runner began to print.
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.find("loom ").map(|at| &line[at..]))
        .collect();
    let found = lines
        .iter()
        .filter(|line| line.ends_with("broken twin found"));
    let executions = |line: &&str| {
        let before = line.split(" executions").next()?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    };
    let total = found.clone().filter_map(executions).sum();
    for line in &lines {
        eprintln!("{line}");
    }
    if !output.status.success() {
        eprintln!("{text}");
    }
    card.at_least(
        "lock-free cells explored exhaustively",
        found.count() as u64,
        MODELS,
    );
    card.at_least("loom executions", total, 1);
    card.none("loom runs failed", u64::from(!output.status.success()));
    Ok(())
}

fn histories(options: &Options) -> Result<Vec<score::Figure>> {
    let program = match &options.prove {
        Some(built) => built.clone(),
        None => command::build_prove()?,
    };
    let json = paths::target().join("histories.json");
    let mut prove = Command::new(program);
    prove
        .args(["--seed", &options.seed.to_string(), "--json"])
        .arg(&json);
    prove
        .args(options.quick.then_some("--quick"))
        .arg("histories");
    // It fails when a figure does; the figures say so too.
    let status = prove.stdin(Stdio::null()).stdout(Stdio::null()).status();
    status.context("cannot start prove")?;
    Ok(score::read_json(&json)?)
}
