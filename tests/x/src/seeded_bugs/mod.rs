//! `x seeded-bugs`, row R3 of the scorecard: historical bugs of storage systems are put back into a copy of this
//! repository one at a time, and the harness must find each. It measures the harness, not the engine.

mod controls;
mod patch;
mod workshop;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use score::{Card, Target};

use crate::paths;
use patch::{BUGS, Bug};
use workshop::Workshop;

/// Where the patches are.
const PATCHES: &str = "tests/seeded-bugs";
/// A finder that takes longer has not found it. Building does not count.
const LIMIT: Duration = Duration::from_secs(60);
/// On the clean tree it runs to its end.
const CLEAN_LIMIT: Duration = Duration::from_secs(600);
/// What `--quick` puts back, beside the control.
const QUICK: u32 = 24;

/// What is put back.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only the bugs with these numbers; 0 is the control, in which no flush reaches the device
    #[arg(long, value_name = "NN", value_delimiter = ',')]
    only: Vec<u32>,
    /// Only the control and one of the bugs, and not the clean tree, which the sample of R9 runs on
    #[arg(long, conflicts_with = "only")]
    quick: bool,
    /// The negative control of each row instead: a bug that the row must not let pass
    #[arg(long, conflicts_with_all = ["quick", "only", "no_clean"])]
    controls: bool,
    /// Of the controls only those of this row: R5
    #[arg(long, value_name = "ROW", requires = "controls")]
    row: Option<String>,
    /// Without running each finder on the clean tree first
    #[arg(long)]
    no_clean: bool,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What became of one bug.
struct Outcome {
    is_found: bool,
    seconds: f64,
    words: String,
}

/// Puts the bugs back, one after the other.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.controls {
        return controls::run(options.row.as_deref(), options.json.as_deref());
    }
    let all = patch::read_all(&paths::root().join(PATCHES))?;
    let is_wanted = |bug: &&Bug| {
        let is_in_sample = !options.quick || bug.number == 0 || bug.number == QUICK;
        let is_named = options.only.is_empty() || options.only.contains(&bug.number);
        is_in_sample && is_named
    };
    let bugs: Vec<&Bug> = all.iter().filter(is_wanted).collect();
    let workshop = Workshop::new();
    workshop.reset()?;
    let mut false_alarms = 0;
    let has_clean = !options.no_clean && !options.quick;
    if has_clean {
        let finders: BTreeSet<_> = bugs.iter().map(|bug| &bug.finder).collect();
        for finder in finders {
            let run = workshop::run(workshop.build(finder)?, CLEAN_LIMIT)?;
            let is_quiet = run.passed == Some(true);
            println!(
                "clean  {:<45} {:>6.1} s  {}",
                finder.to_string(),
                run.seconds,
                if is_quiet { "passes" } else { "FAILS" }
            );
            if !is_quiet {
                false_alarms += 1;
                eprintln!("{}", run.output);
            }
        }
    }
    let mut found = 0;
    let mut control = 0;
    let mut slowest: f64 = 0.0;
    for bug in &bugs {
        println!(
            "{:02} {}: {} [{}]",
            bug.number, bug.name, bug.source, bug.breaks
        );
        let outcome = put_back(&workshop, bug).with_context(|| bug.patch.display().to_string())?;
        let verdict = if outcome.is_found {
            "found"
        } else {
            "NOT FOUND"
        };
        println!(
            "   {verdict:<9} {:>5.1} s  {}",
            outcome.seconds, outcome.words
        );
        if outcome.is_found && bug.number == 0 {
            control += 1;
        } else if outcome.is_found {
            found += 1;
        }
        slowest = slowest.max(outcome.seconds);
    }
    workshop.reset()?;

    let wanted = bugs.iter().filter(|bug| bug.number > 0).count() as u64;
    let mut card = Card::new("R3", wanted < u64::from(BUGS), None);
    card.at_least("seeded bugs found", found, wanted);
    if bugs.iter().any(|bug| bug.number == 0) {
        card.at_least("dropped flushes found (control)", control, 1);
    }
    if has_clean {
        card.none("finders that fail on the clean tree", false_alarms);
    }
    card.add("seconds for the slowest", slowest, Target::AtMost(60.0));
    crate::row::report(&card.into_figures(), options.json.as_deref())
}

/// Puts one bug back and runs its finder. A patch that does not apply or build finds nothing.
fn put_back(workshop: &Workshop, bug: &Bug) -> Result<Outcome> {
    workshop.reset()?;
    #[expect(clippy::disallowed_methods, reason = "shown to a person")]
    let began = Instant::now();
    let built = workshop
        .apply(&bug.patch)
        .and_then(|()| workshop.build(&bug.finder));
    let building = began.elapsed().as_secs_f64();
    let program = match built {
        Ok(program) => program,
        Err(error) => {
            return Ok(Outcome {
                is_found: false,
                seconds: 0.0,
                words: format!("{error:#}"),
            });
        }
    };
    let run = workshop::run(program, LIMIT)?;
    let verdict = match (run.passed, run.finding) {
        (Some(false), Some(finding)) => Ok(finding),
        (Some(false), None) => Err("failed without a finding".to_owned()),
        (Some(true), _) => Err("passed".to_owned()),
        (None, _) => Err("took too long".to_owned()),
    };
    let is_found = verdict.is_ok();
    let text = verdict.unwrap_or_else(|reason| reason);
    let text: String = text.chars().take(110).collect();
    Ok(Outcome {
        is_found,
        seconds: run.seconds,
        words: format!("{} (built in {building:.0} s): {text}", bug.finder),
    })
}

#[cfg(test)]
mod tests {
    use super::{PATCHES, QUICK, controls, patch, workshop};
    use crate::paths;

    #[test]
    fn every_control_can_still_be_put_back() {
        let page = std::fs::read_to_string(paths::root().join("docs/testing.md")).unwrap();
        for control in &controls::CONTROLS {
            let patch = paths::root().join("tests").join(control.patch);
            workshop::git_apply(&paths::root(), &patch, true).unwrap();
            patch::Finder::parse(control.finder).unwrap();
            let row = format!(
                "| {} | {} | `{}` |",
                control.row, control.patch, control.finder
            );
            assert!(page.contains(&row), "docs/testing.md has no row {row:?}");
        }
    }

    #[test]
    fn every_seeded_bug_can_still_be_put_back() {
        let bugs = patch::read_all(&paths::root().join(PATCHES)).unwrap();
        let page = std::fs::read_to_string(paths::root().join("docs/testing.md")).unwrap();
        for bug in &bugs {
            workshop::git_apply(&paths::root(), &bug.patch, true).unwrap();
            let row = format!("| {} | {} ", bug.number, bug.name);
            assert!(page.contains(&row), "docs/testing.md has no row {row:?}");
        }
        assert!(bugs.iter().any(|bug| bug.number == QUICK));
    }
}
