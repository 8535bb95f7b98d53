//! R9: sequences of random operations on a pool and its model, with crashes and reopenings.

use crate::Common;
use blockfork_tests::model::Pair;
use blockfork_tests::parallel;
use score::Card;

/// Blocks of the three kinds of pool: roomy, nearly full, and roomy with a ring.
const POOLS: [(u64, bool); 3] = [(8192, false), (4096, false), (8192, true)];
const STEPS_PER_ROUND: u32 = 125;
const ROUNDS: u32 = 4;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sequences; each has some 500 operations
    #[arg(long)]
    sequences: Option<u64>,
    /// End with the first violation
    #[arg(long)]
    first: bool,
}

pub(crate) fn run(common: Common, options: &Options) -> Card {
    let full = 10_000;
    let sequences = options
        .sequences
        .unwrap_or(if common.quick { 300 } else { full });
    let common = Common {
        quick: sequences < full,
        ..common
    };
    let seeds = common.seed..common.seed + sequences;
    let (steps, failures) = parallel::each_until(seeds, options.first, |seed| {
        let (blocks, with_ring) = POOLS[usize::try_from(seed % 3).unwrap_or(0)];
        Pair::new(seed, blocks, with_ring).run(ROUNDS, STEPS_PER_ROUND);
        u64::from(ROUNDS * STEPS_PER_ROUND)
    });
    for failure in &failures {
        eprintln!("{}", failure.message);
        eprintln!("replay: prove model --seed {} --sequences 1", failure.case);
    }
    let mut card = common.card("R9");
    card.at_least("sequences", steps.len() as u64, sequences);
    card.at_least("operations", steps.iter().sum(), sequences * 500);
    card.none("violations", failures.len() as u64);
    card
}
