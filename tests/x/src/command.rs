//! Running other programs: say what runs, fail with its name.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;

/// The program and its arguments as one would type them.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut words = vec![name.to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// Runs it with this process's output; an exit status other than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Like [`run`], with the command shown first: for the steps that a developer waits for.
pub fn run_shown(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", shown(command));
    run(command)
}

/// Runs it and returns what it wrote on stdout.
pub fn output(command: &mut Command) -> Result<String> {
    captured(command.stderr(Stdio::inherit()))
}

/// The same; what it complains about is shown only if it fails.
pub fn output_quietly(command: &mut Command) -> Result<String> {
    captured(command.stderr(Stdio::piped()))
}

fn captured(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !output.status.success() {
        let complaints = String::from_utf8_lossy(&output.stderr);
        let said = format!("{} failed: {}\n{complaints}", shown(command), output.status);
        bail!("{}", said.trim_end());
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{}: its output is not UTF-8", shown(command)))
}

/// The cargo that runs us, in the repository's top folder.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(paths::root());
    cargo
}

/// Builds the release `ublkctl` and returns its path.
pub fn build_ublkctl() -> Result<PathBuf> {
    run_shown(cargo().args(["build", "--locked", "--release", "--package", "ublkctl"]))?;
    Ok(paths::target().join("release/ublkctl"))
}

/// Builds `prove` as its rows are measured, for speed and with its checks; where it is.
pub fn build_prove() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--locked", "--profile", "prove"]);
    build.args(["--package", "blockfork-tests", "--bin", "prove"]);
    run_shown(&mut build)?;
    Ok(paths::target().join("prove/prove"))
}
