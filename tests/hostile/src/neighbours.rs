//! A pool that somebody else has open, by whatever name, and users whom it does not concern.

use super::guarded;
use super::machine::{Machine, POOL_BYTES};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

const AS_NOBODY: [&[&str]; 9] = [
    &["pool", "status", "p0"],
    &["pool", "check", "p0"],
    &["pool", "export", "p0"],
    &["pool", "destroy", "p0", "--force"],
    &["list", "p0"],
    &["create", "p0/x", "--size", "1M"],
    &["rm", "-r", "p0/v"],
    &["rollback", "p0/v@s"],
    &["pool", "list"],
];

/// What could not be run here; how many cases ran, and which failed.
pub(crate) fn run(program: &Path, quick: bool) -> (Vec<String>, (u64, Vec<String>)) {
    let (mut skipped, mut failures, mut count) = (Vec::new(), Vec::new(), 0);
    let mut note = |name: String, ended: Result<(), String>| {
        count += 1;
        if let Err(fact) = ended {
            failures.push(format!("neighbours: {name}: {fact}"));
        }
    };
    let machine = Machine::new(program);
    {
        let daemon = machine.serve();
        let mut names = names_of(&machine, &mut skipped);
        if quick {
            // The last one is the loop device, where there is one.
            names.drain(..names.len() - 1);
        }
        // At once, as each waits some seconds for the lock.
        thread::scope(|scope| {
            let mut tries = Vec::new();
            for (name, path, _loop) in &names {
                for words in [
                    vec!["pool", "import", path],
                    vec!["pool", "check", path],
                    vec!["pool", "create", "p1", path],
                    vec!["pool", "create", "p1", path, "--force"],
                ] {
                    let what = format!("open twice by {name}: {}", words.join(" "));
                    let (machine, own) = (&machine, format!("work/{}", tries.len()));
                    let ended = scope.spawn(move || guarded(|| elsewhere(machine, &own, &words)));
                    tries.push((what, ended));
                }
            }
            for (what, ended) in tries {
                note(what, ended.join().unwrap());
            }
        });
        note(
            "the pool is served all the while".into(),
            guarded(|| served(&machine)),
        );
        drop(daemon);
    }
    if is_root() {
        for is_served in [false, true] {
            let daemon = is_served.then(|| machine.serve());
            comes_to_rest(&machine);
            for words in AS_NOBODY {
                let ended = guarded(|| refused_to_nobody(&machine, words));
                note(
                    format!("as nobody, served {is_served}: {}", words.join(" ")),
                    ended,
                );
            }
            if is_served {
                note("modes".into(), guarded(|| modes(&machine)));
                note("an open socket".into(), guarded(|| open_socket(&machine)));
            }
            drop(daemon);
        }
    } else {
        skipped.push("other users: needs root".into());
    }
    note("nothing stays".into(), machine.nothing_left_behind());
    (skipped, (count, failures))
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// A loop device that goes with its value.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("-d").arg(&self.0).status().ok();
    }
}

/// Other names of the pool's file.
fn names_of(
    machine: &Machine,
    skipped: &mut Vec<String>,
) -> Vec<(&'static str, String, Option<Loop>)> {
    let pool = machine.pool_path();
    symlink(&pool, machine.path("work/symbolic")).unwrap();
    fs::hard_link(&pool, machine.path("work/hard")).unwrap();
    let shown = |name: &str| machine.path(name).display().to_string();
    let mut names = vec![
        ("its path", shown("p0.pool"), None),
        ("a path with dots", shown("work/../p0.pool"), None),
        ("a symbolic link", shown("work/symbolic"), None),
        ("a hard link", shown("work/hard"), None),
    ];
    let device = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&pool)
        .output();
    match device {
        Ok(said) if said.status.success() => {
            let path = String::from_utf8_lossy(&said.stdout).trim().to_owned();
            names.push(("a loop device", path.clone(), Some(Loop(path.into()))));
        }
        _ => skipped.push("a pool opened twice by loop device: no loop devices here".into()),
    }
    names
}

/// A second machine, as it were: it knows nothing of the pool, and must find out all the same.
fn elsewhere(machine: &Machine, own: &str, words: &[&str]) -> Result<(), String> {
    let own = machine.path(own);
    fs::create_dir(&own).unwrap();
    let mut command = machine.command(words);
    command.env("UBLKCTL_STATE_DIR", own.join("state"));
    command.env("UBLKCTL_RUNTIME_DIR", own.join("run"));
    let said = super::machine::run(&mut command);
    said.is_documented(&[1])?;
    // Its name is still free: whoever was refused leaves no entry.
    let entered = |name: &str| own.join("state/pools").join(name).exists();
    if entered("p0.json") || entered("p1.json") {
        return Err(format!("refused, and entered all the same: {said:?}"));
    }
    Ok(())
}

fn served(machine: &Machine) -> Result<(), String> {
    for words in [
        &["create", "p0/y", "--size", "1M"][..],
        &["rm", "p0/y"],
        &["pool", "check", "p0"],
    ] {
        let said = machine.run(words);
        if said.code != Some(0) {
            return Err(format!("{words:?}: {said:?}"));
        }
    }
    Ok(())
}

/// Waits until a daemon has given back what the one before it left, so that what changes from here on has another reason.
fn comes_to_rest(machine: &Machine) {
    for _ in 0..60 {
        let before = machine.files();
        thread::sleep(Duration::from_millis(500));
        if machine.files() == before {
            return;
        }
    }
}

fn refused_to_nobody(machine: &Machine, words: &[&str]) -> Result<(), String> {
    let before = machine.files();
    let said = machine.run_as_nobody(words);
    said.is_documented(&[1])?;
    if !said.stderr.contains("ermission denied") {
        return Err(format!("not told why: {said:?}"));
    }
    if machine.files() != before {
        return Err("refused, and something changed".into());
    }
    Ok(())
}

/// Nothing of a pool is for others.
fn modes(machine: &Machine) -> Result<(), String> {
    for (name, wanted) in [
        ("p0.pool", 0o600),
        ("state/pools", 0o700),
        ("run", 0o700),
        ("run/p0.sock", 0o600),
    ] {
        let mode = fs::metadata(machine.path(name)).unwrap().mode() & 0o777;
        if mode != wanted {
            return Err(format!("{name} has mode {mode:o}, not {wanted:o}"));
        }
    }
    let bytes = fs::metadata(machine.pool_path()).unwrap().len();
    (bytes == POOL_BYTES)
        .then_some(())
        .ok_or_else(|| "the pool has another size".into())
}

/// A daemon asks the kernel who calls, even if somebody opened the way to its socket.
fn open_socket(machine: &Machine) -> Result<(), String> {
    let open = |name: &str, mode| {
        fs::set_permissions(machine.path(name), Permissions::from_mode(mode)).unwrap()
    };
    for (name, mode) in [
        ("state", 0o755),
        ("state/pools", 0o755),
        ("run", 0o755),
        ("run/p0.sock", 0o666),
    ] {
        open(name, mode);
    }
    for entry in fs::read_dir(machine.path("state/pools")).unwrap() {
        fs::set_permissions(entry.unwrap().path(), Permissions::from_mode(0o644)).unwrap();
    }
    let said = machine.run_as_nobody(&["list", "p0"]);
    for (name, mode) in [
        ("run/p0.sock", 0o600),
        ("run", 0o700),
        ("state/pools", 0o700),
        ("state", 0o700),
    ] {
        open(name, mode);
    }
    said.is_documented(&[1])?;
    if !said.stderr.contains("may not control") {
        return Err(format!("not told why: {said:?}"));
    }
    Ok(())
}
