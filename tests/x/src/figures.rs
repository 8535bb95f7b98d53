//! Figures as they were measured, kept in the build folder beside the command that gave them, and their table in a page.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use score::Figure;
use serde::{Deserialize, Serialize};

use crate::{command, paths};

/// How figures were measured; beside them.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    /// What a user types.
    command: String,
    /// The commit; with a `+` where the tree held something else too.
    commit: String,
    /// The day, UTC.
    date: String,
    /// How long it took, builds included.
    seconds: u64,
}

/// A folder of the build folder, with two files for each name.
#[derive(Clone, Copy, Debug)]
pub struct Shelf(pub &'static str);

impl Shelf {
    /// The folder.
    pub fn folder(self) -> PathBuf {
        paths::target().join(self.0)
    }

    /// Where whoever measures `name` writes its figures.
    pub fn json(self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.json"))
    }

    fn run(self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.run.json"))
    }

    /// Makes room for the figures of `name`: those of before go.
    pub fn clear(self, name: &str) -> Result<()> {
        let folder = self.folder();
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for old in [self.json(name), self.run(name)] {
            if old.exists() {
                fs::remove_file(&old)
                    .with_context(|| format!("cannot remove {}", old.display()))?;
            }
        }
        Ok(())
    }

    /// Keeps what a user types to have the figures of `name`, and how long it took.
    pub fn keep(self, name: &str, command: String, began: Instant) -> Result<()> {
        let run = Run {
            command,
            commit: commit()?,
            date: today()?,
            seconds: began.elapsed().as_secs(),
        };
        fs::write(self.run(name), serde_json::to_vec_pretty(&run)?)?;
        eprintln!("x: {}: {} s", run.command, run.seconds);
        Ok(())
    }

    /// The last figures of `name`; empty if there are none.
    pub fn figures(self, name: &str) -> Vec<Figure> {
        score::read_json(&self.json(name)).unwrap_or_default()
    }

    /// The table of all these: first what was run, then its figures.
    pub fn table(self, names: &[&str]) -> Result<String> {
        let mut text = String::from("| command | day | commit | minutes |\n|---|---|---|---:|\n");
        for name in names {
            let Ok(bytes) = fs::read(self.run(name)) else {
                continue;
            };
            let run: Run = serde_json::from_slice(&bytes)
                .with_context(|| format!("cannot read {}", self.run(name).display()))?;
            // Rounded up: nothing takes no time.
            let minutes = run.seconds.div_ceil(60);
            writeln!(
                text,
                "| `{}` | {} | {} | {minutes} |",
                run.command, run.date, run.commit
            )?;
        }
        let figures: Vec<Figure> = names.iter().flat_map(|name| self.figures(name)).collect();
        text.push('\n');
        text.push_str(&rows(&figures)?);
        Ok(text)
    }
}

fn rows(figures: &[Figure]) -> Result<String> {
    let mut text = String::from(
        "| row | figure | value | target | reached | seed |\n|---|---|---:|---:|---|---|\n",
    );
    for figure in figures {
        let seed = figure
            .seed
            .map_or_else(String::new, |seed| seed.to_string());
        let reached = match (figure.pass, figure.sampled) {
            (true, false) => "yes",
            (true, true) => "yes (sampled)",
            (false, false) => "**no**",
            (false, true) => "**no** (sampled)",
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

/// Puts `between` into a page, in place of what stands between the markers of this name, or behind what there is; the rest
/// of the page is written by people.
pub fn put(page: &Path, marker: &str, between: &str) -> Result<()> {
    let shown = page.display();
    let old = if page.exists() {
        fs::read_to_string(page).with_context(|| format!("cannot read {shown}"))?
    } else {
        String::new()
    };
    let new = replaced(&old, marker, between)
        .with_context(|| format!("{shown}: lacks the end of `{marker}`"))?;
    if let Some(folder) = page.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(page, new).with_context(|| format!("cannot write {shown}"))
}

fn replaced(old: &str, marker: &str, between: &str) -> Option<String> {
    let begin = format!("<!-- {marker}: begin -->\n");
    let end = format!("<!-- {marker}: end -->\n");
    let Some((before, rest)) = old.split_once(&begin) else {
        return Some(format!("{old}\n{begin}{between}{end}"));
    };
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{between}{end}{after}"))
}

fn git(arguments: &[&str]) -> Result<String> {
    command::output(
        Command::new("git")
            .args(arguments)
            .current_dir(paths::root()),
    )
}

/// The commit that is measured; with a `+` where the tree holds something else too.
fn commit() -> Result<String> {
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain"])?.is_empty();
    let mark = if is_clean { "" } else { "+" };
    Ok(format!("{}{mark}", commit.trim()))
}

/// The day, UTC.
fn today() -> Result<String> {
    let date = command::output(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?;
    Ok(date.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use score::{Card, Target};

    #[test]
    fn the_table_says_what_falls_short() {
        let mut card = Card::new("S1", true, Some(7));
        card.add("slower", 1.75, Target::AtMost(1.5));
        card.at_least("snapshots", 10_000, 10_000);
        let text = rows(&card.into_figures()).unwrap();
        assert!(
            text.contains("| S1 | slower | 1.75 | <= 1.50 | **no** (sampled) | 7 |"),
            "{text}"
        );
        assert!(
            text.contains("| S1 | snapshots | 10,000 | >= 10,000 | yes (sampled) | 7 |"),
            "{text}"
        );
    }

    #[test]
    fn only_what_stands_between_the_markers_is_replaced() {
        let page = "before\n<!-- m: begin -->\nold\n<!-- m: end -->\nafter\n";
        let new = replaced(page, "m", "new\n").unwrap();
        assert_eq!(
            new,
            "before\n<!-- m: begin -->\nnew\n<!-- m: end -->\nafter\n"
        );
        assert_eq!(
            replaced("before\n", "m", "new\n").unwrap(),
            "before\n\n<!-- m: begin -->\nnew\n<!-- m: end -->\n"
        );
        assert_eq!(replaced("<!-- m: begin -->\nold\n", "m", "new\n"), None);
    }
}
