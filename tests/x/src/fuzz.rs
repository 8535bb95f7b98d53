//! `x fuzz`: every fuzz target under libFuzzer and the address sanitizer, for so long, with the figures of row R5.
//!
//! The targets are functions of tests/src/fuzz; a target is known by its folder of tests/corpus. One program has all.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use score::Card;

use crate::{command, paths};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// What the whole row asks for, and a sample of it.
const EXECUTIONS: u64 = 20_000_000;
const EXECUTIONS_SAMPLED: u64 = 200_000;
/// What no target may fall short of, so that the fast ones do not make up for it.
const EXECUTIONS_EACH: u64 = 5000;
const EXECUTIONS_EACH_SAMPLED: u64 = 100;
/// Targets of which an execution is a whole life of a pool: they get most of the time.
const SLOW: [&str; 2] = ["operations", "pool"];
const SLOW_SHARE: u64 = 4;
/// Targets that run tens of thousands of times a second: what they get twice makes most of the executions.
const FAST: [&str; 9] = [
    "message",
    "nbd-handshake",
    "nbd-request",
    "page-header",
    "record",
    "ring",
    "state-file",
    "superblock",
    "word",
];
const FAST_SHARE: u64 = 2;
/// An input may take this long, in seconds, with the sanitizer and on a busy machine.
const TIMEOUT: u32 = 20;
const MEMORY_MB: u32 = 512;
const INPUT_BYTES_MAX: u32 = 4097;
/// Inputs of a target that are kept in the repository: what reaches every edge is far fewer.
const KEPT_MAX: usize = 60;

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample: a few seconds for each target
    #[arg(long)]
    quick: bool,
    /// Seconds for all targets together, on all processors; 900 by default
    #[arg(long, conflicts_with = "quick")]
    secs: Option<u64>,
    /// Only this target
    #[arg(long)]
    target: Option<String>,
    /// The fuzzer's seed
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Put what was found worth keeping into tests/corpus
    #[arg(long)]
    keep: bool,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run one target on this input, and nothing else
    #[arg(long, value_name = "FILE", requires = "target")]
    replay: Option<PathBuf>,
}

/// How a target's run ended.
#[derive(Debug, Default)]
struct Outcome {
    executions: u64,
    crashes: u64,
    hangs: u64,
    out_of_memory: u64,
}

/// Builds and runs the targets.
pub fn run(options: &Options) -> Result<ExitCode> {
    let targets = chosen(options.target.as_deref())?;
    let program = build()?;
    if let (Some(input), Some(target)) = (&options.replay, targets.first()) {
        let input = input.canonicalize().context("no such input")?;
        let status = fuzzer(&program, target).arg(input).status()?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let processors = thread::available_parallelism().map_or(1, usize::from) as u64;
    let seconds = options.secs.unwrap_or(if options.quick { 60 } else { 900 });
    let shares = targets.iter().map(|target| share(target)).sum::<u64>();
    let queue = Mutex::new(VecDeque::from(targets.clone()));
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                loop {
                    let Some(target) = queue.lock().ok().and_then(|mut all| all.pop_front()) else {
                        return;
                    };
                    let seconds = (seconds * processors * share(&target) / shares).max(2);
                    let ended = fuzz(&program, &target, seconds, options.seed);
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push(ended);
                    }
                }
            });
        }
    });
    let mut sum = Outcome::default();
    let mut least = u64::MAX;
    for outcome in outcomes.into_inner().unwrap_or_default() {
        let outcome = outcome?;
        least = least.min(outcome.executions);
        sum.executions += outcome.executions;
        sum.crashes += outcome.crashes;
        sum.hangs += outcome.hangs;
        sum.out_of_memory += outcome.out_of_memory;
    }
    if options.keep {
        for target in &targets {
            keep(&program, target)?;
        }
    }
    eprintln!(
        "all: {} executions, {} a second",
        sum.executions,
        sum.executions / seconds.max(1)
    );
    report(options, &targets, &sum, least)
}

fn report(options: &Options, targets: &[String], sum: &Outcome, least: u64) -> Result<ExitCode> {
    let is_sample = options.quick || options.secs.is_some() || options.target.is_some();
    let (wanted, wanted_of_each) = if is_sample {
        (EXECUTIONS_SAMPLED, EXECUTIONS_EACH_SAMPLED)
    } else {
        (EXECUTIONS, EXECUTIONS_EACH)
    };
    let mut card = Card::new("R5", is_sample, Some(u64::from(options.seed)));
    card.at_least("fuzz targets", targets.len() as u64, 1);
    card.at_least("fuzz executions", sum.executions, wanted);
    card.at_least(
        "fuzz executions of the target with the fewest",
        least,
        wanted_of_each,
    );
    card.none("fuzz crashes", sum.crashes);
    card.none("fuzz hangs", sum.hangs);
    card.none("fuzz inputs beyond the memory limit", sum.out_of_memory);
    crate::row::report(&card.into_figures(), options.json.as_deref())
}

fn share(target: &str) -> u64 {
    if SLOW.contains(&target) {
        SLOW_SHARE
    } else if FAST.contains(&target) {
        FAST_SHARE
    } else {
        1
    }
}

fn corpus() -> PathBuf {
    paths::root().join("tests/corpus")
}

/// What runs of the fuzzer leave behind; may be deleted at any time.
fn scratch(target: &str) -> PathBuf {
    paths::target().join("fuzz/found").join(target)
}

/// The targets by name, the slow ones first.
fn chosen(only: Option<&str>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(corpus()).context("tests/corpus cannot be read")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_by_key(|name| (!SLOW.contains(&name.as_str()), name.clone()));
    if let Some(only) = only {
        ensure!(
            names.iter().any(|name| name == only),
            "there is no fuzz target {only:?}; there are: {}",
            names.join(", ")
        );
        names.retain(|name| name == only);
    }
    Ok(names)
}

/// The program with all targets, instrumented.
fn build() -> Result<PathBuf> {
    let nightly = Command::new("cargo")
        .args(["+nightly", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !nightly.is_ok_and(|status| status.success()) {
        bail!(
            "fuzzing needs a nightly compiler; install it with: rustup toolchain install nightly"
        );
    }
    // What cargo-fuzz passes: counters at every edge, comparisons traced, and the address sanitizer.
    let flags = [
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
        "-Zsanitizer=address",
        "--cfg fuzzing",
    ];
    let folder = paths::target().join("fuzz");
    let mut cargo = Command::new("cargo");
    cargo
        .args([
            "+nightly",
            "build",
            "--locked",
            "--release",
            "--target",
            TRIPLE,
        ])
        .arg("--target-dir")
        .arg(&folder)
        .current_dir(paths::root().join("tests/fuzz"))
        .env_remove("RUSTUP_TOOLCHAIN")
        .env("RUSTFLAGS", flags.join(" "));
    command::run_shown(&mut cargo)?;
    Ok(folder.join(TRIPLE).join("release/fuzz"))
}

fn fuzzer(program: &Path, target: &str) -> Command {
    let mut fuzzer = Command::new(program);
    fuzzer
        .env("FUZZ_TARGET", target)
        .env(
            "ASAN_OPTIONS",
            "detect_odr_violation=0:quarantine_size_mb=16",
        )
        .arg(format!("-rss_limit_mb={MEMORY_MB}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .stdin(Stdio::null());
    fuzzer
}

/// Runs a target for so many seconds, or until it fails.
fn fuzz(program: &Path, target: &str, seconds: u64, seed: u32) -> Result<Outcome> {
    let found = scratch(target);
    fs::create_dir_all(&found)?;
    let failures = paths::target().join("fuzz/failures");
    fs::create_dir_all(&failures)?;
    let mut fuzzer = fuzzer(program, target);
    fuzzer
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-seed={seed}"))
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/{target}-", failures.display()))
        .arg(&found)
        .arg(corpus().join(target));
    let output = fuzzer.output().context("the fuzzer cannot be started")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let executions = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .and_then(|count| count.trim().parse().ok());
    let mut outcome = Outcome {
        executions: executions.unwrap_or(0),
        ..Outcome::default()
    };
    eprintln!(
        "{target}: {} executions in {seconds} s, {} a second",
        outcome.executions,
        outcome.executions / seconds
    );
    if output.status.success() {
        return Ok(outcome);
    }
    match output.status.code() {
        Some(70) => outcome.hangs += 1,
        Some(71) => outcome.out_of_memory += 1,
        _ => outcome.crashes += 1,
    }
    let shown = said
        .lines()
        .skip_while(|line| !line.contains("panicked at") && !line.contains("ERROR:"));
    for line in shown.take(6) {
        eprintln!("{target}: {line}");
    }
    if let Some(input) = (said.lines()).find_map(|line| line.split("Test unit written to ").nth(1))
    {
        eprintln!("replay: cargo x fuzz --target {target} --replay {input}");
    }
    Ok(outcome)
}

/// Replaces a target's corpus by the smallest inputs that reach all that it and the last runs reached.
fn keep(program: &Path, target: &str) -> Result<()> {
    let merged = paths::target().join("fuzz/merged").join(target);
    if merged.exists() {
        fs::remove_dir_all(&merged)?;
    }
    fs::create_dir_all(&merged)?;
    let kept = corpus().join(target);
    let output = fuzzer(program, target)
        // By edges alone, not by how often each is taken: the fuzzer finds the counts again in seconds.
        .args(["-set_cover_merge=1", "-use_counters=0"])
        .args([&merged, &kept, &scratch(target)])
        .output()?;
    ensure!(
        output.status.success(),
        "{target}: its corpus cannot be merged"
    );
    let mut inputs = files(&merged)?;
    inputs.sort();
    inputs.truncate(KEPT_MAX);
    for (_, old) in files(&kept)? {
        fs::remove_file(old)?;
    }
    for (_, input) in &inputs {
        let name = input.file_name().unwrap_or(OsStr::new("input"));
        fs::copy(input, kept.join(name))?;
    }
    eprintln!("{target}: {} inputs kept", inputs.len());
    Ok(())
}

/// The files of a folder with their sizes.
fn files(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        files.push((entry.metadata()?.len(), entry.path()));
    }
    Ok(files)
}
