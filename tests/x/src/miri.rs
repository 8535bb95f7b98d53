//! `x miri`: the engine's unit tests in an interpreter that objects to undefined behaviour. What needs the kernel's
//! files or rings is marked `cfg_attr(miri, ignore)`.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::{command, paths};

/// Runs them; the runner's own count comes last.
pub fn run() -> Result<ExitCode> {
    let mut asked = Command::new("cargo");
    asked.args(["+nightly", "miri", "--version"]);
    asked
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if !asked.status().is_ok_and(|status| status.success()) {
        bail!("Miri is missing; rustup toolchain install nightly --component miri,rust-src");
    }
    let mut miri = Command::new("cargo");
    miri.current_dir(paths::root());
    miri.args([
        "+nightly",
        "miri",
        "test",
        "--locked",
        "-p",
        "blockfork-engine",
        "--lib",
    ]);
    // The toolchain of the cargo that runs us must not be the one that runs Miri.
    miri.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    miri.env("CARGO_TARGET_DIR", paths::target().join("miri"));
    miri.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    eprintln!("+ {}", command::shown(&miri));
    let status = miri
        .stdin(Stdio::null())
        .status()
        .context("cannot start cargo")?;
    Ok(ExitCode::from(u8::from(!status.success())))
}
