//! What this machine knows of its pools: one command at a time changes it, and one that fails takes back what it made.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::{Machine, Said, one_line, said};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// How often a race is run. Each run has one outcome, whoever comes first.
const ROUNDS: usize = 8;

/// Runs commands at the same time; what each said.
fn at_once(commands: impl IntoIterator<Item = Command>) -> Vec<Said> {
    let start = |mut command: Command| {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("ublkctl starts")
    };
    let running: Vec<_> = commands.into_iter().map(start).collect();
    let end = |child: std::process::Child| said(&child.wait_with_output().expect("ublkctl ends"));
    running.into_iter().map(end).collect()
}

/// The one that succeeded; every other failed with exit code 1 and one line.
#[track_caller]
fn one_winner(all: &[Said]) -> usize {
    let winners: Vec<usize> = (0..all.len()).filter(|&at| all[at].code == 0).collect();
    assert_eq!(winners.len(), 1, "{all:?}");
    for loser in all.iter().filter(|said| said.code != 0) {
        one_line(loser, 1, &["at once"]);
    }
    winners[0]
}

/// `p0` lies at this path, whole and as it was made.
#[track_caller]
fn holds_p0(machine: &Machine, path: &Path) {
    let pools = machine.json(&["pool", "list", "--json"]);
    assert_eq!(pools.as_array().map(Vec::len), Some(1), "{pools}");
    assert_eq!(pools[0]["name"], "p0");
    assert_eq!(pools[0]["path"], path.display().to_string());
    assert_eq!(fs::metadata(path).expect("the pool's file").len(), 64 << 20);
    machine.ok(&["pool", "check", "p0"]);
}

/// Files that a test's state directory holds; but for the lock, one for each pool.
fn entries(machine: &Machine) -> Vec<String> {
    let files = fs::read_dir(machine.path("state/pools")).expect("the registry");
    let names = files.map(|file| file.expect("a file").file_name().into_string());
    let mut names: Vec<String> = names.map(|name| name.expect("UTF-8")).collect();
    names.retain(|name| name != ".lock");
    names.sort();
    names
}

#[test]
fn the_same_pool_is_created_once_by_many_at_once() {
    for _ in 0..ROUNDS {
        let machine = Machine::new();
        let path = machine.pool_path();
        let words = ["pool", "create", "p0", &path, "--size", "64M"];
        one_winner(&at_once((0..4).map(|_| machine.command(&words))));
        holds_p0(&machine, Path::new(&path));
        assert_eq!(entries(&machine), ["p0.json"]);
    }
}

#[test]
fn one_name_goes_to_one_file_of_many_at_once() {
    for _ in 0..ROUNDS {
        let machine = Machine::new();
        let paths: Vec<_> = (0..4)
            .map(|at| machine.path(&format!("{at}.pool")))
            .collect();
        let commands = paths.iter().map(|path| {
            let path = path.display().to_string();
            machine.command(&["pool", "create", "p0", &path, "--size", "64M"])
        });
        let winner = one_winner(&at_once(commands));
        holds_p0(&machine, &paths[winner]);
        let left: Vec<bool> = paths.iter().map(|path| path.exists()).collect();
        assert_eq!(left.iter().filter(|left| **left).count(), 1, "{left:?}");
    }
}

#[test]
fn one_file_becomes_one_pool_of_many_at_once() {
    for _ in 0..ROUNDS {
        let machine = Machine::new();
        let path = machine.pool_path();
        let names = ["p0", "p1", "p2", "p3"];
        let commands =
            names.map(|name| machine.command(&["pool", "create", name, &path, "--size", "64M"]));
        let winner = one_winner(&at_once(commands));
        machine.ok(&["pool", "check", names[winner]]);
        assert_eq!(entries(&machine), [format!("{}.json", names[winner])]);
    }
}

#[test]
fn a_loser_with_another_registry_leaves_the_winners_file() {
    for _ in 0..ROUNDS {
        let machine = Machine::new();
        let path = machine.pool_path();
        let sizes = ["64M", "48M", "32M", "16M"];
        let states = [0, 1, 2, 3].map(|at| machine.path(&format!("state{at}")));
        let commands = states.iter().zip(sizes).map(|(state, size)| {
            let mut command = machine.command(&["pool", "create", "p0", &path, "--size", size]);
            command.env("UBLKCTL_STATE_DIR", state);
            command
        });
        let winner = one_winner(&at_once(commands));
        let bytes = [64 << 20, 48 << 20, 32 << 20, 16 << 20][winner];
        assert_eq!(fs::metadata(&path).expect("the pool's file").len(), bytes);
        for (at, state) in states.iter().enumerate() {
            let mut command = machine.command(&["pool", "check", "p0"]);
            command.env("UBLKCTL_STATE_DIR", state);
            let checked = said(&command.output().expect("ublkctl starts"));
            assert_eq!(checked.code, i32::from(at != winner), "{checked:?}");
        }
    }
}

#[test]
fn a_pool_is_imported_once_and_exported_once_by_many_at_once() {
    let machine = Machine::with_pool();
    let path = machine.pool_path();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    for _ in 0..ROUNDS {
        one_winner(&at_once(
            (0..4).map(|_| machine.command(&["pool", "export", "p0"])),
        ));
        assert!(entries(&machine).is_empty());
        let words = ["pool", "import", &path];
        one_winner(&at_once((0..4).map(|_| machine.command(&words))));
        holds_p0(&machine, Path::new(&path));
        assert_eq!(machine.names(), ["p0/v"]);
    }
}

#[test]
fn a_pool_is_destroyed_once_by_many_at_once() {
    for _ in 0..ROUNDS {
        let machine = Machine::with_pool();
        let words = ["pool", "destroy", "p0", "--force"];
        one_winner(&at_once((0..4).map(|_| machine.command(&words))));
        assert!(entries(&machine).is_empty());
        machine.refused(1, &["pool", "import", &machine.pool_path()]);
    }
}

#[test]
fn an_export_beside_daemons_that_start_leaves_a_whole_pool() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    for _ in 0..ROUNDS {
        let export = machine.command(&["pool", "export", "p0"]);
        let mut daemons = Vec::new();
        for _ in 0..2 {
            let mut serve = machine.command(&["serve", "p0"]);
            serve.stderr(Stdio::null()).stdout(Stdio::null());
            daemons.push(serve.spawn().expect("ublkctl starts"));
        }
        let exported = &at_once([export])[0];
        // Either it came first, and no daemon serves a pool that nobody knows; or it ended the one that did.
        if exported.code == 0 {
            assert!(entries(&machine).is_empty());
        }
        for daemon in &mut daemons {
            if exported.code == 0 {
                daemon.wait().expect("the daemon ends");
            } else {
                daemon.kill().expect("the daemon can be killed");
                daemon.wait().expect("the daemon ends");
            }
        }
        if exported.code == 0 {
            machine.ok(&["pool", "import", &machine.pool_path()]);
        }
        assert_eq!(machine.names(), ["p0/v"]);
        machine.ok(&["pool", "check", "p0"]);
    }
}

#[test]
fn a_pool_that_cannot_be_written_leaves_nothing() {
    let machine = Machine::new();
    // Larger than any file may be here, so that making the pool fails after the file is there.
    let path = machine.pool_path();
    let line = format!(
        "ulimit -f 8192 && trap '' XFSZ && exec {} pool create p0 {path} --size 64M",
        env!("CARGO_BIN_EXE_ublkctl")
    );
    let mut command = machine.command(&[]);
    let mut shell = Command::new("/bin/bash");
    shell.args(["-c", &line]).stdin(Stdio::null());
    for (variable, value) in command.get_envs() {
        shell.env(variable, value.expect("a value"));
    }
    command = shell;
    let failed = said(&command.output().expect("bash starts"));
    assert_eq!(failed.code, 1, "{failed:?}");
    assert!(!Path::new(&path).exists(), "{failed:?}");
    assert!(entries(&machine).is_empty(), "{:?}", entries(&machine));
    machine.ok(&["pool", "create", "p0", &path, "--size", "64M"]);
    machine.ok(&["pool", "check", "p0"]);
}

/// A shell line as root of a mount namespace of its own; none where that is not allowed.
fn unshared(machine: &Machine, line: &str) -> Option<Said> {
    let run = |line: &str| {
        let mut command = Command::new("unshare");
        command
            .args(["--map-root-user", "--mount", "/bin/bash", "-ec", line])
            .stdin(Stdio::null());
        command.env("ublkctl", env!("CARGO_BIN_EXE_ublkctl"));
        for (variable, value) in machine.command(&[]).get_envs() {
            command.env(variable, value.expect("a value"));
        }
        said(&command.output().expect("unshare starts"))
    };
    let allowed = run("mount -t tmpfs none /mnt");
    (allowed.code == 0).then(|| run(line))
}

#[test]
fn with_a_full_state_directory_nothing_is_created() {
    let machine = Machine::new();
    let path = machine.pool_path();
    fs::create_dir_all(machine.path("state")).expect("a directory");
    let line = format!(
        "mount -t tmpfs -o size=8k,mode=700 none $UBLKCTL_STATE_DIR
         mkdir -m 700 $UBLKCTL_STATE_DIR/pools
         dd if=/dev/zero of=$UBLKCTL_STATE_DIR/filler bs=4k status=none 2>/dev/null || true
         exit=0; $ublkctl pool create p0 {path} --size 64M || exit=$?
         ls -A $UBLKCTL_STATE_DIR/pools
         rm $UBLKCTL_STATE_DIR/filler
         $ublkctl pool create p0 {path} --size 64M
         $ublkctl pool check p0 >/dev/null
         exit $exit"
    );
    let Some(said) = unshared(&machine, &line) else {
        return;
    };
    assert_eq!(said.code, 3, "{said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    assert_eq!(said.stdout.replace(".lock\n", ""), "", "nothing is left");
}

#[test]
fn with_a_read_only_state_directory_nothing_is_created_and_nothing_is_lost() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let path = machine.path("p1.pool");
    let shown = path.display().to_string();
    let pool = machine.pool_path();
    let line = format!(
        "mount --bind $UBLKCTL_STATE_DIR $UBLKCTL_STATE_DIR
         mount -o remount,bind,ro $UBLKCTL_STATE_DIR
         ! $ublkctl pool create p1 {shown} --size 64M
         ! $ublkctl pool destroy p0 --force
         ! $ublkctl pool export p0
         ! $ublkctl pool import {pool}
         $ublkctl list -H -o name p0
         $ublkctl pool check p0 > /dev/null"
    );
    let Some(said) = unshared(&machine, &line) else {
        return;
    };
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.stderr.lines().count(), 4, "{said:?}");
    assert_eq!(said.stdout, "p0/v\n");
    assert!(!path.exists());
    assert_eq!(machine.names(), ["p0/v"]);
}

#[test]
fn a_path_is_kept_as_it_was_given() {
    let machine = Machine::new();
    fs::create_dir_all(machine.path("by-id")).expect("a directory");
    fs::create_dir_all(machine.path("a/b")).expect("a directory");
    let (by_id, file) = (machine.path("by-id/disk"), machine.path("one.pool"));
    fs::write(&file, "").expect("a file");
    fs::write(machine.path("two.pool"), "").expect("a file");
    symlink(&file, &by_id).expect("a link");
    let shown = by_id.display().to_string();
    machine.ok(&["pool", "create", "p0", &shown, "--size", "64M"]);
    let listed = |machine: &Machine| {
        let text = machine.ok(&["pool", "list", "-H", "-p"]);
        text.trim_end().rsplit('\t').next().map(str::to_owned)
    };
    assert_eq!(listed(&machine).as_deref(), Some(&*shown));
    // By either name it is the same pool.
    for other in [&shown, &file.display().to_string()] {
        let line = machine.refused(1, &["pool", "import", other]);
        assert!(line.contains("known already, as pool p0"), "{line}");
        machine.refused(1, &["pool", "create", "p1", other, "--force"]);
    }
    machine.ok(&["pool", "check", &file.display().to_string()]);

    // After the next boot another disk is there, which is how a path through a link earns its keep.
    fs::rename(&file, machine.path("three.pool")).expect("a rename");
    fs::remove_file(&by_id).expect("the link");
    symlink(machine.path("three.pool"), &by_id).expect("a link");
    machine.ok(&["pool", "check", "p0"]);

    // An import keeps its path too, relative ones as absolute ones, `..` as the machine understands it now.
    machine.ok(&["pool", "export", "p0"]);
    let mut import = machine.command(&["pool", "import", "../../by-id/disk"]);
    import.current_dir(machine.path("a/b"));
    assert_eq!(said(&import.output().expect("ublkctl starts")).code, 0);
    fs::remove_dir_all(machine.path("a")).expect("the directory");
    assert_eq!(listed(&machine).as_deref(), Some(&*shown));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_dot_dot_behind_a_link_leads_where_the_kernel_says() {
    let machine = Machine::new();
    fs::create_dir_all(machine.path("real/deep")).expect("a directory");
    symlink(machine.path("real/deep"), machine.path("link")).expect("a link");
    let given = machine.path("link/../p0.pool").display().to_string();
    machine.ok(&["pool", "create", "p0", &given, "--size", "64M"]);
    assert!(machine.path("real/p0.pool").exists());
    fs::remove_file(machine.path("link")).expect("the link");
    holds_p0(&machine, &machine.path("real/p0.pool"));
}

#[test]
fn a_path_that_the_registry_cannot_hold_is_refused_before_anything_is_made() {
    use std::os::unix::ffi::OsStrExt;
    let machine = Machine::new();
    let path = machine
        .path("")
        .join(std::ffi::OsStr::from_bytes(b"p\xff.pool"));
    let mut command = machine.command(&["pool", "create", "p0", "--size", "64M"]);
    let refused = said(&command.arg(&path).output().expect("ublkctl starts"));
    let line = one_line(&refused, 2, &["pool", "create"]);
    assert!(line.contains("not UTF-8"), "{line}");
    assert!(!path.exists());
    assert_eq!(machine.ok(&["pool", "list", "-H"]), "");
}

#[test]
fn one_bad_entry_hides_no_other_pool() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let other = machine.path("other.pool").display().to_string();
    machine.ok(&["pool", "create", "bad", &other, "--size", "64M"]);
    machine.ok(&["create", "bad/w", "--size", "1M"]);
    let file = machine.path("state/pools/bad.json");
    let whole = fs::read(&file).expect("the entry");
    let way_out = "`ublkctl pool export --force bad`";
    for damage in [&b""[..], b"{", b"\xff\0", b"[]", &whole[..whole.len() / 2]] {
        fs::write(&file, damage).expect("the entry");
        for (words, shown) in [
            (&["list", "-H", "-o", "name"][..], "p0/v\n"),
            (&["stats", "-H", "-p"], "p0\t"),
        ] {
            let said = machine.run(words);
            assert_eq!(said.code, 1, "{words:?}: {said:?}");
            assert_eq!(said.stderr.lines().count(), 1, "{words:?}: {said:?}");
            assert!(said.stderr.contains(way_out), "{words:?}: {said:?}");
            assert!(said.stdout.starts_with(shown), "{words:?}: {said:?}");
        }
        let said = machine.run(&["pool", "list", "-H"]);
        assert_eq!(said.code, 1, "{said:?}");
        let lines: Vec<&str> = said.stdout.lines().collect();
        assert!(
            lines[0].starts_with("bad\t") && lines[0].contains(way_out),
            "{said:?}"
        );
        assert!(lines[1].starts_with("p0\t") && lines.len() == 2, "{said:?}");
        let said = machine.run(&["pool", "list", "--json"]);
        let pools: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
        assert_eq!((said.code, &pools[0]["name"]), (1, &"bad".into()));
        assert!(pools[0]["error"].to_string().contains(way_out), "{pools}");
        assert_eq!(pools[1]["status"]["name"], "p0");
        // Whoever asks for this pool hears it, and other pools come and go.
        let line = machine.refused(1, &["pool", "status", "bad"]);
        assert!(line.contains(way_out), "{line}");
        let third = machine.path("third.pool").display().to_string();
        machine.ok(&["pool", "create", "p2", &third, "--size", "16M"]);
        machine.refused(1, &["pool", "create", "bad", &third, "--size", "16M"]);
        machine.ok(&["pool", "destroy", "p2", "--force"]);
        fs::remove_file(&third).expect("the file");
    }
    // What is no file at all is as bad, and waits for nobody.
    for make in ["mkdir", "mkfifo", "ln -s /dev/zero"] {
        fs::remove_file(&file)
            .or_else(|_| fs::remove_dir(&file))
            .expect("the entry");
        let line = format!("{make} {}", file.display());
        assert!(
            Command::new("sh")
                .args(["-c", &line])
                .status()
                .expect("sh starts")
                .success()
        );
        let said = machine.run(&["list", "-H", "-o", "name"]);
        assert_eq!(
            (said.code, &*said.stdout),
            (1, "p0/v\n"),
            "{make}: {said:?}"
        );
        assert_eq!(said.stderr.lines().count(), 1, "{make}: {said:?}");
    }
    fs::remove_file(&file).expect("the entry");
    fs::write(&file, "").expect("the entry");
    // The way out is one.
    let said = machine.run(&["pool", "export", "--force", "bad"]);
    assert_eq!(said.code, 0, "{said:?}");
    machine.ok(&["pool", "import", &other]);
    assert_eq!(machine.ok(&["list", "-H", "-o", "name"]), "bad/w\np0/v\n");
}

#[test]
fn a_registry_that_may_not_be_read_is_an_error() {
    // Root reads everything.
    if nix::unistd::getuid().is_root() {
        return;
    }
    let machine = Machine::with_pool();
    let pools = machine.path("state/pools");
    let open = |mode| fs::set_permissions(&pools, fs::Permissions::from_mode(mode));
    open(0o000).expect("its mode");
    machine.refused(1, &["pool", "list"]);
    open(0o700).expect("its mode");
}
