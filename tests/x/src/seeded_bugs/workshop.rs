//! A copy of the repository in which bugs are put back: its build folder stays warm, so each is an incremental build.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::patch::Finder;
use crate::{command, paths};

const POLL: Duration = Duration::from_millis(20);

/// The copy.
pub struct Workshop {
    tree: PathBuf,
    build: PathBuf,
}

/// How a finder's run ended.
#[derive(Debug)]
pub struct Run {
    pub seconds: f64,
    /// None: it was stopped at its limit.
    pub passed: Option<bool>,
    /// What it says it found: its first panic, in one line.
    pub finding: Option<String>,
    pub output: String,
}

impl Workshop {
    /// Below the build folder; nothing is copied yet.
    pub fn new() -> Self {
        let top = paths::target().join("seeded-bugs");
        Self {
            tree: top.join("tree"),
            build: top.join("target"),
        }
    }

    /// Makes the copy equal to the repository. Only files that differ are written, so that cargo builds only those.
    pub fn reset(&self) -> Result<()> {
        let listed = command::output(
            Command::new("git")
                .args([
                    "ls-files",
                    "-z",
                    "--cached",
                    "--others",
                    "--exclude-standard",
                ])
                .current_dir(paths::root()),
        )?;
        let mut wanted_files = BTreeSet::new();
        for name in listed.split('\0').filter(|name| !name.is_empty()) {
            let (from, to) = (paths::root().join(name), self.tree.join(name));
            let Ok(wanted) = fs::read(&from) else {
                // Deleted and not committed yet.
                continue;
            };
            wanted_files.insert(to.clone());
            if fs::read(&to).is_ok_and(|held| held == wanted) {
                continue;
            }
            let folder = to.parent().context("a file that lies nowhere")?;
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            fs::write(&to, wanted).with_context(|| format!("cannot write {}", to.display()))?;
        }
        remove_others(&self.tree, &wanted_files)
    }

    /// Puts one bug back.
    pub fn apply(&self, patch: &Path) -> Result<()> {
        git_apply(&self.tree, patch, false)
    }

    fn cargo(&self) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.tree);
        cargo.env("CARGO_TARGET_DIR", &self.build);
        cargo
    }

    /// Builds a finder: the program to run, with its arguments.
    pub fn build(&self, finder: &Finder) -> Result<Command> {
        let (verb, package) = match finder {
            Finder::Prove(_) => ("build", "blockfork-tests"),
            Finder::Suite(..) => ("test", "blockfork-tests"),
            Finder::Engine(_) => ("test", "blockfork-engine"),
            Finder::Verb(arguments) => return self.verb(arguments),
        };
        let mut cargo = self.cargo();
        cargo.args([verb, "--locked", "--quiet", "--profile", "prove"]);
        cargo.args(["--package", package]);
        let (target, arguments) = match finder {
            Finder::Prove(arguments) => {
                cargo.args(["--bin", "prove"]);
                ("prove", arguments.clone())
            }
            Finder::Suite(suite, filter) => {
                cargo.args(["--no-run", "--test", suite]);
                (suite.as_str(), filter.iter().cloned().collect())
            }
            Finder::Engine(filter) => {
                cargo.args(["--no-run", "--lib"]);
                ("blockfork", vec![filter.clone()])
            }
            Finder::Verb(_) => bail!("{finder} is built by itself"),
        };
        cargo.arg("--message-format=json-render-diagnostics");
        // What is built again for each bug is built for a quick build; the rest is shared with `prove` as it is.
        for package in ["blockfork-engine", "blockfork-tests", "ublkctl"] {
            for setting in ["opt-level=1", "debug=0"] {
                cargo.arg("--config");
                cargo.arg(format!("profile.prove.package.{package}.{setting}"));
            }
        }
        // What does not lie in the copy is built as for `prove` itself, and found there.
        cargo.env("CARGO_BUILD_BUILD_DIR", paths::target());
        // A bug need not be beautiful.
        let messages = command::output_quietly(&mut cargo)?;
        let executable = messages.lines().find_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = message.pointer("/target/name")? == target;
            is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
        });
        let mut program = Command::new(executable.context("cargo built no finder")?);
        program.args(arguments).current_dir(&self.tree);
        program.env("RUST_BACKTRACE", "0");
        Ok(program)
    }

    /// The copy's own `cargo x`, which builds what it runs.
    fn verb(&self, arguments: &[String]) -> Result<Command> {
        // The guests' kernels are the same.
        let (cache, link) = (paths::guest_cache(), self.build.join("guest"));
        fs::create_dir_all(&cache)?;
        fs::create_dir_all(&self.build)?;
        if !link.exists() {
            std::os::unix::fs::symlink(&cache, &link)
                .with_context(|| format!("cannot link {}", link.display()))?;
        }
        command::run(
            self.cargo()
                .args(["build", "--quiet", "--locked", "--package", "x"]),
        )?;
        let mut program = Command::new(self.build.join("debug/x"));
        program.args(arguments).current_dir(&self.tree);
        program.env("CARGO_TARGET_DIR", &self.build);
        Ok(program)
    }
}

/// Removes every file below `folder` that is not wanted: a module that has moved would be there twice.
fn remove_others(folder: &Path, wanted: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, wanted)?;
        } else if !wanted.contains(&path) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Applies a patch to a tree, or with `check` only says whether it would.
pub fn git_apply(tree: &Path, patch: &Path, check: bool) -> Result<()> {
    let mut git = Command::new("git");
    git.arg("apply").args(check.then_some("--check"));
    git.arg(patch).current_dir(tree);
    // The copy lies inside the repository; git is to see a plain folder.
    if let Some(above) = tree.parent() {
        git.env("GIT_CEILING_DIRECTORIES", above);
    }
    command::run(&mut git)
}

/// Runs a built finder; one that takes longer than `limit` is stopped.
pub fn run(mut program: Command, limit: Duration) -> Result<Run> {
    let shown = command::shown(&program);
    #[expect(clippy::disallowed_methods, reason = "the limit is on real time")]
    let began = Instant::now();
    let mut child = program
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("{shown}: no pipes");
    };
    let readers = [
        thread::spawn(move || read(output)),
        thread::spawn(move || read(errors)),
    ];
    let status = loop {
        let ended = child
            .try_wait()
            .with_context(|| format!("cannot wait for {shown}"))?;
        match ended {
            Some(status) => break Some(status),
            None if began.elapsed() > limit => {
                child
                    .kill()
                    .with_context(|| format!("cannot stop {shown}"))?;
                child
                    .wait()
                    .with_context(|| format!("cannot wait for {shown}"))?;
                break None;
            }
            None => thread::sleep(POLL),
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    let texts = readers.map(|reader| reader.join().unwrap_or_default());
    let output = texts.concat();
    Ok(Run {
        seconds,
        passed: status.map(|status| status.success()),
        finding: finding(&output),
        output,
    })
}

fn read(mut from: impl Read) -> String {
    let mut bytes = Vec::new();
    // What could be read before an error is what there is.
    drop(from.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first panic's message: the line behind the one that says where.
fn finding(output: &str) -> Option<String> {
    let mut lines = output.lines();
    lines.find(|line| line.contains(" panicked at "))?;
    lines
        .find(|line| !line.trim().is_empty())
        .map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::finding;

    #[test]
    fn a_finding_is_the_first_panics_message() {
        let output = "running\n\nthread 'a' panicked at x.rs:1:2:\nblock 7 holds 3\nnote: more\n";
        assert_eq!(finding(output).as_deref(), Some("block 7 holds 3"));
        assert_eq!(finding("R9 violations 1 FAIL"), None);
    }
}
