//! `x miri`: the engine's unit tests in an interpreter that objects to undefined behaviour. What needs the kernel's
//! files or rings, or would take minutes there, is marked `cfg_attr(miri, ignore = "needs ...")`.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use score::Card;

use super::runs;
use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample: the tests of what is small
    #[arg(long, conflicts_with = "only")]
    quick: bool,
    /// Only tests whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Fewer tests than this were not all of them.
const TESTS_MIN: u64 = 60;
/// The rooms of a sample: every decoder, and where there is `unsafe`.
const SAMPLE: [&str; 6] = [
    "format::",
    "name::",
    "nbd::",
    "device::buffer::",
    "sync::",
    "units::",
];
const SAMPLE_TESTS_MIN: u64 = 10;

/// Runs them; the exit status is that of the figures.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut asked = Command::new("cargo");
    if !runs(asked.args(["+nightly", "miri", "--version"])) {
        bail!("Miri is missing; rustup toolchain install nightly --component miri,rust-src");
    }
    let mut miri = Command::new("cargo");
    miri.current_dir(paths::root());
    miri.args(["+nightly", "miri", "test", "--locked"]);
    miri.args(["--package", "blockfork-engine", "--lib"]);
    miri.arg("--").args(&options.only);
    if options.quick {
        miri.args(SAMPLE);
    }
    // The toolchain of the cargo that runs us must not be the one that runs Miri.
    miri.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    miri.env_remove("RUSTC").env_remove("RUSTDOC");
    miri.env("CARGO_TARGET_DIR", paths::target().join("miri"));
    miri.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    eprintln!("+ {}", command::shown(&miri));
    miri.stdin(Stdio::null());
    miri.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = miri.spawn().context("cannot start cargo")?;
    let errors = child.stderr.take().context("no stderr")?;
    let output = child.stdout.take().context("no stdout")?;
    let other = thread::spawn(move || relay(errors));
    let lines = relay(output);
    let complaints = other.join().unwrap_or_default();
    let status = child.wait().context("cannot wait for cargo")?;

    let seen = count(&lines, &complaints);
    let mut card = Card::new("R4", options.only.is_some() || options.quick, None);
    let least = match (&options.only, options.quick) {
        (Some(_), _) => 1,
        (None, true) => SAMPLE_TESTS_MIN,
        (None, false) => TESTS_MIN,
    };
    card.at_least("tests under Miri", seen.passed, least);
    card.none("undefined behaviour under Miri", seen.undefined);
    // What else ends a run: a test that failed, or a call that Miri does not know.
    let others = u64::from(!status.success() && seen.undefined == 0);
    card.none("other failures under Miri", seen.failed.max(others));
    crate::row::report(&card.into_figures(), options.json.as_deref())
}

/// Passes lines on as they come, and keeps them.
fn relay(from: impl Read) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        eprintln!("{line}");
        lines.push(line);
    }
    lines
}

/// What a run told.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    passed: u64,
    failed: u64,
    undefined: u64,
}

/// Miri ends the run at the first undefined behaviour, so what the tests count themselves may never come.
fn count(lines: &[String], complaints: &[String]) -> Seen {
    let ends = |end: &str| {
        let tests = lines.iter().filter(|line| line.starts_with("test "));
        tests.filter(|line| line.ends_with(end)).count() as u64
    };
    let undefined = complaints
        .iter()
        .filter(|line| line.starts_with("error") && line.contains("Undefined Behavior"));
    Seen {
        passed: ends(" ... ok"),
        failed: ends(" ... FAILED"),
        undefined: undefined.count() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_complaints_are_counted_where_a_run_ends_early() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let output = lines(
            "running 9 tests\ntest a ... ok\ntest b ... ignored, needs files\ntest c ... FAILED\ntest d ... ",
        );
        let complaints =
            lines("warning: x\nerror: Undefined Behavior: out-of-bounds\nerror: aborting");
        let seen = Seen {
            passed: 1,
            failed: 1,
            undefined: 1,
        };
        assert_eq!(count(&output, &complaints), seen);
    }
}
