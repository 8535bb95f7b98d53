//! `x quick`: what every commit passes. Formatting, lints, documentation, tidy.

use std::process::{ExitCode, Stdio};

use anyhow::Result;

use crate::{command, paths, setup, tidy};

/// Runs all of it, so that one failure does not hide the next.
pub fn run() -> Result<ExitCode> {
    setup::install_missing()?;
    let mut clippy = command::cargo();
    clippy.args([
        "clippy",
        "--quiet",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    let mut doc = command::cargo();
    doc.args([
        "doc",
        "--quiet",
        "--locked",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    // A workspace of its own, which nothing else builds: that its lock still fits shows only here.
    let mut fuzz = command::cargo();
    fuzz.args(["tree", "--quiet", "--locked", "--prefix", "none"])
        .current_dir(paths::root().join("tests/fuzz"))
        .stdout(Stdio::null());
    let mut failed = Vec::new();
    let mut note = |name, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("x: {name}: {error:#}");
            failed.push(name);
        }
    };
    note(
        "fmt",
        command::run_shown(command::cargo().args(["fmt", "--all", "--check"])),
    );
    note("clippy", command::run_shown(&mut clippy));
    note("doc", command::run_shown(&mut doc));
    note("fuzz's lock", command::run_shown(&mut fuzz));
    note("tidy", tidy::run(false));
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("x: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}
