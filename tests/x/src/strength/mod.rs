//! R4 of the scorecard: how much the tests notice where a mistake loses data.

pub mod coverage;
pub mod miri;
pub mod mutants;

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::command;

/// The rooms: maps, space, journal, checkpoint, recovery, and what ties them together.
const ROOMS: [&str; 7] = [
    "engine/src/map/*.rs",
    "engine/src/space/*.rs",
    "engine/src/journal/*.rs",
    "engine/src/checkpoint/*.rs",
    "engine/src/metadata/*.rs",
    "engine/src/pool/open.rs",
    "engine/src/pool/recovery/*.rs",
];

/// The packages whose tests have to notice.
const PACKAGES: [&str; 2] = ["blockfork-engine", "blockfork-tests"];

/// Of those packages, the tests on the simulated device. What needs sockets, processes or a kernel would cost more time
/// than it notices.
const TARGETS: [&str; 9] = [
    "--lib",
    "--test=crash",
    "--test=full_file_system",
    "--test=hostile_bytes",
    "--test=interleaving",
    "--test=model",
    "--test=placement",
    "--test=promises",
    "--test=repair",
];

/// For suites that go by seeds: how many, so that one run of everything takes some five seconds.
const SEEDS: (&str, &str) = ("BLOCKFORK_SEEDS", "6");

/// Whether a cargo subcommand is there; otherwise an error that says what installs it.
fn require(subcommand: &str) -> Result<()> {
    let mut probe = command::cargo();
    probe.args([subcommand, "--version"]);
    if runs(&mut probe) {
        return Ok(());
    }
    bail!("cargo {subcommand} is missing: cargo install --locked cargo-{subcommand}");
}

fn runs(probe: &mut Command) -> bool {
    probe.stdin(Stdio::null());
    probe.stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}
