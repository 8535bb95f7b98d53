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

use crate::scorecard::{Run, commit, today};
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

const PAGE: &str = "docs/scaling.md";
const PLOTS: &str = "docs/scaling";
const BEGIN: &str = "<!-- cargo x scale: begin -->\n";
const END: &str = "<!-- cargo x scale: end -->\n";

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
        build()?;
        for scene in &scenes {
            if !measure(scene, options)? {
                failed.push(*scene);
            }
        }
    }
    let mut figures = Vec::new();
    for scene in &scenes {
        figures.extend(score::read_json(&file_of(scene, "json")).unwrap_or_default());
    }
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
        write_page(&scenes, &figures)?;
    }
    if failed.is_empty() && score::all_pass(&figures) {
        return Ok(ExitCode::SUCCESS);
    }
    if !failed.is_empty() {
        println!("x: short of their targets: {}", failed.join(", "));
    }
    Ok(ExitCode::FAILURE)
}

fn build() -> Result<()> {
    let mut build = command::cargo();
    build.args(["build", "--locked", "--profile", "prove"]);
    build.args(["--package", "blockfork-tests", "--bin", "prove"]);
    command::run_shown(&mut build)
}

/// Runs a scene; whether it reaches its targets.
#[expect(clippy::disallowed_methods, reason = "shown to a person")]
fn measure(scene: &str, options: &Options) -> Result<bool> {
    let began = Instant::now();
    let results = folder();
    fs::create_dir_all(&results).with_context(|| format!("cannot make {}", results.display()))?;
    let (json, curve) = (file_of(scene, "json"), curve_file());
    let mut of_before = vec![&json];
    if scene == "snapshots" {
        of_before.push(&curve);
    }
    for old in of_before {
        if old.exists() {
            fs::remove_file(old)?;
        }
    }
    let mut prove = Command::new(paths::target().join("prove/prove"));
    prove.args(["scale", "--only", scene, "--seed"]);
    prove.arg(options.seed.to_string());
    if options.quick {
        prove.arg("--quick");
    }
    prove.arg("--json").arg(&json);
    prove
        .arg("--folder")
        .arg(options.folder.as_ref().unwrap_or(&results));
    if scene == "snapshots" {
        prove.arg("--curve").arg(&curve);
    }
    eprintln!("+ {}", command::shown(&prove));
    let status = prove.stdin(Stdio::null()).status();
    let passed = status.context("cannot start prove")?.success();
    if !json.exists() {
        bail!("the scene {scene} ended without figures");
    }
    let quick = if options.quick { " --quick" } else { "" };
    let run = Run {
        command: format!("cargo x scale{quick} --only {scene}"),
        commit: commit()?,
        date: today()?,
        seconds: began.elapsed().as_secs(),
    };
    fs::write(file_of(scene, "run.json"), serde_json::to_vec_pretty(&run)?)?;
    eprintln!("x: {}: {} s", run.command, run.seconds);
    Ok(passed)
}

fn folder() -> PathBuf {
    paths::target().join("scale")
}

fn file_of(scene: &str, kind: &str) -> PathBuf {
    folder().join(format!("{scene}.{kind}"))
}

fn curve_file() -> PathBuf {
    folder().join("curve.txt")
}

/// Replaces the table in the page, and draws the plots beside it.
fn write_page(scenes: &[&str], figures: &[Figure]) -> Result<()> {
    let page = paths::root().join(PAGE);
    let text = fs::read_to_string(&page).with_context(|| format!("cannot read {PAGE}"))?;
    let mut between = table(scenes, figures)?;
    if scenes.contains(&"snapshots") {
        let curve = fs::read_to_string(curve_file()).context("the scene snapshots has not run")?;
        let points = plot::read(&curve)?;
        for (name, title) in plot::write(&points, &paths::root().join(PLOTS))? {
            write!(between, "\n![{title}](scaling/{name}.svg)\n")?;
        }
    }
    let text = replaced(&text, &between)?;
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))
}

/// The page with something else between its markers.
fn replaced(text: &str, between: &str) -> Result<String> {
    let parts = text.split_once(BEGIN);
    let parts = parts.and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.with_context(|| format!("{PAGE}: lacks its markers"))?;
    Ok(format!("{before}{BEGIN}{between}{END}{after}"))
}

fn table(scenes: &[&str], figures: &[Figure]) -> Result<String> {
    let mut text = String::from("| command | day | commit | minutes |\n|---|---|---|---:|\n");
    for run in scenes
        .iter()
        .filter_map(|scene| read_run(&file_of(scene, "run.json")))
    {
        // Rounded up: nothing takes no time.
        let minutes = run.seconds.div_ceil(60);
        writeln!(
            text,
            "| `{}` | {} | {} | {minutes} |",
            run.command, run.date, run.commit
        )?;
    }
    text.push_str("\n| row | figure | value | target | reached |\n|---|---|---:|---:|---|\n");
    for figure in figures {
        let reached = match (figure.pass, figure.sampled) {
            (true, false) => "yes",
            (true, true) => "yes (sampled)",
            (false, false) => "**no**",
            (false, true) => "**no** (sampled)",
        };
        writeln!(
            text,
            "| {} | {} | {} | {} | {reached} |",
            figure.row,
            figure.metric,
            score::number(figure.value),
            figure.target
        )?;
    }
    Ok(text)
}

fn read_run(path: &Path) -> Option<Run> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use score::{Card, Target};

    #[test]
    fn the_table_says_what_falls_short() {
        let mut card = Card::new("S1", true, Some(0));
        card.add("slower", 1.75, Target::AtMost(1.5));
        card.at_least("snapshots", 10_000, 10_000);
        let text = table(&[], &card.into_figures()).unwrap();
        assert!(
            text.contains("| S1 | slower | 1.75 | <= 1.50 | **no** (sampled) |"),
            "{text}"
        );
        assert!(
            text.contains("| S1 | snapshots | 10,000 | >= 10,000 | yes (sampled) |"),
            "{text}"
        );
    }

    #[test]
    fn only_what_stands_between_the_markers_is_replaced() {
        let page = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replaced(&page, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}new\n{END}after\n"));
        assert!(replaced("no markers", "new\n").is_err());
    }
}
