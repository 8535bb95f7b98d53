//! The negative controls of the scorecard's rows: a bug is put into the copy, and the row's own command must say that it
//! falls short. A row that cannot fail proves nothing.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use score::Card;

use super::patch::Finder;
use super::workshop::{self, Workshop};
use crate::paths;

/// A control may build a guest's programs or a fuzzer, each from nothing.
const LIMIT: Duration = Duration::from_secs(45 * 60);

/// A row, and what must make it fail.
pub struct Control {
    pub row: &'static str,
    /// Below `tests/`.
    pub patch: &'static str,
    pub finder: &'static str,
}

const fn control(row: &'static str, patch: &'static str, finder: &'static str) -> Control {
    Control { row, patch, finder }
}

/// R3 has its own, number 0. R4 measures the tests. R15 is in the others: the bug of R9 is one of space.
pub const CONTROLS: [Control; 12] = [
    control(
        "R1",
        "seeded-bugs/00-fsync-dropped.patch",
        "prove crash --quick",
    ),
    control(
        "R2",
        "seeded-bugs/07-crash-in-recovery.patch",
        "prove nested --quick",
    ),
    control(
        "R5",
        "controls/nbd-range.patch",
        "x fuzz --secs 60 --target nbd-request",
    ),
    control("R6", "controls/page-checksum.patch", "prove damage --quick"),
    control(
        "R7",
        "seeded-bugs/24-acknowledged-in-ram.patch",
        "x kill --quick",
    ),
    control(
        "R7",
        "seeded-bugs/24-acknowledged-in-ram.patch",
        "x kill-nbd --quick",
    ),
    control(
        "R7b",
        "seeded-bugs/00-fsync-dropped.patch",
        "x power-cut --quick",
    ),
    control(
        "R8",
        "seeded-bugs/15-fsync-retried.patch",
        "prove faults --quick",
    ),
    control(
        "R9",
        "seeded-bugs/05-freed-metadata-lost.patch",
        "prove model --quick",
    ),
    control(
        "R10",
        "seeded-bugs/21-read-without-ticket.patch",
        "x sched --quick",
    ),
    control("R13", "controls/format-version.patch", "x hostile --quick"),
    control("R14", "controls/device-kept.patch", "x churn --quick"),
];

/// Puts one after the other back, those of `row` or all.
pub fn run(row: Option<&str>, json: Option<&Path>) -> Result<ExitCode> {
    let is_wanted = |control: &&Control| row.is_none_or(|row| row == control.row);
    let controls: Vec<&Control> = CONTROLS.iter().filter(is_wanted).collect();
    if controls.is_empty() {
        bail!("{}: no row with a control", row.unwrap_or_default());
    }
    let workshop = Workshop::new();
    let mut card = Card::new("control", row.is_some(), None);
    for control in controls {
        println!("{}: {} [{}]", control.row, control.patch, control.finder);
        let failed = fails(&workshop, control).with_context(|| control.patch)?;
        match &failed {
            Some(figure) => println!("   fails      {figure}"),
            None => println!("   PASSES"),
        }
        let metric = format!("{} fails with {}", control.row, control.patch);
        card.at_least(&metric, u64::from(failed.is_some()), 1);
    }
    workshop.reset()?;
    crate::row::report(&card.into_figures(), json)
}

/// The figure of the row that counts what must not be and did: a target of 0 that was missed. A run that ends without
/// figures has none.
fn fails(workshop: &Workshop, control: &Control) -> Result<Option<String>> {
    workshop.reset()?;
    workshop.apply(&paths::root().join("tests").join(control.patch))?;
    let run = workshop::run(workshop.build(&Finder::parse(control.finder)?)?, LIMIT)?;
    let figure = failed_figure(&run.output, control.row);
    if figure.is_none() {
        eprintln!("{}", run.output);
    }
    Ok(figure.filter(|_| run.passed == Some(false)))
}

fn failed_figure(output: &str, row: &str) -> Option<String> {
    output.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_missed = words.windows(3).any(|window| window == ["=", "0", "FAIL"]);
        (words.first() == Some(&row) && is_missed).then(|| words.join(" "))
    })
}

#[cfg(test)]
mod tests {
    use super::failed_figure;

    #[test]
    fn only_a_count_of_what_must_not_be_of_the_row_itself_counts() {
        let output = "+ prove\nR1   states   3   >= 4  FAIL\nR12  x  0  = 0  pass\n\nR2   violations   7  = 0  FAIL (sampled)\n";
        let found = failed_figure(output, "R2");
        assert_eq!(found.as_deref(), Some("R2 violations 7 = 0 FAIL (sampled)"));
        assert_eq!(failed_figure(output, "R1"), None);
        assert_eq!(failed_figure(output, "R12"), None);
        assert_eq!(failed_figure("error: = 0 FAIL", "R1"), None);
    }
}
