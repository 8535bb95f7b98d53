//! R7 over NBD: a daemon is killed under verifying clients and started again. `cargo x kill-nbd` builds what it needs.

use crate::Common;
use blockfork::clock::{Clock, SystemClock};
use blockfork_tests::nbd_kill::{self, Outcome, Plan};
use blockfork_tests::parallel;
use score::{Card, Target};
use std::path::PathBuf;

/// Pools at a time.
const LANES: u64 = 2;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The `ublkctl` that is killed
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
    /// Kills
    #[arg(long)]
    cycles: Option<u64>,
    /// The negative control: remove the ring after each kill, so that acknowledged writes are lost
    #[arg(long)]
    without_ring: bool,
}

pub(crate) fn run(common: Common, options: &Options) -> Card {
    let wanted = if common.quick { 60 } else { 1000 };
    let cycles = options.cycles.unwrap_or(wanted);
    let folder = std::env::temp_dir().join(format!("blockfork-kill-nbd-{}", std::process::id()));
    let clock = SystemClock::new();
    // Pools of their own, side by side: one waits for its disk or its processes while the other works.
    let (outcomes, panics) = parallel::each(0..LANES, |lane| {
        let plan = Plan {
            program: options.program.clone(),
            folder: folder.join(lane.to_string()),
            cycles: cycles / LANES + u64::from(lane < cycles % LANES),
            seed: common.seed + lane,
            without_ring: options.without_ring,
        };
        std::fs::create_dir_all(&plan.folder)
            .map_err(|e| format!("{}: {e}", plan.folder.display()))
            .and_then(|()| nbd_kill::run(&plan))
    });
    let failures = panics.into_iter().map(|panic| Err(panic.message));
    let mut outcome = Outcome::default();
    for lane in outcomes.into_iter().chain(failures) {
        outcome.add(lane.unwrap_or_else(|fact| Outcome {
            failed_requests: 1,
            facts: vec![fact],
            ..Outcome::default()
        }));
    }
    for fact in &outcome.facts {
        eprintln!("{fact}");
    }
    if outcome.violations() == 0 {
        // What failed is kept to be looked at.
        drop(std::fs::remove_dir_all(&folder));
    } else {
        eprintln!("the pool and its state: {}", folder.display());
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = outcome.kills as f64 * 1e9 / clock.monotonic_ns() as f64;
    let mut card = common.card("R7");
    card.at_least("kills under NBD clients", outcome.kills, wanted);
    card.at_least("of them while the daemon started", outcome.early_kills, 1);
    card.at_least(
        "acknowledged changes of a block",
        outcome.acknowledged_blocks,
        wanted * 100,
    );
    card.none("acknowledged blocks lost", outcome.lost_blocks);
    card.none("blocks outside their window", outcome.foreign_blocks);
    card.none("requests that failed", outcome.failed_requests);
    card.at_least(
        "snapshots under load compared",
        outcome.snapshots,
        wanted / 50,
    );
    card.none("acknowledged snapshots lost", outcome.lost_snapshots);
    card.at_least("checks of the pool", outcome.checks, wanted / 20);
    card.none("checks that found something", outcome.bad_checks);
    card.add("kills a second", rate, Target::AtLeast(0.0));
    card
}
