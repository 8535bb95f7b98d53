//! `x coverage`: which lines of the rooms the tests reach.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use score::{Card, Target};

use super::{PACKAGES, ROOMS, SEEDS, TARGETS, require};
use crate::{command, paths};

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// List the lines that no test reaches
    #[arg(long)]
    lines: bool,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A file's lines that a test can reach, with how often one did.
struct Covered {
    file: String,
    lines: Vec<(usize, u64)>,
}

impl Covered {
    fn reached(&self) -> usize {
        self.lines.iter().filter(|(_, count)| *count > 0).count()
    }
}

/// Runs it; the exit status is that of the figures.
pub fn run(options: &Options) -> Result<ExitCode> {
    require("llvm-cov")?;
    let (profdata, cov) = llvm_tools()?;
    let report = paths::target().join("coverage.lcov");
    let mut tests = command::cargo();
    tests.args(["llvm-cov", "test", "--locked", "--lcov", "--output-path"]);
    tests.arg(&report);
    tests.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    tests.args(TARGETS);
    tests.env("LLVM_PROFDATA", profdata).env("LLVM_COV", cov);
    tests.env(SEEDS.0, SEEDS.1);
    command::run_shown(&mut tests)?;
    let text =
        fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
    let mut files = parse(&text);
    let root = paths::root();
    files.retain_mut(|covered| of_the_rooms(&root, covered));
    for covered in &files {
        let (all, reached) = (covered.lines.len(), covered.reached());
        println!(
            "{:6.2} %  {reached:4} of {all:4}  {}",
            percent(reached, all),
            covered.file
        );
        if options.lines {
            for (line, _) in covered.lines.iter().filter(|(_, count)| *count == 0) {
                println!("    {}:{line}", covered.file);
            }
        }
    }
    let all: usize = files.iter().map(|covered| covered.lines.len()).sum();
    let reached: usize = files.iter().map(Covered::reached).sum();
    let mut card = Card::new("R4", false, None);
    card.add(
        "% of lines reached",
        percent(reached, all),
        Target::AtLeast(95.0),
    );
    crate::row::report(&card.into_figures(), options.json.as_deref())
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn percent(part: usize, all: usize) -> f64 {
    100.0 * part as f64 / all.max(1) as f64
}

/// llvm-profdata and llvm-cov of rustc's own LLVM: those that the environment names, or a toolchain's component.
fn llvm_tools() -> Result<(PathBuf, PathBuf)> {
    if let (Some(profdata), Some(cov)) = (
        std::env::var_os("LLVM_PROFDATA"),
        std::env::var_os("LLVM_COV"),
    ) {
        return Ok((profdata.into(), cov.into()));
    }
    // A nightly has the same LLVM or a little newer one, which reads what the older one wrote.
    for toolchain in [&[][..], &["run", "nightly", "rustc"]] {
        let mut rustc = match toolchain {
            [] => Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())),
            words => {
                let mut rustup = Command::new("rustup");
                rustup.args(words);
                rustup
            }
        };
        rustc.args(["--print", "target-libdir"]);
        rustc.stderr(std::process::Stdio::null());
        let Ok(output) = rustc.output() else { continue };
        let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()).join("../bin");
        let tools = (folder.join("llvm-profdata"), folder.join("llvm-cov"));
        if tools.0.is_file() && tools.1.is_file() {
            return Ok(tools);
        }
    }
    bail!("llvm-profdata and llvm-cov are missing: rustup component add llvm-tools");
}

/// The lines of a report in LCOV's format.
fn parse(report: &str) -> Vec<Covered> {
    let mut files: Vec<Covered> = Vec::new();
    for line in report.lines() {
        if let Some(file) = line.strip_prefix("SF:") {
            files.push(Covered {
                file: file.to_owned(),
                lines: Vec::new(),
            });
        } else if let (Some(data), Some(covered)) = (line.strip_prefix("DA:"), files.last_mut()) {
            let mut numbers = data.split(',').map_while(|number| number.parse().ok());
            if let (Some(line), Some(count)) = (numbers.next(), numbers.next()) {
                let line = usize::try_from(line).unwrap_or(usize::MAX);
                covered.lines.push((line, count));
            }
        }
    }
    files
}

/// Whether a file belongs to the rooms. Its unit tests, at its end, do not count.
fn of_the_rooms(root: &Path, covered: &mut Covered) -> bool {
    let path = PathBuf::from(&covered.file);
    let Ok(within) = path.strip_prefix(root) else {
        return false;
    };
    let is_room = ROOMS.iter().any(|room| match room.strip_suffix("*.rs") {
        Some(folder) => within.parent() == Some(Path::new(folder.trim_end_matches('/'))),
        None => within == Path::new(room),
    });
    if !is_room || within.ends_with("tests.rs") {
        return false;
    }
    let text = fs::read_to_string(&path).unwrap_or_default();
    let tests = text.lines().position(|line| line == "mod tests {");
    covered
        .lines
        .retain(|(line, _)| tests.is_none_or(|tests| *line <= tests));
    covered.file = within.display().to_string();
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lcov_report_gives_each_files_lines() {
        let files =
            parse("SF:/a.rs\nDA:1,0\nDA:2,7\nLF:2\nend_of_record\nSF:/b.rs\nend_of_record\n");
        assert_eq!(files.len(), 2);
        assert_eq!(files[0].lines, [(1, 0), (2, 7)]);
        assert_eq!(files[0].reached(), 1);
    }
}
