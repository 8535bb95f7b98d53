//! The scorecard's figures: each is a measured value beside its target, printed as a line and kept as JSON.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

/// What a value is held against.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The value or more.
    AtLeast(f64),
    /// The value or less.
    AtMost(f64),
    /// The value itself.
    Exactly(f64),
}

impl Target {
    /// Whether `value` reaches it.
    pub fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
            Self::Exactly(exact) => (value - exact).abs() < 1e-9,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(value) => write!(f, ">= {}", number(*value)),
            Self::AtMost(value) => write!(f, "<= {}", number(*value)),
            Self::Exactly(value) => write!(f, "= {}", number(*value)),
        }
    }
}

/// One line of the scorecard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The row that it belongs to: `R1`, `R2`, ...
    pub row: String,
    /// What was measured, with its unit if it has one: `seconds to open`.
    pub metric: String,
    /// What came out.
    pub value: f64,
    /// What is asked for.
    pub target: Target,
    /// Whether `value` reaches `target`.
    pub pass: bool,
    /// Whether this was a sample, held against a sample's target.
    pub sampled: bool,
    /// Replays the run, where it is seeded.
    pub seed: Option<u64>,
}

/// The figures of one row, in the order in which they are shown.
#[derive(Clone, Debug)]
pub struct Card {
    row: &'static str,
    sampled: bool,
    seed: Option<u64>,
    figures: Vec<Figure>,
}

impl Card {
    /// An empty card of a row.
    pub fn new(row: &'static str, sampled: bool, seed: Option<u64>) -> Self {
        Self {
            row,
            sampled,
            seed,
            figures: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn add(&mut self, metric: &str, value: f64, target: Target) {
        self.figures.push(Figure {
            row: self.row.to_owned(),
            metric: metric.to_owned(),
            value,
            target,
            pass: target.is_met_by(value),
            sampled: self.sampled,
            seed: self.seed,
        });
    }

    /// Adds a number of things of which there must be so many.
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    pub fn at_least(&mut self, metric: &str, value: u64, least: u64) {
        self.add(metric, value as f64, Target::AtLeast(least as f64));
    }

    /// Adds a number of things of which there must be none.
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    pub fn none(&mut self, metric: &str, value: u64) {
        self.add(metric, value as f64, Target::Exactly(0.0));
    }

    /// Its figures.
    pub fn into_figures(self) -> Vec<Figure> {
        self.figures
    }
}

/// Whether every figure reaches its target, and there is one.
pub fn all_pass(figures: &[Figure]) -> bool {
    !figures.is_empty() && figures.iter().all(|figure| figure.pass)
}

/// Prints a line for each figure: row, metric, value, target, whether it passes.
///
/// # Errors
///
/// If `to` cannot be written.
pub fn print(figures: &[Figure], to: &mut impl Write) -> io::Result<()> {
    let width = figures.iter().map(|figure| figure.metric.len()).max();
    let width = width.unwrap_or(0);
    for figure in figures {
        writeln!(
            to,
            "{:<4} {:<width$}  {:>14}  {:>16}  {}{}",
            figure.row,
            figure.metric,
            number(figure.value),
            figure.target.to_string(),
            if figure.pass { "pass" } else { "FAIL" },
            if figure.sampled { " (sampled)" } else { "" },
        )?;
    }
    Ok(())
}

/// Writes the figures as a JSON array.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_json(figures: &[Figure], path: &Path) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(figures)?;
    text.push(b'\n');
    std::fs::write(path, text)
}

/// Reads what [`write_json`] wrote.
///
/// # Errors
///
/// If the file cannot be read or holds something else.
pub fn read_json(path: &Path) -> io::Result<Vec<Figure>> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// A number as people read it: thousands apart, decimals only where there are any.
pub fn number(value: f64) -> String {
    let text = if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && digit.is_ascii_digit() {
            let is_sign = grouped.ends_with('-');
            if !is_sign {
                grouped.push(',');
            }
        }
        grouped.push(digit);
    }
    if fraction.is_empty() {
        grouped
    } else {
        format!("{grouped}.{fraction}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(-123.5), "-123.50");
    }

    #[test]
    fn a_figure_passes_only_at_its_target() {
        let mut card = Card::new("R0", false, Some(7));
        card.at_least("states", 99, 100);
        card.none("violations", 0);
        card.add("seconds", 1.5, Target::AtMost(2.0));
        let figures = card.into_figures();
        let passed: Vec<bool> = figures.iter().map(|figure| figure.pass).collect();
        assert_eq!(passed, [false, true, true]);
        assert!(!all_pass(&figures) && all_pass(&figures[1..]) && !all_pass(&[]));
    }
}
