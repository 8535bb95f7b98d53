//! What goes to stdout: tables for people, tab-separated lines for scripts, JSON for programs.
//! A reader that goes away (`| head`) is not an error.

use crate::size;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::units::Timestamp;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{self, Write as _};

/// How a command's answer is to look.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct Format {
    /// Print JSON
    #[arg(long, conflicts_with_all = ["no_header", "parsable"])]
    pub(crate) json: bool,
    /// Print no header, and tabs between the columns
    #[arg(short = 'H', long = "no-header")]
    pub(crate) no_header: bool,
    /// Print sizes in bytes and times in seconds since 1970
    #[arg(short = 'p', long)]
    pub(crate) parsable: bool,
}

impl Format {
    /// A size as this format shows it.
    pub(crate) fn size(self, bytes: u64) -> String {
        if self.parsable {
            bytes.to_string()
        } else {
            size::human(bytes)
        }
    }

    /// A moment: its age for people, seconds since the epoch for scripts. A moment in the future shows as `in 17y`.
    pub(crate) fn moment(self, at: Timestamp, now: Timestamp) -> String {
        if self.parsable {
            return (at.0 / 1_000_000_000).to_string();
        }
        match at.0.checked_sub(now.0) {
            // Clocks are adjusted by fractions of a second all the time.
            Some(ahead @ 1_000_000_000..) => format!("in {}", age(ahead)),
            Some(_) => age(0),
            None => age(now.0 - at.0),
        }
    }

    /// A duration in nanoseconds.
    pub(crate) fn duration(self, ns: u64) -> String {
        if self.parsable {
            ns.to_string()
        } else {
            latency(ns)
        }
    }
}

/// Whether a column's cells stand at its left or its right side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows under a header.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these columns.
    pub(crate) fn new(columns: impl IntoIterator<Item = (&'static str, Align)>) -> Self {
        Self {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, one cell a column; an empty cell shows as `-`.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(
            cells.len(),
            self.columns.len(),
            "a row has one cell a column"
        );
        let shown = |cell: String| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                crate::exit_code::printable(&cell)
            }
        };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// The table as text.
    pub(crate) fn render(&self, format: Format) -> String {
        let mut out = String::new();
        if format.no_header {
            for row in &self.rows {
                out.push_str(&row.join("\t"));
                out.push('\n');
            }
            return out;
        }
        let header: Vec<String> = self
            .columns
            .iter()
            .map(|(name, _)| name.to_uppercase())
            .collect();
        let lines = || std::iter::once(&header).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                lines()
                    .filter_map(|line| line.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        for line in lines() {
            let mut text = String::new();
            for ((cell, width), (_, align)) in line.iter().zip(&widths).zip(&self.columns) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                let pad = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => text.extend([cell.as_str(), &pad]),
                    Align::Right => text.extend([pad.as_str(), cell]),
                }
            }
            out.push_str(text.trim_end());
            out.push('\n');
        }
        out
    }

    /// Prints the table.
    pub(crate) fn print(&self, format: Format) -> Result<()> {
        text(&self.render(format))
    }
}

/// Prints `name: value` lines, or with no header `name`, tab, `value`.
pub(crate) fn properties(format: Format, properties: &[(&str, String)]) -> Result<()> {
    let width = properties
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for (name, value) in properties {
        let value = crate::exit_code::printable(value);
        let written = if format.no_header {
            writeln!(out, "{name}\t{value}")
        } else {
            writeln!(out, "{name:width$}  {value}")
        };
        written.map_err(|e| Error::io(io::Error::other(e), "text"))?;
    }
    text(&out)
}

/// Prints a value as JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<()> {
    let mut out = serde_json::to_string_pretty(value).map_err(|e| Error::io(e.into(), "JSON"))?;
    out.push('\n');
    text(&out)
}

/// A value as JSON in one line, without its end.
pub(crate) fn json_text<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::io(e.into(), "JSON"))
}

/// Prints text as it is.
pub(crate) fn text(out: &str) -> Result<()> {
    text_if_read(out).map(drop)
}

/// Prints text as it is; false if nobody reads it any more.
pub(crate) fn text_if_read(out: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    written(
        stdout
            .write_all(out.as_bytes())
            .and_then(|()| stdout.flush()),
    )
}

/// What came of writing to stdout: whether somebody reads it. An error is only that the command failed, whatever the
/// errno: a disk that has no room for a command's output is not a pool without space.
pub(crate) fn written(result: io::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::with(
            ErrorKind::Io,
            format!("stdout: cannot be written: {e}"),
        )),
    }
}

/// Says one line on stderr, with the program's name. Where stderr is gone there is nobody to tell.
pub(crate) fn say(line: &str) {
    let line = format!("ublkctl: {}\n", crate::exit_code::printable(line));
    if io::stderr().lock().write_all(line.as_bytes()).is_err() {
        tracing::debug!("stderr is closed");
    }
}

/// Nanoseconds as an age: the largest unit that fits.
fn age(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        86_400..31_536_000 => format!("{}d", seconds / 86_400),
        _ => format!("{}y", seconds / 31_536_000),
    }
}

/// Nanoseconds as a latency.
fn latency(ns: u64) -> String {
    match ns {
        0 => String::new(),
        1..1000 => format!("{ns}ns"),
        1000..1_000_000 => format!("{}us", ns / 1000),
        1_000_000..10_000_000_000 => format!("{}ms", ns / 1_000_000),
        _ => format!("{}s", ns / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new([("name", Align::Left), ("size", Align::Right)]);
        table.row(vec!["p0/v".into(), "10G".into()]);
        table.row(vec!["p0/long@name".into(), String::new()]);
        table
    }

    #[test]
    fn people_get_aligned_columns() {
        let expected = "NAME          SIZE\np0/v           10G\np0/long@name     -\n";
        assert_eq!(table().render(Format::default()), expected);
    }

    #[test]
    fn scripts_get_tabs_and_no_header() {
        let format = Format {
            no_header: true,
            ..Format::default()
        };
        assert_eq!(table().render(format), "p0/v\t10G\np0/long@name\t-\n");
    }

    #[test]
    fn a_cell_cannot_break_its_line() {
        let mut table = Table::new([("path", Align::Left)]);
        table.row(vec!["/srv/a\nb\tc".into()]);
        assert_eq!(table.render(Format::default()), "PATH\n/srv/a\\nb\\tc\n");
    }

    #[test]
    fn an_output_that_cannot_be_written_is_a_failure_of_the_command_alone() {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EIO] {
            let error = written(Err(io::Error::from_raw_os_error(errno))).unwrap_err();
            assert_eq!(error.kind().exit_code(), crate::exit_code::FAILED);
        }
        let closed = written(Err(io::Error::from_raw_os_error(libc::EPIPE)));
        assert!(!closed.unwrap());
    }

    #[test]
    fn ages_and_latencies_are_short() {
        let format = Format::default();
        let second = 1_000_000_000;
        assert_eq!(format.moment(Timestamp(0), Timestamp(59 * second)), "59s");
        assert_eq!(format.moment(Timestamp(0), Timestamp(7300 * second)), "2h");
        assert_eq!(format.moment(Timestamp(5), Timestamp(0)), "0s");
        let years = 17 * 31_536_000 * second;
        assert_eq!(format.moment(Timestamp(years), Timestamp(0)), "in 17y");
        assert_eq!(format.moment(Timestamp(second), Timestamp(0)), "in 1s");
        assert_eq!(format.duration(1_500), "1us");
        assert_eq!(format.duration(2_000_000), "2ms");
    }
}
