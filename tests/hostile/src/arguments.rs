//! Command lines: every subcommand with odd values in each place, flags twice, and words that are no command at all.

use super::Case;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Subcommands with right words; what is in capitals is replaced. Those that serve are not here but for odd names, and
/// those that would wait for seconds neither.
const COMMANDS: &[&str] = &[
    "pool create NAME FILE --size SIZE",
    "pool create NAME FILE --size SIZE --force",
    "pool import FILE",
    "pool export POOL",
    "pool export POOL --force",
    "pool list",
    "pool status POOL",
    "pool grow POOL SIZE",
    "pool check POOL",
    "pool check FILE",
    "pool destroy POOL --force",
    "pool destroy POOL --dry-run",
    "create VOLUME --size SIZE",
    "create VOLUME --size SIZE --sector-size NUMBER --redirect WORD",
    "resize VOLUME SIZE",
    "resize VOLUME SIZE --allow-shrink",
    "rename VOLUME VOLUME",
    "rename SNAPSHOT SNAPSHOT",
    "rm VOLUME SNAPSHOT",
    "rm --recursive VOLUME",
    "rm --dry-run VOLUME",
    "rm --wait SNAPSHOT",
    "snapshot SNAPSHOT SNAPSHOT",
    "clone SNAPSHOT VOLUME",
    "rollback SNAPSHOT",
    "hold WORD SNAPSHOT SNAPSHOT",
    "release WORD SNAPSHOT",
    "prune VOLUME --keep-last NUMBER",
    "prune VOLUME --keep-daily NUMBER --keep-weekly NUMBER -n",
    "tree POOL",
    "tree VOLUME",
    "attach ODD --queues NUMBER --depth NUMBER",
    "detach VOLUME",
    "detach --all POOL",
    "detach DEVICE --force",
    "list POOL VOLUME",
    "list -o WORD",
    "diff SNAPSHOT VOLUME",
    "stats POOL",
    "stats --interval ODD",
    "serve ODD",
    "recover ODD",
    "doctor",
    "completions WORD",
];

const FLAGS: &[&str] = &[
    "--json",
    "-H",
    "-p",
    "--force",
    "-f",
    "--help",
    "--version",
    "-h",
    "-V",
    "--",
    "-",
    "---",
    "--no-such",
    "-\u{e9}",
    "--size",
    "--size=",
    "-s",
    "-n",
    "-r",
    "--json=1",
    "--all",
    "--columns=",
    "--dry-run",
];

/// What no place of a command takes, and some that a few do.
const ODD: &[&str] = &[
    "",
    " ",
    "-",
    "..",
    ".",
    "/",
    "//",
    "@",
    "p0/",
    "/v",
    "p0/v@",
    "p0//v",
    "p0/@s",
    "p0/v@s@t",
    "p0/../v",
    "p0/v/w",
    "a..b",
    ".a",
    "-a",
    "a b",
    "a\nb",
    "a\tb",
    "\u{1b}[2J",
    "\u{7f}",
    "\r",
    "%s%n",
    "$(id)",
    "`id`",
    ";id",
    "*",
    "~",
    "\u{202e}gnp",
    "\u{1f4a3}",
    "\u{0301}",
    "p0\u{200b}",
    "P0",
    "p\u{3bf}",
    "null",
    "true",
    "{}",
    "p0.json",
    "/dev/ublkb",
    "/dev/ublkb-1",
    "/dev/ublkb4242",
    "/dev/ublkb99999999999",
    "/dev/ublkc0",
    "/dev/null",
    "NaN",
    "inf",
];

const SIZES: &[&str] = &[
    "0",
    "-1",
    "-0",
    "+1",
    "1",
    "511",
    "512",
    "4095",
    "4097",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e30K",
    "1e309",
    "0x10",
    "1K",
    "1.5K",
    "0.0000000001P",
    "1.",
    ".5G",
    "16E",
    "15.99E",
    "1P",
    "8P",
    "9P",
    "1024P",
    "1,5G",
    "1 G",
    " 1G",
    "1G ",
    "1GB",
    "1gib",
    "1Q",
    "\u{663}G",
    "\u{ff11}\u{ff16}M",
    "K",
    "4M",
    "32M",
    "17M",
    "99999999999999999999999999999999999999999G",
];

const FILES: &[&str] = &[
    "new.pool",
    "../p0.pool",
    "link",
    "loop",
    "dangling",
    "pipe",
    "folder",
    "text",
    "empty",
    "socket",
    "no/such",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/proc/self/maps",
    "../state",
    "./-f",
    "text/",
];

pub(crate) fn run(case: Case<'_>) -> Result<(), String> {
    let Case {
        machine, mut rng, ..
    } = case;
    machine.restore();
    furnish(machine);
    let words = words(&mut rng);
    let before = machine.sight();
    let said = machine.run(&words);
    let shown = || format!("{:.400}", format!("{words:?}"));
    said.is_documented(codes(&words))
        .map_err(|fact| format!("{}: {fact}", shown()))?;
    let is_same = machine.sight() == before;
    if !is_same {
        machine.spoil();
    }
    // What the machine refuses, it refuses when it is asked: the pool is open for writing by then.
    let is_machine = said.code == Some(3) && words.iter().any(|word| word == "grow");
    if said.code != Some(0) && !is_same && !is_machine {
        return Err(format!(
            "{}: refused, and something changed: {said:?}",
            shown()
        ));
    }
    Ok(())
}

/// What the command may end with.
pub(crate) fn codes(words: &[OsString]) -> &'static [i32] {
    if words.iter().any(|word| word == "check") {
        &[0, 1, 2, 3, 4, 5]
    } else {
        &[0, 1, 2, 3, 4]
    }
}

/// What hostile paths lead to.
pub(crate) fn furnish(machine: &super::Machine) {
    let at = |name: &str| machine.path("work").join(name);
    if at("text").exists() {
        return;
    }
    std::os::unix::fs::symlink("../p0.pool", at("link")).unwrap();
    std::os::unix::fs::symlink("loop", at("loop")).unwrap();
    std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(at("pipe"))
        .status();
    assert!(made.unwrap().success());
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("text"), "not a pool\n").unwrap();
    fs::write(at("empty"), "").unwrap();
    drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
}

pub(crate) fn words(rng: &mut fastrand::Rng) -> Vec<OsString> {
    let template = rng.choice(COMMANDS).copied().unwrap();
    let mut words: Vec<OsString> = Vec::new();
    // How many places are odd: one in three commands is right but for its flags.
    let oddness = rng.u8(0..3);
    let serves = template.contains("ODD");
    for word in template.split(' ') {
        words.push(match word {
            "ODD" => only_odd(rng),
            _ if !word.starts_with(|c: char| c.is_ascii_uppercase()) => word.into(),
            _ if oddness == 1 && rng.bool() || oddness == 2 => odd(rng),
            _ => right(word, rng),
        });
    }
    if serves {
        return words;
    }
    match rng.u8(0..10) {
        0 => words.insert(
            rng.usize(0..=words.len()),
            rng.choice(FLAGS).unwrap().into(),
        ),
        1 => words.push(rng.choice(FLAGS).unwrap().into()),
        2 => words.extend(words.clone().into_iter().skip(1)),
        3 => words.push(odd(rng)),
        4 => {
            words.remove(rng.usize(0..words.len()));
        }
        5 => {
            let place = rng.usize(0..words.len());
            words[place] = mangled(&words[place], rng);
        }
        6 if rng.u8(0..8) == 0 => {
            let last = words.last().cloned().unwrap_or_default();
            let count = if last.len() > 500 { 10 } else { 2000 };
            words.extend(std::iter::repeat_n(last, count));
        }
        _ => {}
    }
    // A word may have become one that serves, or that writes where it is told.
    let never = ["serve", "recover", "attach", "man", "-i", "--interval"];
    if words
        .iter()
        .any(|word| never.iter().any(|never| word == never))
    {
        return vec!["frobnicate".into()];
    }
    words
}

fn right(what: &str, rng: &mut fastrand::Rng) -> OsString {
    let pick = |rng: &mut fastrand::Rng, list: &[&str]| OsString::from(rng.choice(list).unwrap());
    match what {
        "NAME" => pick(rng, &["p1", "p0"]),
        "POOL" => pick(rng, &["p0", "p9"]),
        "VOLUME" => pick(rng, &["p0/v", "p0/w", "p0/x", "p1/v"]),
        "SNAPSHOT" => pick(rng, &["p0/v@s", "p0/v@t", "p0/w@s", "p0/v@u"]),
        "SIZE" => pick(rng, SIZES),
        "NUMBER" => pick(rng, &["512", "4096", "0", "65536", "-1", "1"]),
        "WORD" => pick(
            rng,
            &["shared", "always", "name", "bash", "name,name", ",", "zsh"],
        ),
        "DEVICE" => pick(rng, &["/dev/ublkb4242", "/dev/ublkb0"]),
        _ => pick(rng, FILES),
    }
}

fn odd(rng: &mut fastrand::Rng) -> OsString {
    match rng.u8(0..8) {
        0 => right("SIZE", rng),
        1 => right("VOLUME", rng),
        2 => right("FILE", rng),
        _ => only_odd(rng),
    }
}

/// What no command takes for a name or a number.
fn only_odd(rng: &mut fastrand::Rng) -> OsString {
    match rng.u8(0..8) {
        0 => OsString::from("x".repeat([128, 255, 256, 4096, 100_000][rng.usize(0..5)])),
        1 => {
            let length = rng.usize(1..40);
            let bytes = std::iter::repeat_with(|| rng.u8(1..=255)).take(length);
            // Not UTF-8, whatever came.
            OsString::from_vec([0xff].into_iter().chain(bytes).collect())
        }
        2 => OsString::from_vec(b"p0/v\xff".to_vec()),
        3 => OsString::from(format!("p0/{}", "a/".repeat(rng.usize(1..1000)))),
        _ => rng.choice(ODD).unwrap().into(),
    }
}

/// The word with a byte changed, added or left out.
fn mangled(word: &OsStr, rng: &mut fastrand::Rng) -> OsString {
    let mut bytes = word.as_bytes().to_vec();
    let place = rng.usize(0..=bytes.len());
    match rng.u8(0..3) {
        0 if place < bytes.len() => bytes[place] = rng.u8(1..=255),
        1 if place < bytes.len() => drop(bytes.remove(place)),
        _ => bytes.insert(place, rng.u8(1..=255)),
    }
    OsString::from_vec(bytes)
}
