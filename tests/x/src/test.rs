//! `x test`: everything, natively and in the guest, on both kernels.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::guest::{Go, Job, Kernel, MEMORY_GIB};
use crate::{command, power_cut, scorecard, setup};

/// Where the suites find udev in the guest.
const UDEV: &str = "/udev";
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// What is tested.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Only what needs no guest
    #[arg(long, conflicts_with = "guest")]
    native: bool,
    /// Only what runs in the guest
    #[arg(long)]
    guest: bool,
    /// Only the guest's suites, but on this machine: as root, with ublk, and a /dev/ram0 that is overwritten
    #[arg(long, conflicts_with_all = ["native", "guest", "kernel"])]
    here: bool,
    /// Only on this kernel: "new" or "6.12"
    #[arg(long)]
    kernel: Option<Kernel>,
    /// Only the tests whose name contains this
    filter: Option<String>,
}

/// Runs the tests; each runner's own count comes last.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::install_missing()?;
    let mut counts = Vec::new();
    let mut failed = Vec::new();
    if options.here {
        note("here", here(options), &mut counts, &mut failed);
    } else if !options.guest {
        note("native", native(options), &mut counts, &mut failed);
        if options.filter.is_none() {
            note("scorecard", samples(), &mut counts, &mut failed);
        }
    }
    if !options.native && !options.here {
        let kernels = options
            .kernel
            .map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel]);
        match programs() {
            Ok((suites, ublkctl)) => {
                for (kernel, ended) in in_guests(&kernels, &suites, &ublkctl, options) {
                    let name = format!("guest, kernel {}", kernel.name());
                    note(&name, ended, &mut counts, &mut failed);
                }
            }
            Err(error) => note("guest", Err(error), &mut counts, &mut failed),
        }
        if options.filter.is_none() && options.kernel.is_none_or(|kernel| kernel == Kernel::New) {
            note("power cuts", power_cut::sample(), &mut counts, &mut failed);
        }
    }
    println!();
    for line in counts {
        println!("{line}");
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("x: failed: {}", failed.join("; "));
    Ok(ExitCode::FAILURE)
}

/// How one runner ended: whether all passed, and the lines in which it counts.
type Ended = (bool, Vec<String>);

fn note(name: &str, ended: Result<Ended>, counts: &mut Vec<String>, failed: &mut Vec<String>) {
    match ended {
        Ok((passed, lines)) => {
            if !passed {
                failed.push(name.to_owned());
            }
            counts.extend(
                lines
                    .into_iter()
                    .map(|line| format!("[{name}] {}", line.trim())),
            );
        }
        Err(error) => failed.push(format!("{name}: {error:#}")),
    }
}

fn native(options: &Options) -> Result<Ended> {
    let mut nextest = command::cargo();
    nextest
        .args(["nextest", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let has_nextest = nextest.status().is_ok_and(|status| status.success());
    let mut runner = command::cargo();
    runner.args(if has_nextest {
        ["nextest", "run"].as_slice()
    } else {
        ["test"].as_slice()
    });
    runner
        .args(["--locked", "--workspace", "--no-fail-fast"])
        .args(&options.filter);
    relay(&mut runner)
}

/// The samples of the scorecard.
fn samples() -> Result<Ended> {
    let short = scorecard::gate()?;
    let count = if short.is_empty() {
        "every sample reaches its targets".to_owned()
    } else {
        format!("short of their targets: {}", short.join(", "))
    };
    Ok((short.is_empty(), vec![count]))
}

/// The suites' own program, and the ublkctl that they drive.
pub fn programs() -> Result<(PathBuf, PathBuf)> {
    let mut build = command::cargo();
    // Of the whole workspace, as the tests before were built: with other features all would be built again.
    build.args(["test", "--locked", "--no-run", "--workspace"]);
    build.args(["--test", "guest"]);
    build.arg("--message-format=json-render-diagnostics");
    let messages = command::output(&mut build)?;
    let suites = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message.pointer("/target/name")? == "guest";
        is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    Ok((
        suites.context("cargo built no guest suites")?,
        command::build_ublkctl()?,
    ))
}

/// The suites on each kernel: beside each other where there is memory for it, since an emulated guest keeps little more
/// than one processor busy. The first one shows what it does, the others when they have ended.
fn in_guests(
    kernels: &[Kernel],
    suites: &Path,
    ublkctl: &Path,
    options: &Options,
) -> Vec<(Kernel, Result<Ended>)> {
    let run = |kernel: Kernel, silent, watch: &mut dyn FnMut(Option<&str>) -> Go| {
        let ended = in_guest(kernel, suites, ublkctl, options, silent, watch);
        (kernel, ended)
    };
    let alone = |kernel: &Kernel| run(*kernel, false, &mut |_| Go::On);
    let (Some((first, others)), true) = (kernels.split_first(), has_memory_for(kernels.len()))
    else {
        return kernels.iter().map(alone).collect();
    };
    let (is_up, up) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let beside = scope.spawn(move || {
            // What a guest is made of is fetched once. Nothing is ever sent: the other end goes.
            up.recv().unwrap_or_default();
            let silently = |kernel: &Kernel| run(*kernel, true, &mut |_| Go::On);
            others.iter().map(silently).collect::<Vec<_>>()
        });
        let mut is_up = Some(is_up);
        // Its end says so too, whether it came up or not.
        let mut watch = |_: Option<&str>| {
            is_up.take();
            Go::On
        };
        let mut ended = vec![run(*first, false, &mut watch)];
        drop(is_up);
        match beside.join() {
            Ok(others) => ended.extend(others),
            Err(_) => ended.extend(others.iter().map(|kernel| {
                let panicked = anyhow!("the thread beside panicked");
                (*kernel, Err(panicked))
            })),
        }
        ended
    })
}

/// Whether so many guests fit into memory, with as much again for everything else.
fn has_memory_for(guests: usize) -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kib.is_some_and(|kib| kib > guests * 2 * (MEMORY_GIB << 20))
}

fn in_guest(
    kernel: Kernel,
    suites: &Path,
    ublkctl: &Path,
    options: &Options,
    silent: bool,
    watch: &mut dyn FnMut(Option<&str>) -> Go,
) -> Result<Ended> {
    let filter = options.filter.as_deref().unwrap_or_default();
    // The tests that repeat a cycle do so at length on one kernel.
    let cycles = match kernel {
        Kernel::New => "",
        Kernel::LongTerm => "BLOCKFORK_CYCLES=5 ",
    };
    let script = format!(
        "{cycles}BLOCKFORK_UDEV={UDEV} /usr/bin/suites --ignored --test-threads=1 {filter}"
    );
    let mut job = Job::new(kernel, &script, LIMIT);
    job.add_program(suites, "suites");
    job.add_program(ublkctl, "ublkctl");
    job.add_udev(UDEV)?;
    job.silent = silent;
    let outcome = job.run_watched(watch)?;
    if silent {
        print!("{}", outcome.output);
    }
    let counts: Vec<_> = outcome
        .output
        .lines()
        .filter(|line| is_count(line))
        .map(str::to_owned)
        .collect();
    if counts.is_empty() {
        bail!(
            "the suites ended without a count, with status {}",
            outcome.status
        );
    }
    Ok((outcome.status == 0, counts))
}

fn here(options: &Options) -> Result<Ended> {
    let (suites, ublkctl) = programs()?;
    let mut runner = Command::new(suites);
    runner
        .args(["--ignored", "--test-threads=1"])
        .args(&options.filter);
    runner.env("PATH", search_path(&ublkctl)?);
    relay(&mut runner)
}

/// Where the suites find this ublkctl first, and mkfs and its kin.
pub fn search_path(ublkctl: &Path) -> Result<OsString> {
    let mut folders = vec![ublkctl.parent().context("ublkctl lies nowhere")?.to_owned()];
    folders.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    Ok(std::env::join_paths(folders)?)
}

fn is_count(line: &str) -> bool {
    line.starts_with("test result:") || line.trim_start().starts_with("Summary [")
}

/// Runs a test runner, relays what it prints, and keeps its counts.
fn relay(runner: &mut Command) -> Result<Ended> {
    eprintln!("+ {}", command::shown(runner));
    runner
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = runner
        .spawn()
        .with_context(|| format!("cannot start {}", command::shown(runner)))?;
    let output = child.stdout.take().context("no stdout")?;
    let errors = child.stderr.take().context("no stderr")?;
    let other = thread::spawn(move || copy(errors, std::io::stderr()));
    let mut counts = copy(output, std::io::stdout());
    counts.extend(other.join().unwrap_or_default());
    let status = child.wait().context("cannot wait for the tests")?;
    Ok((status.success(), counts))
}

fn copy(from: impl Read, mut to: impl Write) -> Vec<String> {
    let mut counts = Vec::new();
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        // A closed terminal must not end the tests.
        drop(writeln!(to, "{line}"));
        if is_count(&line) {
            counts.push(line);
        }
    }
    counts
}
