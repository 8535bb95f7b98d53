//! `x scorecard`: every row of the scorecard by its own command, gathered in one table and one JSON file.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use score::Figure;

use crate::figures::{self, Shelf};
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

impl Row {
    /// Whether its figures, or some of them, come from `prove`.
    fn needs_prove(&self) -> bool {
        self.program == Program::Prove || self.name == "sched"
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

const SHELF: Shelf = Shelf("scorecard");

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
    let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
    let figures: Vec<Figure> = names.iter().flat_map(|name| SHELF.figures(name)).collect();
    println!();
    score::print(&figures, &mut std::io::stdout())?;
    if let Some(json) = &options.json {
        score::write_json(&figures, json)
            .with_context(|| format!("cannot write {}", json.display()))?;
    }
    if options.write {
        let page = paths::root().join("docs/crash-safety.md");
        figures::put(&page, "scorecard", &SHELF.table(&names)?)?;
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
    if rows.iter().any(|row| row.needs_prove()) {
        command::build_prove()?;
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
    SHELF.clear(row.name)?;
    let prove = paths::target().join("prove/prove");
    let mut program = match row.program {
        Program::Prove => Command::new(&prove),
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
    program.args(&words[1..]);
    program.arg("--json").arg(SHELF.json(row.name));
    if row.needs_prove() && row.program == Program::Verb {
        // It is there. Asked once more, after the seeded bugs, cargo was seen to build it again, for a minute.
        program.arg("--prove").arg(&prove);
    }
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
    SHELF.keep(row.name, format!("{door} {}", words.join(" ")), began)?;
    Ok(passed)
}
