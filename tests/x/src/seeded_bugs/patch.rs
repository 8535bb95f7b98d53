//! One seeded bug: a patch with a header that says what it is and which command must find it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// How many historical bugs there are; number 0 is the negative control.
pub const BUGS: u32 = 24;

/// A bug that can be put back.
#[derive(Clone, Debug)]
pub struct Bug {
    pub number: u32,
    /// The file's name without number and ending.
    pub name: String,
    /// Where the bug was seen before.
    pub source: String,
    /// The promise that it breaks.
    pub breaks: String,
    pub finder: Finder,
    pub patch: PathBuf,
}

/// What must find a bug.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finder {
    /// `prove` with these arguments.
    Prove(Vec<String>),
    /// A suite, or its tests whose name contains the second word.
    Suite(String, Option<String>),
    /// The engine's unit tests whose name contains this.
    Engine(String),
    /// `cargo x` with these arguments.
    Verb(Vec<String>),
}

impl Finder {
    /// Reads a finder as the header of a patch names it.
    pub fn parse(text: &str) -> Result<Self> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        match words.as_slice() {
            [kind, arguments @ ..] if kind == "prove" && !arguments.is_empty() => {
                Ok(Self::Prove(arguments.to_vec()))
            }
            [kind, suite] if kind == "suite" => Ok(Self::Suite(suite.clone(), None)),
            [kind, suite, filter] if kind == "suite" => {
                Ok(Self::Suite(suite.clone(), Some(filter.clone())))
            }
            [kind, filter] if kind == "engine" => Ok(Self::Engine(filter.clone())),
            [kind, arguments @ ..] if kind == "x" && !arguments.is_empty() => {
                Ok(Self::Verb(arguments.to_vec()))
            }
            _ => bail!("\"{text}\" is no finder"),
        }
    }
}

impl std::fmt::Display for Finder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prove(arguments) => write!(f, "prove {}", arguments.join(" ")),
            Self::Suite(suite, None) => write!(f, "suite {suite}"),
            Self::Suite(suite, Some(filter)) => write!(f, "suite {suite} {filter}"),
            Self::Engine(filter) => write!(f, "engine {filter}"),
            Self::Verb(arguments) => write!(f, "x {}", arguments.join(" ")),
        }
    }
}

/// All of them, by number: the control first, and each number once.
pub fn read_all(folder: &Path) -> Result<Vec<Bug>> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut bugs = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot list {}", folder.display()))?
            .path();
        if path.extension().is_some_and(|ending| ending == "patch") {
            bugs.push(read(&path).with_context(|| path.display().to_string())?);
        }
    }
    bugs.sort_by_key(|bug| bug.number);
    let numbers: Vec<u32> = bugs.iter().map(|bug| bug.number).collect();
    if numbers != (0..=BUGS).collect::<Vec<_>>() {
        bail!("the numbers are {numbers:?}, not 0 to {BUGS}");
    }
    Ok(bugs)
}

fn read(path: &Path) -> Result<Bug> {
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .context("a name that is no text")?;
    let (number, name) = stem
        .split_once('-')
        .context("its name is not NN-short-name")?;
    let text = std::fs::read_to_string(path).context("cannot be read")?;
    let field = |name: &str| {
        let line = text
            .lines()
            .take_while(|line| !line.is_empty())
            .find_map(|line| line.strip_prefix(name));
        let value = line.map(|value| value.trim_start_matches(':').trim());
        value
            .filter(|value| !value.is_empty())
            .with_context(|| format!("its header has no line \"{name}: \""))
    };
    field("Here")?;
    Ok(Bug {
        number: number.parse().context("its name begins with no number")?,
        name: name.to_owned(),
        source: field("Bug")?.to_owned(),
        breaks: field("Breaks")?.to_owned(),
        finder: Finder::parse(field("Find")?)?,
        patch: path.to_owned(),
    })
}
