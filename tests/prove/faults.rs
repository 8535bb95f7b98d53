//! R8: for every call to the device in eight workloads, that call fails, or it and all after it.

use crate::Common;
use blockfork_tests::faults::{KINDS, calls, run as run_with};
use blockfork_tests::parallel;
use blockfork_tests::script::{self, Script};
use blockfork_tests::sim_device::Fault;
use score::Card;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this case
    #[arg(long)]
    case: Option<u64>,
}

/// In a sample, one of so many cases.
const SAMPLE: usize = 23;

pub(crate) fn run(common: Common, options: &Options) -> Card {
    // Different runs of each workload.
    let variants = if common.quick { 1 } else { 3 };
    let seeds = common.seed..common.seed + variants;
    let scripts: Vec<Script> = seeds.flat_map(script::all).collect();
    let mut cases: Vec<(&Script, Fault)> = Vec::new();
    for script in &scripts {
        for call in calls(script, common.seed) {
            for kind in KINDS {
                cases.extend([false, true].map(|is_sticky| {
                    let fault = Fault {
                        call,
                        kind,
                        is_sticky,
                    };
                    (script, fault)
                }));
            }
        }
    }
    let all = cases.len() as u64;
    if common.quick {
        cases = cases.into_iter().step_by(SAMPLE).collect();
    }
    let wanted = options
        .case
        .map_or(0..cases.len() as u64, |case| case..case + 1);
    let (results, panics) = parallel::each(wanted, |number| {
        let (script, fault) = &cases[usize::try_from(number).unwrap_or(0)];
        run_with(script, common.seed, *fault).map_err(|reason| (number, reason))
    });
    let done = results.len() as u64;
    let mut failures: Vec<(u64, String)> = results.into_iter().filter_map(Result::err).collect();
    failures.extend(panics.into_iter().map(|panic| (panic.case, panic.message)));
    for (number, reason) in failures.iter().take(5) {
        let (script, fault) = &cases[usize::try_from(*number).unwrap_or(0)];
        let quick = if common.quick { "--quick " } else { "" };
        eprintln!("{}, {fault:?}: {reason}", script.name);
        eprintln!(
            "replay: prove faults {quick}--seed {} --case {number}",
            common.seed
        );
    }
    let mut card = common.card("R8");
    let (least, percent) = if common.quick {
        (300, 4)
    } else {
        (20_000, 100)
    };
    card.at_least("faults injected", done, least);
    card.at_least("% of calls, ways and durations", done * 100 / all, percent);
    card.none("violations", failures.len() as u64);
    card
}
