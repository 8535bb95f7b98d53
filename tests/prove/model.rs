//! R9: sequences of random operations on a pool and its model, with crashes and reopenings. Of a sequence that fails the
//! shortest history that still does is sought.

use crate::Common;
use blockfork_tests::model::{History, Pair};
use blockfork_tests::parallel::{self, Failure};
use blockfork_tests::shrink;
use score::Card;
use std::collections::BTreeSet;
use std::panic;

/// Blocks of the three kinds of pool: roomy, nearly full, and roomy with a ring.
const POOLS: [(u64, bool); 3] = [(8192, false), (4096, false), (8192, true)];
const STEPS_PER_ROUND: u32 = 125;
const ROUNDS: u32 = 4;
/// Tries to shorten a history that fails; each takes a tenth of a second.
const TRIES_MAX: u32 = 1500;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sequences; each has some 500 operations
    #[arg(long)]
    sequences: Option<u64>,
    /// End with the first violation, and leave its history as long as it is
    #[arg(long)]
    first: bool,
    /// Of the one sequence take only these steps, and tell what each does
    #[arg(long, value_name = "STEPS", value_delimiter = ',')]
    keep: Vec<u32>,
}

pub(crate) fn run(common: Common, options: &Options) -> Card {
    let full = 10_000;
    let sequences = options
        .sequences
        .unwrap_or(if common.quick { 1_000 } else { full });
    let common = Common {
        quick: sequences < full,
        ..common
    };
    let seeds = common.seed..common.seed + sequences;
    let (steps, failures) = parallel::each_until(seeds, options.first, |seed| {
        let history = History {
            kept: (!options.keep.is_empty()).then(|| options.keep.iter().copied().collect()),
            is_told: !options.keep.is_empty(),
        };
        play(seed, history);
        u64::from(ROUNDS * STEPS_PER_ROUND)
    });
    for failure in &failures {
        eprintln!("{}", failure.message);
        eprintln!("replay: prove model --seed {} --sequences 1", failure.case);
    }
    if let Some(failure) = failures.first()
        && options.keep.is_empty()
        && !options.first
    {
        eprintln!(
            "the shortest history that still fails so: prove model --seed {} --sequences 1 --keep {}",
            failure.case,
            shorten(failure)
        );
    }
    let mut card = common.card("R9");
    card.at_least("sequences", steps.len() as u64, sequences);
    card.at_least("operations", steps.iter().sum(), sequences * 500);
    card.none("violations", failures.len() as u64);
    card
}

fn play(seed: u64, history: History) {
    let (blocks, with_ring) = POOLS[usize::try_from(seed % 3).unwrap_or(0)];
    let mut pair = Pair::new(seed, blocks, with_ring).with_history(history);
    pair.run(ROUNDS, STEPS_PER_ROUND);
}

/// The steps of the shortest history that fails as this one does, whatever the numbers in its message are.
fn shorten(failure: &Failure) -> String {
    let words = |message: &str| message.replace(|c: char| c.is_ascii_digit(), "");
    let complaint = words(&failure.message);
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let count = Pair::count(ROUNDS, STEPS_PER_ROUND);
    let kept = shrink::shortest(count, TRIES_MAX, |kept| {
        let history = History {
            kept: Some(kept.iter().copied().collect::<BTreeSet<_>>()),
            is_told: false,
        };
        let played = panic::catch_unwind(|| play(failure.case, history));
        played.is_err_and(|said| words(&parallel::message(said.as_ref())) == complaint)
    });
    panic::set_hook(hook);
    let kept: Vec<String> = kept.iter().map(u32::to_string).collect();
    kept.join(",")
}
