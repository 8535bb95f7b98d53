//! R6: every live block of metadata of small pools damaged in every way: detected or harmless.

use crate::Common;
use blockfork_tests::damage::{BLOCK_BITS, Damage, Outcome, Scene};
use blockfork_tests::parallel;
use score::{Card, Target};

/// A sample takes each so many bits.
const QUICK_STEP: u64 = 64;
/// Flipped bits in blocks that nothing looks at: one in so many.
const UNUSED_STEP: u64 = 65_537;
const UNUSED_STEP_QUICK: u64 = 1_048_573;
/// Failures that are printed.
const SHOWN_MAX: usize = 20;

/// What is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only the case of this number
    #[arg(long)]
    case: Option<u64>,
}

struct Cases {
    scenes: [Scene; 2],
    /// Which scene, and what is done to it.
    cases: Vec<(usize, Damage)>,
    /// How many of them, at the end, hit blocks that nothing looks at.
    unused: u64,
}

fn cases(quick: bool) -> Cases {
    let scenes = [Scene::crashed(), Scene::closed()];
    let mut cases = Vec::new();
    for (index, scene) in scenes.iter().enumerate() {
        // After a close the same pages stand there as after a crash, and no journal: a sample is enough.
        let step = if quick || index > 0 { QUICK_STEP } else { 1 };
        cases.extend(scene.damages().into_iter().map(|damage| (index, damage)));
        for &block in scene.live() {
            let bits = (block % step..BLOCK_BITS).step_by(usize::try_from(step).unwrap_or(1));
            cases.extend(bits.map(|bit| (index, Damage::Flip { block, bit })));
        }
    }
    let looked_at = cases.len();
    for (index, scene) in scenes.iter().enumerate() {
        let blocks = scene.unused();
        let step = if quick {
            UNUSED_STEP_QUICK
        } else {
            UNUSED_STEP
        };
        let bits =
            (0..blocks.len() as u64 * BLOCK_BITS).step_by(usize::try_from(step).unwrap_or(1));
        cases.extend(bits.map(|at| {
            let block = blocks[usize::try_from(at / BLOCK_BITS).unwrap_or(0)];
            let bit = at % BLOCK_BITS;
            (index, Damage::Flip { block, bit })
        }));
    }
    Cases {
        unused: (cases.len() - looked_at) as u64,
        scenes,
        cases,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a percentage")]
pub(crate) fn run(common: Common, options: &Options) -> Card {
    let all = cases(common.quick);
    let count = all.cases.len() as u64;
    let range = options.case.map_or(0..count, |case| case..case + 1);
    let (outcomes, panics) = parallel::each(range, |number| {
        let (scene, damage) = all.cases[usize::try_from(number).unwrap_or(usize::MAX)];
        (number, all.scenes[scene].judge(damage))
    });
    let is_unused = |number: u64| number >= count - all.unused;
    let mut wrong: Vec<(u64, String)> = Vec::new();
    let mut cut_commits = 0;
    let mut kinds = [0_u64; 3];
    for (number, outcome) in &outcomes {
        match outcome {
            Err(fact) => wrong.push((*number, fact.clone())),
            Ok(outcome) if is_unused(*number) && *outcome != Outcome::Harmless => {
                wrong.push((*number, format!("free space is looked at: {outcome:?}")));
            }
            Ok(Outcome::Harmless) => kinds[0] += 1,
            Ok(Outcome::Reported) => kinds[1] += 1,
            Ok(Outcome::Refused) => kinds[2] += 1,
            Ok(Outcome::CutCommit) => cut_commits += 1,
        }
    }
    let shown = wrong.iter().map(|(number, fact)| (*number, fact.as_str()));
    let panicked = panics
        .iter()
        .map(|panic| (panic.case, panic.message.as_str()));
    for (number, fact) in shown.chain(panicked).take(SHOWN_MAX) {
        let quick = if common.quick { "--quick " } else { "" };
        eprintln!("{fact}\nreplay: prove damage {quick}--case {number}");
    }
    eprintln!(
        "{} harmless, {} reported and all data there, {} with data refused; {cut_commits} took the last commit as a power cut would",
        kinds[0], kinds[1], kinds[2],
    );
    let good = outcomes.len() as u64 - wrong.len() as u64;
    let share = 100.0 * good as f64 / (outcomes.len() + panics.len()).max(1) as f64;
    let mut card = common.card("R6");
    card.at_least("cases", count, if common.quick { 10_000 } else { 500_000 });
    card.add(
        "detected or harmless, percent",
        share,
        Target::Exactly(100.0),
    );
    card.none("wrong or unnamed", wrong.len() as u64);
    card.none("panics", panics.len() as u64);
    card
}
