//! R10: histories of four queues, on threads and as seeded tasks, each linearizable with every snapshot one cut.

use crate::Common;
use blockfork_tests::{parallel, queues};
use score::Card;

/// Histories on threads may wait for a wake-up that never comes: then the run ends after so many seconds.
const PATIENCE_SECONDS: u64 = 600;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Histories; every second one on threads
    #[arg(long)]
    histories: Option<u64>,
    /// Requests of each
    #[arg(long, default_value_t = 10_000)]
    requests: u64,
}

pub(crate) fn run(common: Common, options: &Options) -> Card {
    std::thread::spawn(|| {
        std::thread::sleep(std::time::Duration::from_secs(PATIENCE_SECONDS));
        eprintln!("prove histories: hangs: a wake-up was lost, or the machine is very slow");
        std::process::exit(1);
    });
    let wanted = if common.quick { 6 } else { 100 };
    let histories = options.histories.unwrap_or(wanted);
    let seeds = common.seed..common.seed + histories;
    let (requests, failures) = parallel::each(seeds, |seed| {
        if seed % 2 == 0 {
            queues::as_tasks(seed, options.requests)
        } else {
            queues::on_threads(seed, options.requests)
        }
    });
    for failure in &failures {
        eprintln!("{}", failure.message);
        eprintln!(
            "replay: prove histories --seed {} --histories 1",
            failure.case
        );
    }
    let mut card = common.card("R10");
    card.at_least("histories of 4 queues", requests.len() as u64, wanted);
    card.at_least(
        "requests in each history",
        requests.iter().min().copied().unwrap_or(0),
        10_000,
    );
    card.none("histories not linearizable", failures.len() as u64);
    card
}
