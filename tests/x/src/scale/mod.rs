//! `x scale`: what must not notice how much there is of it, scene by scene, each in a process of its own (`prove scale`).
//! Prints every row with its target, and writes docs/scaling.md.

mod plot;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use score::Figure;

use crate::figures::{self, Shelf};
use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Smaller sizes, in less than five minutes; says so in each line
    #[arg(long)]
    quick: bool,
    /// Only these scenes; all of them by default
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Do not run anything: show the figures of earlier runs
    #[arg(long)]
    show: bool,
    /// Put the table and the plots into docs/scaling.md
    #[arg(long)]
    write: bool,
    /// Where pool files are made, at full size up to 10 GiB; in the build folder by default
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Draws what is written where
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write all figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The scenes of `prove scale`, in the order of the table.
const SCENES: [&str; 8] = [
    "snapshots",
    "volumes",
    "depth",
    "huge",
    "metadata",
    "journal",
    "day",
    "deleting",
];

const PLOTS: &str = "docs/scaling";
const SHELF: Shelf = Shelf("scale");

/// Runs the scenes and prints their figures; whether all reach their targets is the exit code.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(name) = options
        .only
        .iter()
        .find(|name| !SCENES.contains(&name.as_str()))
    {
        bail!("{name}: no such scene; there are {}", SCENES.join(", "));
    }
    let is_wanted =
        |scene: &&str| options.only.is_empty() || options.only.iter().any(|name| name == scene);
    let scenes: Vec<&str> = SCENES
        .iter()
        .copied()
        .filter(|scene| is_wanted(scene))
        .collect();
    let mut failed = Vec::new();
    if !options.show {
        let prove = command::build_prove()?;
        for scene in &scenes {
            if !measure(&prove, scene, options)? {
                failed.push(*scene);
            }
        }
    }
    let figures: Vec<Figure> = scenes
        .iter()
        .flat_map(|scene| SHELF.figures(scene))
        .collect();
    println!();
    score::print(&figures, &mut std::io::stdout())?;
    if figures.iter().any(|figure| figure.sampled) {
        println!("x: sampled: smaller sizes, held against the same targets");
    }
    if let Some(json) = &options.json {
        score::write_json(&figures, json)
            .with_context(|| format!("cannot write {}", json.display()))?;
    }
    if options.write {
        write_page(&scenes)?;
    }
    if failed.is_empty() && score::all_pass(&figures) {
        return Ok(ExitCode::SUCCESS);
    }
    if !failed.is_empty() {
        println!("x: short of their targets: {}", failed.join(", "));
    }
    Ok(ExitCode::FAILURE)
}

/// Runs a scene; whether it reaches its targets.
#[expect(clippy::disallowed_methods, reason = "shown to a person")]
fn measure(prove: &Path, scene: &str, options: &Options) -> Result<bool> {
    let began = Instant::now();
    SHELF.clear(scene)?;
    let json = SHELF.json(scene);
    let mut prove = Command::new(prove);
    prove.args(["scale", "--only", scene, "--seed"]);
    prove.arg(options.seed.to_string());
    if options.quick {
        prove.arg("--quick");
    }
    prove.arg("--json").arg(&json);
    let folder = options.folder.clone().unwrap_or_else(|| SHELF.folder());
    prove.arg("--folder").arg(folder);
    if scene == "snapshots" {
        let curve = curve_file();
        if curve.exists() {
            fs::remove_file(&curve)?;
        }
        prove.arg("--curve").arg(curve);
    }
    eprintln!("+ {}", command::shown(&prove));
    let status = prove.stdin(Stdio::null()).status();
    let passed = status.context("cannot start prove")?.success();
    if !json.exists() {
        bail!("the scene {scene} ended without figures");
    }
    let quick = if options.quick { " --quick" } else { "" };
    SHELF.keep(scene, format!("cargo x scale{quick} --only {scene}"), began)?;
    Ok(passed)
}

fn curve_file() -> PathBuf {
    SHELF.folder().join("curve.txt")
}

/// Replaces the table in the page, and draws the plots beside it.
fn write_page(scenes: &[&str]) -> Result<()> {
    let mut between = SHELF.table(scenes)?;
    if scenes.contains(&"snapshots") {
        let curve = fs::read_to_string(curve_file()).context("the scene snapshots has not run")?;
        let points = plot::read(&curve)?;
        for (name, title) in plot::write(&points, &paths::root().join(PLOTS))? {
            write!(between, "\n![{title}](scaling/{name}.svg)\n")?;
        }
    }
    let page = paths::root().join("docs/scaling.md");
    figures::put(&page, "cargo x scale", &between)
}
