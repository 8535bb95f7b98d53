//! ublkctl as it was at a commit.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{command, paths};

/// Builds it in a working tree of its own, below the build folder; the commit's short name, and the program.
pub(super) fn build(revision: &str) -> Result<(String, PathBuf)> {
    let parse = ["rev-parse", "--short", "--verify"];
    let commit = command::output(&mut git(&parse, &[&format!("{revision}^{{commit}}")]))?;
    let commit = commit.trim().to_owned();
    let tree = paths::target().join("against/tree");
    let place = tree.to_string_lossy().into_owned();
    if !tree.exists() {
        // Also where the tree was deleted and git still knows it.
        let add = ["worktree", "add", "--force", "--detach"];
        command::run_shown(&mut git(&add, &[&place, &commit]))?;
    }
    command::run_shown(&mut git(
        &["-C", &place, "checkout", "--quiet", "--detach"],
        &[&commit],
    ))?;
    let mut build = command::cargo();
    build
        .current_dir(&tree)
        .args(["build", "--locked", "--release", "--package", "ublkctl"])
        .args(["--target-dir"])
        .arg(paths::target().join("against/target"));
    command::run_shown(&mut build)?;
    Ok((
        commit,
        paths::target().join("against/target/release/ublkctl"),
    ))
}

fn git(verb: &[&str], names: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.current_dir(paths::root()).args(verb).args(names);
    git
}
