//! `prove`: the rows of the scorecard that run in this process, most of them on a simulated device. One file per row.

mod crash;
mod damage;
mod faults;
mod heap;
mod histories;
mod kill_nbd;
mod model;
mod open;
mod scale;

use clap::{Parser, Subcommand};
use score::{Card, Figure};
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs rows of the scorecard, prints `metric value target pass`, and exits with 1 if one falls short.
#[derive(Debug, Parser)]
#[command(name = "prove", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    row: Row,
    /// A sample, held against a sample's target
    #[arg(long, global = true)]
    quick: bool,
    /// Write the figures here too, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The first seed
    #[arg(long, global = true, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum Row {
    /// R6: damaged metadata
    Damage(damage::Options),
    /// R7, its half over NBD: kills under verifying clients; see `cargo x kill-nbd`
    KillNbd(kill_nbd::Options),
    /// R1: a crash after every device operation of eight workloads
    Crash(crash::Options),
    /// R2: a crash inside the recovery from a crash
    Nested(crash::Options),
    /// R8: every call to the device fails, once and from then on
    Faults(faults::Options),
    /// R10: histories of four queues, linearizable
    Histories(histories::Options),
    /// R9: random operations against a model
    Model(model::Options),
    /// R14: opening a large pool after a crash
    Open(open::Options),
    /// Snapshots, volumes, depth, size and time, of which it must not notice how many: `cargo x scale`
    Scale(scale::Options),
}

/// What every row is told.
#[derive(Clone, Copy, Debug)]
struct Common {
    quick: bool,
    seed: u64,
}

impl Common {
    fn card(self, row: &'static str) -> Card {
        Card::new(row, self.quick, Some(self.seed))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let common = Common {
        quick: arguments.quick,
        seed: arguments.seed,
    };
    match arguments.row {
        Row::Damage(_) | Row::Crash(_) | Row::Nested(_) | Row::Faults(_) | Row::Model(_) => {
            heap::keep()
        }
        Row::KillNbd(_) | Row::Histories(_) | Row::Open(_) | Row::Scale(_) => {}
    }
    let figures = match &arguments.row {
        Row::Damage(options) => damage::run(common, options).into_figures(),
        Row::KillNbd(options) => kill_nbd::run(common, options).into_figures(),
        Row::Crash(options) => crash::run(common, options).into_figures(),
        Row::Nested(options) => crash::run_nested(common, options).into_figures(),
        Row::Faults(options) => faults::run(common, options).into_figures(),
        Row::Histories(options) => histories::run(common, options).into_figures(),
        Row::Model(options) => model::run(common, options).into_figures(),
        Row::Open(options) => open::run(common, options).into_figures(),
        Row::Scale(options) => scale::run(common, options),
    };
    report(&figures, arguments.json)
}

fn report(figures: &[Figure], json: Option<PathBuf>) -> ExitCode {
    let printed = score::print(figures, &mut std::io::stdout());
    let written = json.map_or(Ok(()), |path| score::write_json(figures, &path));
    if let Err(error) = printed.and(written) {
        eprintln!("prove: {error}");
        return ExitCode::FAILURE;
    }
    if score::all_pass(figures) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
