//! `x scorecard`: every row of the scorecard by its own command, gathered in one table and one JSON file.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use score::Figure;

use crate::{command, paths, setup};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Samples, held against a sample's targets; says so in each line
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
    row("kill", Program::Verb, false),
    row("kill-nbd", Program::Verb, false),
    row("power-cut", Program::Verb, false),
    row("faults", Program::Prove, true),
    row("fuzz", Program::Verb, false),
    row("model", Program::Prove, true),
    row("open", Program::Prove, false),
    row("churn", Program::Verb, false),
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
    let rows: Vec<&Row> = ROWS.iter().filter(is_wanted).collect();
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
        write_page(&figures)?;
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

fn measure(rows: &[&Row], quick: bool, all: bool) -> Result<Vec<&'static str>> {
    if rows.iter().any(|row| row.program == Program::Prove) {
        let mut build = command::cargo();
        build.args(["build", "--locked", "--profile", "prove"]);
        build.args(["--package", "blockfork-tests", "--bin", "prove"]);
        command::run_shown(&mut build)?;
    }
    let mut failed = Vec::new();
    for row in rows {
        let json = json_of(row);
        if let Some(folder) = json.parent() {
            fs::create_dir_all(folder)?;
        }
        if json.exists() {
            fs::remove_file(&json)?;
        }
        let mut program = match row.program {
            Program::Prove => Command::new(paths::target().join("prove/prove")),
            Program::Verb => Command::new(std::env::current_exe()?),
        };
        program.arg(row.name).stdin(Stdio::null());
        program.arg("--json").arg(&json);
        if quick {
            program.arg("--quick");
        }
        if all && row.name == "mutants" {
            program.arg("--all");
        }
        eprintln!("+ {}", command::shown(&program));
        let status = program
            .status()
            .with_context(|| format!("cannot start {}", command::shown(&program)))?;
        if !status.success() {
            failed.push(row.name);
        }
    }
    Ok(failed)
}

fn json_of(row: &Row) -> PathBuf {
    paths::target().join(format!("scorecard/{}.json", row.name))
}

fn read(row: &Row) -> Option<Vec<Figure>> {
    score::read_json(&json_of(row)).ok()
}

/// Replaces the table in docs/crash-safety.md.
fn write_page(figures: &[Figure]) -> Result<()> {
    let page = paths::root().join("docs/crash-safety.md");
    let text = fs::read_to_string(&page)?;
    let (before, rest) = text
        .split_once(BEGIN)
        .with_context(|| format!("{}: has no scorecard", page.display()))?;
    let (_, after) = rest
        .split_once(END)
        .with_context(|| format!("{}: its scorecard has no end", page.display()))?;
    let table = table(figures)?;
    fs::write(&page, format!("{before}{BEGIN}{table}{END}{after}"))
        .with_context(|| format!("cannot write {}", page.display()))
}

fn table(figures: &[Figure]) -> Result<String> {
    let date = command::output(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?;
    let commit = command::output(
        Command::new("git")
            .args(["rev-parse", "--short", "HEAD"])
            .current_dir(paths::root()),
    )?;
    let mut text = format!(
        "Measured on {} at commit {}.\n\n| row | figure | value | target | reached | seed |\n|---|---|---:|---:|---|---|\n",
        date.trim(),
        commit.trim()
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
