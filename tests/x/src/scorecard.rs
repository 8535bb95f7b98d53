//! `x scorecard`: every row of the scorecard by its own command, gathered in one table and one JSON file.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use score::Figure;
use serde::{Deserialize, Serialize};

use crate::{command, paths, setup};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Samples, held against a sample's targets, and no coverage; says so in each line
    #[arg(long)]
    quick: bool,
    /// Where a row takes a sample of its own accord, all: every mutant, which takes hours
    #[arg(long, conflicts_with = "quick")]
    all: bool,
    /// Only these commands, by their names; all of them by default
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Do not run anything: show the figures of earlier runs
    #[arg(long)]
    show: bool,
    /// Put the table into docs/crash-safety.md
    #[arg(long)]
    write: bool,
    /// Write all figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Who measures a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    /// `prove NAME`
    Prove,
    /// `cargo x NAME`
    Verb,
    /// `cargo x NAME`, which spends its time in a guest
    Guest,
}

/// How figures were measured; beside them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What a user types.
    pub command: String,
    /// The commit; with a `+` where the tree held something else too.
    pub commit: String,
    /// The day, UTC.
    pub date: String,
    /// How long it took, builds included.
    pub seconds: u64,
}

/// One command that gives figures.
struct Row {
    name: &'static str,
    program: Program,
    /// Whether `cargo x test` runs its sample too.
    is_gate: bool,
}

const fn row(name: &'static str, program: Program, is_gate: bool) -> Row {
    Row {
        name,
        program,
        is_gate,
    }
}

/// In the order of the table.
const ROWS: [Row; 17] = [
    row("crash", Program::Prove, true),
    row("nested", Program::Prove, true),
    row("seeded-bugs", Program::Verb, true),
    row("mutants", Program::Verb, false),
    row("coverage", Program::Verb, false),
    row("miri", Program::Verb, false),
    row("damage", Program::Prove, true),
    row("kill", Program::Guest, false),
    row("kill-nbd", Program::Verb, false),
    row("power-cut", Program::Guest, false),
    row("faults", Program::Prove, true),
    row("fuzz", Program::Verb, false),
    row("model", Program::Prove, true),
    row("open", Program::Prove, false),
    row("churn", Program::Guest, false),
    row("sched", Program::Verb, true),
    row("hostile", Program::Verb, true),
];

const BEGIN: &str = "<!-- scorecard: begin -->\n";
const END: &str = "<!-- scorecard: end -->\n";

/// Runs the rows and prints their figures.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::install_missing()?;
    let known = |name: &String| ROWS.iter().any(|row| row.name == name);
    if let Some(name) = options.only.iter().find(|name| !known(name)) {
        let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("{name}: no such row; there are {}", names.join(", "));
    }
    let is_wanted =
        |row: &&Row| options.only.is_empty() || options.only.iter().any(|name| name == row.name);
    // A sample of the lines that tests reach says nothing.
    let has_sample = |row: &&Row| !options.quick || row.name != "coverage";
    let rows: Vec<&Row> = ROWS.iter().filter(is_wanted).filter(has_sample).collect();
    let failed = if options.show {
        Vec::new()
    } else {
        measure(&rows, options.quick, options.all)?
    };
    let mut figures = Vec::new();
    for row in &rows {
        figures.extend(read(row).unwrap_or_default());
    }
    println!();
    score::print(&figures, &mut std::io::stdout())?;
    if let Some(json) = &options.json {
        score::write_json(&figures, json)
            .with_context(|| format!("cannot write {}", json.display()))?;
    }
    if options.write {
        write_page(&rows, &figures)?;
    }
    if failed.is_empty() && score::all_pass(&figures) {
        return Ok(ExitCode::SUCCESS);
    }
    if !failed.is_empty() {
        println!("x: no full marks from: {}", failed.join(", "));
    }
    Ok(ExitCode::FAILURE)
}

/// All rows, at full size and beyond.
pub fn full() -> Result<ExitCode> {
    run(&Options {
        quick: false,
        all: true,
        only: Vec::new(),
        show: false,
        write: false,
        json: None,
    })
}

/// The samples that every change must pass; the names of the rows that fell short.
pub fn gate() -> Result<Vec<&'static str>> {
    let rows: Vec<&Row> = ROWS.iter().filter(|row| row.is_gate).collect();
    measure(&rows, true, false)
}

/// Measures one row after the other; samples, whose speed is no figure, two at a time.
fn measure(rows: &[&Row], quick: bool, all: bool) -> Result<Vec<&'static str>> {
    if rows.iter().any(|row| row.program == Program::Prove) {
        let mut build = command::cargo();
        build.args(["build", "--locked", "--profile", "prove"]);
        build.args(["--package", "blockfork-tests", "--bin", "prove"]);
        command::run_shown(&mut build)?;
    }
    let (left, failed) = (Mutex::new(rows.to_vec()), Mutex::new(Vec::new()));
    let work = |silent| -> Result<()> {
        while let Some(row) = take(&left, silent) {
            if !measure_one(row, quick, all, silent)? {
                failed.lock().map(|mut failed| failed.push(row.name)).ok();
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let beside = quick.then(|| scope.spawn(|| work(true)));
        work(false)?;
        beside.map_or(Ok(()), |beside| {
            beside
                .join()
                .unwrap_or_else(|_| bail!("the rows beside the others panicked"))
        })
    })?;
    Ok(failed.into_inner().unwrap_or_default())
}

/// The next row to be measured: for who works beside the others one in a guest if there is any, and the last one
/// otherwise.
fn take<'a>(left: &Mutex<Vec<&'a Row>>, beside: bool) -> Option<&'a Row> {
    let mut left = left.lock().ok()?;
    let in_guest = left.iter().position(|row| row.program == Program::Guest);
    let at = match (beside, in_guest) {
        (false, _) => 0,
        (true, Some(at)) => at,
        (true, None) => left.len().checked_sub(1)?,
    };
    (at < left.len()).then(|| left.remove(at))
}

/// Runs a row's command; whether it reached its targets. Two at once write in turns if one of them is silent until it
/// ends.
#[expect(clippy::disallowed_methods, reason = "shown to a person")]
fn measure_one(row: &Row, quick: bool, all: bool, silent: bool) -> Result<bool> {
    let began = Instant::now();
    let json = json_of(row);
    if let Some(folder) = json.parent() {
        fs::create_dir_all(folder)?;
    }
    for old in [&json, &run_of(row)] {
        if old.exists() {
            fs::remove_file(old)?;
        }
    }
    let mut program = match row.program {
        Program::Prove => Command::new(paths::target().join("prove/prove")),
        Program::Verb | Program::Guest => Command::new(std::env::current_exe()?),
    };
    program.arg(row.name).stdin(Stdio::null());
    let mut words = vec![row.name];
    if quick {
        words.push("--quick");
    }
    if all && row.name == "mutants" {
        words.push("--all");
    }
    program.args(&words[1..]).arg("--json").arg(&json);
    let shown = command::shown(&program);
    eprintln!("+ {shown}");
    let cannot_start = || format!("cannot start {shown}");
    let passed = if silent {
        let output = program.output().with_context(cannot_start)?;
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        print!("{}", String::from_utf8_lossy(&output.stdout));
        output.status.success()
    } else {
        program.status().with_context(cannot_start)?.success()
    };
    let door = match row.program {
        Program::Prove => "prove",
        Program::Verb | Program::Guest => "cargo x",
    };
    let run = Run {
        command: format!("{door} {}", words.join(" ")),
        commit: commit()?,
        date: today()?,
        seconds: began.elapsed().as_secs(),
    };
    fs::write(run_of(row), serde_json::to_vec_pretty(&run)?)?;
    eprintln!("x: {}: {} s", run.command, run.seconds);
    Ok(passed)
}

fn git(arguments: &[&str]) -> Result<String> {
    command::output(
        Command::new("git")
            .args(arguments)
            .current_dir(paths::root()),
    )
}

/// The commit that is measured; with a `+` where the tree holds something else too.
pub fn commit() -> Result<String> {
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain"])?.is_empty();
    let mark = if is_clean { "" } else { "+" };
    Ok(format!("{}{mark}", commit.trim()))
}

/// The day, UTC.
pub fn today() -> Result<String> {
    let date = command::output(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?;
    Ok(date.trim().to_owned())
}

fn json_of(row: &Row) -> PathBuf {
    paths::target().join(format!("scorecard/{}.json", row.name))
}

fn run_of(row: &Row) -> PathBuf {
    paths::target().join(format!("scorecard/{}.run.json", row.name))
}

fn read_run(row: &Row) -> Option<Run> {
    serde_json::from_slice(&fs::read(run_of(row)).ok()?).ok()
}

fn read(row: &Row) -> Option<Vec<Figure>> {
    score::read_json(&json_of(row)).ok()
}

/// Replaces the table in docs/crash-safety.md.
fn write_page(rows: &[&Row], figures: &[Figure]) -> Result<()> {
    let page = paths::root().join("docs/crash-safety.md");
    let text = fs::read_to_string(&page)?;
    let (before, rest) = text
        .split_once(BEGIN)
        .with_context(|| format!("{}: has no scorecard", page.display()))?;
    let (_, after) = rest
        .split_once(END)
        .with_context(|| format!("{}: its scorecard has no end", page.display()))?;
    let table = table(rows, figures)?;
    fs::write(&page, format!("{before}{BEGIN}{table}{END}{after}"))
        .with_context(|| format!("cannot write {}", page.display()))
}

fn table(rows: &[&Row], figures: &[Figure]) -> Result<String> {
    let mut text = String::from("| command | day | commit | minutes |\n|---|---|---|---:|\n");
    for run in rows.iter().copied().filter_map(read_run) {
        // Rounded up: nothing takes no time.
        let minutes = run.seconds.div_ceil(60);
        writeln!(
            text,
            "| `{}` | {} | {} | {minutes} |",
            run.command, run.date, run.commit
        )?;
    }
    text.push_str(
        "\n| row | figure | value | target | reached | seed |\n|---|---|---:|---:|---|---|\n",
    );
    for figure in figures {
        let seed = figure
            .seed
            .map_or_else(String::new, |seed| seed.to_string());
        let reached = match (figure.pass, figure.sampled) {
            (true, false) => "yes",
            (true, true) => "yes (sampled)",
            (false, _) => "**no**",
        };
        writeln!(
            text,
            "| {} | {} | {} | {} | {reached} | {seed} |",
            figure.row,
            figure.metric,
            score::number(figure.value),
            figure.target
        )?;
    }
    Ok(text)
}
