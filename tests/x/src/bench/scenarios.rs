//! What the guest measured around a load: each figure's median, held against a goal.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};

use super::results::median;

/// What can be measured, by the functions of the guest's script.
pub(super) const NAMES: [&str; 6] = [
    "stall",
    "fork_to_usable",
    "slow_flushes",
    "volumes",
    "system_calls",
    "fragmentation",
];

/// How long the delayed device is told to take for a flush, in milliseconds.
const FLUSH_MS: f64 = 20.0;

/// A bound of a figure.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Reported only.
    None,
}

/// A row of the table.
struct Row {
    what: &'static str,
    value: fn(&Figures) -> Option<f64>,
    bound: Bound,
    unit: &'static str,
}

/// The figures that the guest printed, each with all its turns.
#[derive(Debug, Default)]
pub(super) struct Figures(BTreeMap<String, Vec<f64>>);

const ROWS: [Row; 23] = [
    row(
        "longest 4k write in a second with a snapshot in it, depth 32",
        |figures| figures.ms("longest-write-with-snapshot-us"),
        Bound::None,
        "ms",
    ),
    row(
        "the same, against a second without",
        |figures| {
            Some(
                figures.ms("longest-write-with-snapshot-us")?
                    / figures.ms("longest-write-with-nothing-us")?,
            )
        },
        Bound::AtMost(2.0),
        "times",
    ),
    row(
        "a second with a `list` in it, against one without",
        |figures| {
            figures.ratio(
                "longest-write-with-list-us",
                "longest-write-with-nothing-us",
            )
        },
        Bound::None,
        "times",
    ),
    row(
        "`snapshot`, beyond `list`, where a flush takes 20 ms",
        |figures| {
            let spent = figures.ms("snapshot-slow-flush-us")? - figures.ms("list-slow-flush-us")?;
            Some(spent / FLUSH_MS)
        },
        Bound::AtMost(2.0),
        "flushes",
    ),
    row(
        "`clone` and `attach`",
        |figures| Some(figures.ms("clone-us")? + figures.ms("attach-us")?),
        Bound::None,
        "ms",
    ),
    row(
        "the same, beyond adding a `loop-z`",
        |figures| {
            let fork = figures.ms("clone-us")? + figures.ms("attach-us")?;
            Some(fork - figures.ms("loop-add-us")?)
        },
        Bound::AtMost(20.0),
        "ms",
    ),
    row(
        "`rollback` of an attached volume, beyond `list` and one flush",
        |figures| {
            let spent = figures.ms("rollback-slow-flush-us")? - figures.ms("list-slow-flush-us")?;
            Some(spent - flush_ms(figures)?)
        },
        Bound::AtMost(2.0),
        "ms",
    ),
    row("that flush, by itself", flush_ms, Bound::None, "ms"),
    row(
        "64 volumes at once, against one with 64 jobs",
        |figures| figures.ratio("64-volumes", "one-volume-64-jobs"),
        Bound::AtLeast(0.9),
        "times",
    ),
    row(
        "4k overwrite + fdatasync, 8 jobs against one, a flush takes 20 ms",
        |figures| figures.ratio("slow-flush-8-jobs", "slow-flush-1-job"),
        Bound::AtLeast(4.0),
        "times",
    ),
    row(
        "the same of `loop-z`",
        |figures| figures.ratio("slow-flush-loop-z-8-jobs", "slow-flush-loop-z-1-job"),
        Bound::None,
        "times",
    ),
    row(
        "the same, 8 volumes with a job each against one",
        |figures| figures.ratio("slow-flush-8-volumes", "slow-flush-1-job"),
        Bound::AtLeast(4.0),
        "times",
    ),
    row(
        "flushes of the device per fdatasync, nothing mapped",
        |figures| figures.median("in-place-flushes-per-sync"),
        Bound::AtMost(1.05),
        "",
    ),
    row(
        "blocks written to the device per block and fdatasync, nothing mapped",
        |figures| figures.median("in-place-blocks-per-sync"),
        Bound::AtMost(1.05),
        "",
    ),
    row(
        "flushes of the device per fdatasync, each commit maps",
        |figures| figures.median("redirected-flushes-per-sync"),
        Bound::AtMost(2.05),
        "",
    ),
    row(
        "blocks written to the device per block and fdatasync, each commit maps",
        |figures| figures.median("redirected-blocks-per-sync"),
        Bound::None,
        "",
    ),
    row(
        "system calls per 4k read, depth 32",
        |figures| figures.median("calls-read"),
        Bound::None,
        "",
    ),
    row(
        "the same, against `loop-z`",
        |figures| figures.ratio("calls-read", "calls-loop-z-read"),
        Bound::AtMost(1.1),
        "times",
    ),
    row(
        "system calls per 4k overwrite, depth 32",
        |figures| figures.median("calls-overwrite"),
        Bound::None,
        "",
    ),
    row(
        "the same, against `loop-z`",
        |figures| figures.ratio("calls-overwrite", "calls-loop-z-overwrite"),
        Bound::AtMost(1.1),
        "times",
    ),
    row(
        "system calls per redirected 4k write, depth 32, against an overwrite of `loop-z`",
        |figures| figures.ratio("calls-redirect", "calls-loop-z-overwrite"),
        Bound::AtMost(1.1),
        "times",
    ),
    row(
        "256k sequential read, fresh",
        |figures| figures.median("sequential-read-fresh"),
        Bound::None,
        "/s",
    ),
    row(
        "the same after all was written again below a snapshot, 4k at random",
        |figures| figures.ratio("sequential-read-redirected", "sequential-read-fresh"),
        Bound::AtLeast(0.5),
        "times",
    ),
];

/// How long a flush of the delayed device takes that comes at any time. It ends with a tick of the guest's clock, so one
/// right after another takes all of [`FLUSH_MS`], and this a little less.
fn flush_ms(figures: &Figures) -> Option<f64> {
    Some(figures.ms("flush-us")? - figures.ms("no-flush-us")?)
}

const fn row(
    what: &'static str,
    value: fn(&Figures) -> Option<f64>,
    bound: Bound,
    unit: &'static str,
) -> Row {
    Row {
        what,
        value,
        bound,
        unit,
    }
}

impl Figures {
    /// Reads the lines `@figure NAME NUMBER`.
    pub(super) fn read(output: &str) -> Result<Self> {
        let mut figures = Self::default();
        for line in output.lines() {
            let Some(rest) = line.strip_prefix("@figure ") else {
                continue;
            };
            let (name, number) = rest
                .split_once(' ')
                .with_context(|| format!("not a figure: {line}"))?;
            let number = number
                .trim()
                .parse()
                .with_context(|| format!("not a figure: {line}"))?;
            figures.0.entry(name.to_owned()).or_default().push(number);
        }
        if figures.0.is_empty() {
            bail!("the guest printed no figures:\n{output}");
        }
        Ok(figures)
    }

    /// Every single measurement, for whoever waits at the terminal.
    pub(super) fn show_turns(&self) {
        for (name, turns) in &self.0 {
            eprintln!("x: {name}: {turns:?}");
        }
    }

    fn median(&self, name: &str) -> Option<f64> {
        median(self.0.get(name)?)
    }

    /// Of a figure in microseconds.
    fn ms(&self, name: &str) -> Option<f64> {
        Some(self.median(name)? / 1000.0)
    }

    fn ratio(&self, name: &str, other: &str) -> Option<f64> {
        Some(self.median(name)? / self.median(other)?)
    }

    /// The rows for which there are figures, in Markdown.
    pub(super) fn table(&self) -> Result<String> {
        let mut text = String::from("| what | goal | measured | |\n|---|---:|---:|---|\n");
        for row in &ROWS {
            let Some(value) = (row.value)(self) else {
                continue;
            };
            let (goal, verdict) = match row.bound {
                Bound::AtMost(most) => (format!("at most {most}"), verdict(value <= most)),
                Bound::AtLeast(least) => (format!("at least {least}"), verdict(value >= least)),
                Bound::None => (String::new(), ""),
            };
            writeln!(
                text,
                "| {} | {goal} | {value:.2} {} | {verdict} |",
                row.what, row.unit
            )?;
        }
        Ok(text)
    }
}

const fn verdict(is_reached: bool) -> &'static str {
    if is_reached { "reached" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_ratio_of_medians() {
        let figures = Figures::read(
            "noise\n@figure one-volume-64-jobs 200\n@figure 64-volumes 100\n@figure 64-volumes 300\n@figure 64-volumes 190\n",
        )
        .unwrap();
        let table = figures.table().unwrap();
        assert!(
            table.contains("| at least 0.9 | 0.95 times | reached |"),
            "{table}"
        );
    }

    #[test]
    fn what_is_not_a_number_is_no_figure() {
        assert!(Figures::read("@figure a b\n").is_err());
        assert!(Figures::read("nothing\n").is_err());
    }
}
