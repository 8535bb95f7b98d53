//! `x hostile`: row R13, the cases of tests/hostile against a `ublkctl` with every check on.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use hostile::Plan;
use score::{Card, Target};

use crate::{command, paths};

/// The most that a client which behaves may wait for an answer.
const WAITED_MS_MAX: f64 = 10_000.0;

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// The seed of all cases
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only this case: KIND:NUMBER
    #[arg(long, value_name = "CASE")]
    only: Option<String>,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Builds the program and runs the cases.
pub fn run(options: &Options) -> Result<ExitCode> {
    let only = options.only.as_deref().map(|text| {
        let (kind, number) = text.split_once(':').unwrap_or((text, "0"));
        let number = number.parse().context("a case is KIND:NUMBER")?;
        anyhow::Ok((kind.to_owned(), number))
    });
    let plan = Plan {
        seed: options.seed,
        quick: options.quick,
        only: only.transpose()?,
    };
    // With the features that the tests are built with, so that it is not built twice.
    let mut build = command::cargo();
    build.args(["build", "--locked", "--workspace", "--bin", "ublkctl"]);
    command::run_shown(&mut build)?;
    let outcome = ::hostile::run(&paths::target().join("debug/ublkctl"), &plan);
    for failure in &outcome.failures {
        eprintln!("{failure}");
        let case = failure.split(": ").next().unwrap_or_default();
        eprintln!("replay: cargo x hostile --seed {} --only {case}", plan.seed);
    }
    for fact in &outcome.skipped {
        eprintln!("skipped: {fact}");
    }
    let mut card = Card::new("R13", plan.quick || plan.only.is_some(), Some(plan.seed));
    for (kind, took) in &outcome.times {
        eprintln!("{kind}: {:.1} s", took.as_secs_f64());
    }
    for (kind, count) in &outcome.cases {
        card.at_least(&format!("hostile cases, {kind}"), *count, 1);
    }
    let wanted = match (&plan.only, plan.quick) {
        (Some(_), _) => 1,
        (None, true) => 400,
        (None, false) => 10_000,
    };
    card.at_least("hostile cases", outcome.total(), wanted);
    card.none("hostile cases that failed", outcome.failures.len() as u64);
    let wanted = match (&plan.only, plan.quick) {
        (Some(_), _) => 0,
        (None, true) => 50,
        (None, false) => 1000,
    };
    card.at_least(
        "operations over NBD beside hostile cases",
        outcome.io_operations,
        wanted,
    );
    card.none(
        "operations over NBD that failed or read something else",
        outcome.io_errors,
    );
    #[expect(
        clippy::cast_precision_loss,
        reason = "milliseconds stay far below 2^53"
    )]
    let waited = outcome.waited_ms_max as f64;
    card.add(
        "milliseconds that a client beside hostile ones waited",
        waited,
        Target::AtMost(WAITED_MS_MAX),
    );
    crate::row::report(&card.into_figures(), options.json.as_deref())
}
