//! R1 and R2: a crash after every device operation of eight workloads, and a second one inside the recovery.

use crate::Common;
use blockfork_tests::crash::{Recording, Visited, record};
use blockfork_tests::parallel;
use blockfork_tests::script;
use blockfork_tests::tape::Tick;
use fastrand::Rng;
use score::{Card, Target};
use std::time::Instant;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this workload
    #[arg(long)]
    workload: Option<String>,
    /// Only this crash point
    #[arg(long)]
    point: Option<Tick>,
    /// Different runs of each workload
    #[arg(long)]
    variants: Option<u64>,
}

/// A recording and a point in it.
struct Case {
    recording: usize,
    point: Tick,
    seed: u64,
}

struct Plan {
    recordings: Vec<Recording>,
    cases: Vec<Case>,
}

impl Plan {
    fn new(common: Common, options: &Options, variants: u64) -> Self {
        let variants = options.variants.unwrap_or(variants);
        let mut recordings = Vec::new();
        let mut cases = Vec::new();
        for seed in common.seed..common.seed + variants {
            for script in script::all(seed) {
                if options
                    .workload
                    .as_ref()
                    .is_some_and(|name| name != script.name)
                {
                    continue;
                }
                let recording = record(&script, seed);
                let points = recording.points().into_iter();
                let wanted = points.filter(|point| options.point.is_none_or(|only| only == *point));
                let recording_number = recordings.len();
                cases.extend(wanted.map(|point| Case {
                    recording: recording_number,
                    point,
                    seed,
                }));
                recordings.push(recording);
            }
        }
        Self { recordings, cases }
    }

    /// Visits the cases on all cores; what was visited, and how many failed.
    fn visit(
        &self,
        verb: &str,
        visit: impl Fn(&Recording, &Case) -> Result<Visited, String> + Sync,
    ) -> (Visited, u64) {
        let (results, panics) = parallel::each(0..self.cases.len() as u64, |number| {
            let case = &self.cases[usize::try_from(number).unwrap_or(0)];
            visit(&self.recordings[case.recording], case).map_err(|reason| (number, reason))
        });
        let mut sum = Visited::default();
        let mut failures = Vec::new();
        for result in results {
            match result {
                Ok(visited) => {
                    sum.points += visited.points;
                    sum.states += visited.states;
                    sum.images += visited.images;
                }
                Err(failure) => failures.push(failure),
            }
        }
        failures.extend(panics.into_iter().map(|panic| (panic.case, panic.message)));
        for (number, reason) in failures.iter().take(5) {
            let case = &self.cases[usize::try_from(*number).unwrap_or(0)];
            eprintln!("{reason}");
            eprintln!(
                "replay: prove {verb} --seed {} --variants 1 --workload '{}' --point {}",
                case.seed, self.recordings[case.recording].name, case.point
            );
        }
        (sum, failures.len() as u64)
    }
}

/// R1.
#[expect(clippy::disallowed_methods, reason = "how long it takes is a figure")]
pub(crate) fn run(common: Common, options: &Options) -> Card {
    let start = Instant::now();
    let (variants, states) = if common.quick {
        (1, 100_000)
    } else {
        (6, 1_000_000)
    };
    let plan = Plan::new(common, options, variants);
    let (visited, failures) = plan.visit("crash", |recording, case| {
        recording.visit(case.point, case.seed)
    });
    let mut card = common.card("R1");
    card.at_least("crash points", visited.points, plan.cases.len() as u64);
    card.at_least("crash states judged", visited.states, states);
    card.at_least("different images recovered", visited.images, states / 10);
    card.none("violations", failures);
    card.add(
        "seconds",
        start.elapsed().as_secs_f64(),
        Target::AtMost(600.0),
    );
    card
}

/// R2.
pub(crate) fn run_nested(common: Common, options: &Options) -> Card {
    let (variants, states) = if common.quick {
        (1, 5_000)
    } else {
        (1, 50_000)
    };
    let mut plan = Plan::new(common, options, variants);
    if options.point.is_none() {
        // A sample of the points, spread over all workloads.
        let wanted = if common.quick { 60 } else { 600 };
        Rng::with_seed(common.seed).shuffle(&mut plan.cases);
        plan.cases.truncate(wanted);
    }
    let (visited, failures) = plan.visit("nested", |recording, case| {
        recording.visit_nested(case.point, case.seed, 3)
    });
    let mut card = common.card("R2");
    card.at_least("recoveries that crashed", visited.points, 1);
    card.at_least("states of the second crash", visited.states, states);
    card.none("violations", failures);
    card
}
