//! `x tidy`: the rules of this repository that no compiler knows. Also a test of this package.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::paths;

/// The engine's rooms, the lowest first: a room imports itself and what stands before it.
const ROOMS: [&str; 18] = [
    "units",
    "limits",
    "error",
    "name",
    "clock",
    "sync",
    "format",
    "device",
    "space",
    "map",
    "metadata",
    "journal",
    "checkpoint",
    "datapath",
    "pool",
    "nbd",
    "ublk",
    "fuzz",
];

const FORMAT_PAGE: &str = "docs/format.md";
const FORMAT_FILES: &str = "engine/src/format";
const FORMAT_MARK: &str = "<!-- engine/src/format: ";

/// Words that mark unfinished work. Put together here, so that this file may name them.
const UNFINISHED: [&str; 2] = [concat!("FIX", "ME"), concat!("XX", "X")];

/// Prints every fault; with `bless`, first notes in docs/format.md that it describes today's format.
pub fn run(bless: bool) -> Result<()> {
    let root = paths::root();
    if bless {
        self::bless(&root)?;
    }
    let faults = faults(&root)?;
    for fault in &faults {
        eprintln!("tidy: {fault}");
    }
    if !faults.is_empty() {
        bail!("{} faults", faults.len());
    }
    Ok(())
}

fn faults(root: &Path) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for top in ["engine", "ctl", "tests"] {
        for path in files_below(&root.join(top), "rs")? {
            let text =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let shown = path
                .strip_prefix(root)
                .unwrap_or(&path)
                .display()
                .to_string();
            source(&shown, &text, &mut faults);
        }
    }
    imports(&root.join("engine/src"), &mut faults)?;
    format_page(root, &mut faults)?;
    every_file_is_named(root, "fio-jobs", "fio", "fio-jobs/README.md", &mut faults)?;
    every_file_is_named(
        root,
        "docs/decisions",
        "md",
        "docs/decisions/README.md",
        &mut faults,
    )?;
    Ok(faults)
}

/// What holds for every source file.
fn source(shown: &str, bytes: &[u8], faults: &mut Vec<String>) {
    let text = String::from_utf8_lossy(bytes);
    if !text.starts_with("//!") {
        faults.push(format!(
            "{shown}:1: does not begin with //! and the file's job"
        ));
    }
    for (line, number) in text.lines().zip(1..) {
        if let Some(other) = line.chars().find(|character| !character.is_ascii()) {
            faults.push(format!("{shown}:{number}: {other:?} is not ASCII"));
        }
        let mut words = line.split(|character: char| !character.is_ascii_alphanumeric());
        if let Some(word) = words.find(|word| UNFINISHED.contains(word)) {
            faults.push(format!(
                "{shown}:{number}: {word}: finish it, or open an issue and say why it can wait"
            ));
        }
    }
}

/// Imports point down the list of rooms.
fn imports(engine: &Path, faults: &mut Vec<String>) -> Result<()> {
    for path in files_below(engine, "rs")? {
        let below = path.strip_prefix(engine).unwrap_or(&path);
        let room = below
            .components()
            .next()
            .map(|part| part.as_os_str().to_string_lossy().into_owned());
        let room = room.unwrap_or_default().trim_end_matches(".rs").to_owned();
        if room == "lib" {
            continue;
        }
        let shown = Path::new("engine/src").join(below).display().to_string();
        let Some(height) = ROOMS.iter().position(|known| *known == room) else {
            faults.push(format!("{shown}: the room {room} is not in tidy's list"));
            continue;
        };
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for used in rooms_used(&text) {
            if ROOMS
                .iter()
                .position(|known| *known == used)
                .is_some_and(|other| other > height)
            {
                faults.push(format!(
                    "{shown}: {room} imports {used}, which stands above it"
                ));
            }
        }
    }
    Ok(())
}

/// The first names after `crate::`, also those in braces; comments don't count.
fn rooms_used(text: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut used = Vec::new();
    for rest in code.split("crate::").skip(1) {
        if !rest.starts_with('{') {
            used.push(leading_name(rest));
            continue;
        }
        let mut depth = 0;
        let mut at_name = false;
        for (index, character) in rest.char_indices() {
            match character {
                '{' => {
                    depth += 1;
                    at_name = depth == 1;
                }
                '}' if depth == 1 => break,
                '}' => depth -= 1,
                ',' => at_name = depth == 1,
                character if at_name && !character.is_whitespace() => {
                    used.push(leading_name(&rest[index..]));
                    at_name = false;
                }
                _ => {}
            }
        }
    }
    used.sort();
    used.dedup();
    used
}

fn leading_name(text: &str) -> String {
    text.chars()
        .take_while(|character| character.is_ascii_alphanumeric() || *character == '_')
        .collect()
}

/// The page about the format carries a hash of the code, so that neither changes alone.
fn format_page(root: &Path, faults: &mut Vec<String>) -> Result<()> {
    let Ok(page) = fs::read_to_string(root.join(FORMAT_PAGE)) else {
        faults.push(format!("{FORMAT_PAGE} is missing"));
        return Ok(());
    };
    if !page.contains(&mark(root)?) {
        faults.push(format!(
            "{FORMAT_PAGE}: {FORMAT_FILES} has changed; make the page say what it says now, then run cargo x tidy --bless"
        ));
    }
    Ok(())
}

fn bless(root: &Path) -> Result<()> {
    let path = root.join(FORMAT_PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {FORMAT_PAGE}"))?;
    let mut lines: Vec<_> = page
        .lines()
        .filter(|line| !line.starts_with(FORMAT_MARK))
        .collect();
    let mark = mark(root)?;
    lines.push(&mark);
    fs::write(&path, lines.join("\n") + "\n").with_context(|| format!("cannot write {FORMAT_PAGE}"))
}

/// FNV-1a over names and contents: it need not resist anybody, only notice a change.
fn mark(root: &Path) -> Result<String> {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for path in files_below(&root.join(FORMAT_FILES), "rs")? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for byte in name.bytes().chain([0]).chain(content) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("{FORMAT_MARK}{hash:016x} -->"))
}

/// A folder's files are all mentioned on one page.
fn every_file_is_named(
    root: &Path,
    folder: &str,
    extension: &str,
    page: &str,
    faults: &mut Vec<String>,
) -> Result<()> {
    let Ok(text) = fs::read_to_string(root.join(page)) else {
        faults.push(format!("{page} is missing"));
        return Ok(());
    };
    for path in files_below(&root.join(folder), extension)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name != "README.md" && !text.contains(&name) {
            faults.push(format!("{page}: {folder}/{name} is not mentioned"));
        }
    }
    Ok(())
}

/// All files with this extension below a folder, in the order of their names.
fn files_below(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry
                .with_context(|| format!("cannot list {}", folder.display()))?
                .path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{faults, rooms_used, source};
    use crate::paths;

    #[test]
    fn the_repository_is_tidy() {
        let faults = faults(&paths::root()).unwrap();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }

    #[test]
    fn imports_are_found_in_every_form() {
        let text = "use crate::map::Map;\nuse crate::{\n  error::{Error, Result},\n  pool,\n};\n// crate::ublk\nlet x = crate::units::A;";
        assert_eq!(rooms_used(text), ["error", "map", "pool", "units"]);
    }

    #[test]
    fn a_bad_file_is_named_with_its_line() {
        let mut faults = Vec::new();
        let text = format!(
            "fn a() {{}}\n// {}: later\n// \u{e9}\n",
            super::UNFINISHED[0]
        );
        source("a.rs", text.as_bytes(), &mut faults);
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[1].starts_with("a.rs:2:") && faults[2].starts_with("a.rs:3:"));
    }
}
