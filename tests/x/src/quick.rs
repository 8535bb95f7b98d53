//! `x quick`: what every commit passes. Formatting, lints, documentation, tidy.

use std::process::ExitCode;

use anyhow::Result;

use crate::{command, setup, tidy};

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
    note("tidy", tidy::run(false));
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("x: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}
