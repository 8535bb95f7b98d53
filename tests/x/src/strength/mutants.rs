//! `x mutants`: changes the code in one place at a time, and counts the changes that no test notices.
//!
//! Those that the engine's unit tests miss go on to the suites, which take longer. cargo-mutants works on a copy of the
//! repository below the build folder, in place, so that one incremental build serves all mutants of all runs. `.cargo/mutants.toml` has what is left out, with reasons.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use score::{Card, Target};
use serde_json::Value;

use super::{PACKAGES, ROOMS, SEEDS, TARGETS, require};
use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample of 8, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// So many mutants, drawn by the seed [default: 100]; more than there are: all
    #[arg(long)]
    sample: Option<usize>,
    /// All there are, which takes hours
    #[arg(long, conflicts_with_all = ["quick", "sample"])]
    all: bool,
    /// The seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only mutants whose name, as the list of survivors has it, contains this
    #[arg(long)]
    only: Option<String>,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Most of the address space that a compiler or a test may take: a mutant may allocate without an end.
const ADDRESS_SPACE_KIB: u64 = 12_000_000;
/// A mutant that writes without end does not fill this machine, 4 GiB a file: as `ulimit -f` counts.
const FILE_SECTORS: u64 = 8 << 20;
/// A test run that takes longer hangs: the mutant is noticed.
const TIMEOUT_SECONDS: &str = "90";

/// Whose tests look at a mutant.
struct Tests {
    packages: &'static [&'static str],
    targets: &'static [&'static str],
}

/// What builds and runs in seconds.
const UNIT_TESTS: Tests = Tests {
    packages: &[PACKAGES[0]],
    targets: &[TARGETS[0]],
};
const EVERYTHING: Tests = Tests {
    packages: &PACKAGES,
    targets: &TARGETS,
};

/// Runs it; the exit status is that of the figures.
pub fn run(options: &Options) -> Result<ExitCode> {
    require("mutants")?;
    let tree = paths::target().join("mutants/tree");
    copy_sources(&paths::root(), &tree)?;
    let all = list(&tree)?;
    let wanted = match (options.sample, options.all, options.quick) {
        (Some(sample), ..) => sample,
        (None, true, _) => all.len(),
        (None, false, true) => 8,
        (None, false, false) => 100,
    };
    let mut drawn = all.clone();
    drawn.retain(|name| options.only.as_ref().is_none_or(|part| name.contains(part)));
    drawn.sort_by_key(|name| draw(options.seed, name));
    drawn.truncate(wanted);
    if drawn.is_empty() {
        bail!("no mutant has such a name");
    }
    eprintln!(
        "{} of {} mutants, seed {}",
        drawn.len(),
        all.len(),
        options.seed
    );
    let first = test(&tree, &drawn, &UNIT_TESTS)?;
    // What the unit tests miss is left to all others, whose build alone takes longer than a sample may.
    let ended = if first.survivors.is_empty() || options.quick {
        first
    } else {
        let mut second = test(&tree, &first.survivors, &EVERYTHING)?;
        second.caught += first.caught;
        second
    };
    for name in &ended.survivors {
        println!("survived: {name}");
    }
    let tested = ended.caught + ended.survivors.len();
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    let percent = 100.0 * ended.caught as f64 / tested.max(1) as f64;
    // Of a few mutants one is many per cent, and a sample asks the unit tests only.
    let least = if options.quick { 75.0 } else { 90.0 };
    let mut card = Card::new("R4", drawn.len() < all.len(), Some(options.seed));
    card.at_least("mutants tested", tested as u64, drawn.len() as u64 * 3 / 4);
    card.add("% of mutants caught", percent, Target::AtLeast(least));
    crate::row::report(&card.into_figures(), options.json.as_deref())
}

/// Makes `tree` hold the repository's files as they are now. What is the same stays untouched: cargo goes by the time
/// of a change.
fn copy_sources(root: &Path, tree: &Path) -> Result<()> {
    let mut git = Command::new("git");
    git.current_dir(root);
    git.args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let listed = command::output(&mut git)?;
    let files: BTreeSet<&Path> = listed
        .split_terminator('\0')
        .map(Path::new)
        .filter(|path| root.join(path).is_file())
        .collect();
    for path in &files {
        let (from, to) = (root.join(path), tree.join(path));
        let bytes = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
        if fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, bytes).with_context(|| format!("cannot write {}", to.display()))?;
    }
    remove_others(tree, tree, &files)
}

/// Removes what is not in the repository any more, the build folder aside.
fn remove_others(tree: &Path, folder: &Path, files: &BTreeSet<&Path>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let within = path.strip_prefix(tree)?;
        if path.is_dir() {
            if within != Path::new("target") {
                remove_others(tree, &path, files)?;
            }
        } else if !files.contains(within) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn cargo_mutants(tree: &Path) -> Command {
    let mut mutants = command::cargo();
    mutants.arg("mutants").arg("--dir").arg(tree);
    mutants.args(ROOMS.iter().flat_map(|room| ["--file", room]));
    mutants.args(["--colors", "never"]);
    // The copy has a build folder of its own.
    mutants.env_remove("CARGO_TARGET_DIR");
    mutants
}

/// The names of all mutants there are.
fn list(tree: &Path) -> Result<Vec<String>> {
    let listed = command::output(cargo_mutants(tree).args(["--list", "--json"]))?;
    let listed: Vec<Value> = serde_json::from_str(&listed).context("the list of mutants")?;
    let names = listed.iter().filter_map(|mutant| mutant["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// A mutant's place in the order that a seed gives: FNV-1a of seed and name, mixed.
fn draw(seed: u64, name: &str) -> u64 {
    let text = format!("{seed}:{name}");
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

/// What came of the mutants that build.
struct Ended {
    caught: usize,
    survivors: Vec<String>,
}

fn test(tree: &Path, names: &[String], tests: &Tests) -> Result<Ended> {
    // cargo-mutants looks at the clean tree with the tests of the changed package alone.
    let mut clean = Command::new("cargo");
    clean.args(["test", "--quiet", "--locked"]);
    clean.args(
        tests
            .packages
            .iter()
            .flat_map(|package| ["--package", package]),
    );
    clean.args(tests.targets);
    let mut clean = limited(&clean);
    clean.current_dir(tree).stdout(Stdio::null());
    command::run(&mut clean).context("on the clean tree")?;

    let output = paths::target().join("mutants");
    let mut mutants = cargo_mutants(tree);
    mutants.arg("--in-place").arg("--output").arg(&output);
    mutants.args(["--baseline", "skip", "--timeout", TIMEOUT_SECONDS]);
    mutants.args(
        tests
            .packages
            .iter()
            .flat_map(|package| ["--test-package", package]),
    );
    let targets = tests.targets.iter();
    mutants.args(targets.map(|target| format!("--cargo-arg={target}")));
    let escaped: Vec<String> = names.iter().map(|name| escape(name)).collect();
    mutants.args(["--re", &format!("^({})$", escaped.join("|"))]);
    let mut limited = limited(&mutants);
    limited.current_dir(paths::root());
    let status = limited.status().context("cannot start cargo mutants")?;
    // 2: some survived; 3: some hung.
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        bail!("cargo mutants failed: {status}");
    }
    let outcomes = output.join("mutants.out/outcomes.json");
    let text = fs::read(&outcomes).with_context(|| format!("no {}", outcomes.display()))?;
    Ok(count(&serde_json::from_slice(&text)?))
}

/// The command with little memory and short files, and as tests are built here.
fn limited(command: &Command) -> Command {
    let mut limited = Command::new("sh");
    let limits =
        format!("ulimit -v {ADDRESS_SPACE_KIB} && ulimit -f {FILE_SECTORS} && exec \"$0\" \"$@\"");
    limited.args(["-c", &limits]);
    limited.arg(command.get_program()).args(command.get_args());
    limited.env_remove("CARGO_TARGET_DIR").env(SEEDS.0, SEEDS.1);
    // Nobody looks at a backtrace here.
    limited.env("CARGO_PROFILE_DEV_DEBUG", "none");
    // As tests are built anyway; otherwise cargo builds the engine a second time, for the binary beside the suites.
    limited.env("CARGO_PROFILE_DEV_PANIC", "unwind");
    limited
}

fn count(outcomes: &Value) -> Ended {
    let mut ended = Ended {
        caught: 0,
        survivors: Vec::new(),
    };
    for outcome in outcomes["outcomes"].as_array().into_iter().flatten() {
        match outcome["summary"].as_str() {
            // A test that hangs is one that notices.
            Some("CaughtMutant" | "Timeout") => ended.caught += 1,
            Some("MissedMutant") => {
                let name = outcome.pointer("/scenario/Mutant/name");
                let name = name
                    .and_then(Value::as_str)
                    .unwrap_or("a mutant without a name");
                ended.survivors.push(name.to_owned());
            }
            _ => {}
        }
    }
    ended
}

/// The text as a regular expression that matches it alone.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        if r"\.+*?()|[]{}^$".contains(letter) {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_its_order_and_another_seed_another() {
        let order = |seed| {
            let mut names: Vec<String> = (0..50).map(|number| format!("a:{number}:1")).collect();
            names.sort_by_key(|name| draw(seed, name));
            names
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn a_hanging_test_notices_and_a_mutant_that_does_not_build_counts_for_nothing() {
        let outcomes = serde_json::json!({ "outcomes": [
            { "summary": "Success", "scenario": "Baseline" },
            { "summary": "CaughtMutant", "scenario": { "Mutant": { "name": "a" } } },
            { "summary": "Timeout", "scenario": { "Mutant": { "name": "b" } } },
            { "summary": "Unviable", "scenario": { "Mutant": { "name": "c" } } },
            { "summary": "MissedMutant", "scenario": { "Mutant": { "name": "d" } } },
        ]});
        let ended = count(&outcomes);
        assert_eq!((ended.caught, ended.survivors), (2, vec!["d".to_owned()]));
    }
}
