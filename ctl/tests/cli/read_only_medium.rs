//! A pool on a medium that takes no writes: what is there is served for reading, also after a crash, and everything else
//! is refused with the reason.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]
#![expect(
    clippy::print_stdout,
    reason = "a test that is skipped says so where the test program shows it"
)]

use crate::kit::{Daemon, Machine, Said, one_line, said};
use crate::nbd::Serving;
use std::process::{Command, Stdio};

const BLOCK: usize = 4096;
/// Mounts the folder of the pool's file again, read-only.
const REMOUNT: &str = "mount --bind \"$0\" \"$0\" && mount -o remount,ro,bind \"$0\"";

/// A machine whose pool lies in a folder of its own, which commands can see as a read-only mount.
struct Medium(Machine);

impl Medium {
    /// None, with a line that says so, where this process may not mount.
    fn with_pool() -> Option<Self> {
        let machine = Machine::new();
        let folder = machine.path("medium");
        std::fs::create_dir(&folder).expect("a folder");
        let pool = folder.join("p0.pool").display().to_string();
        machine.ok(&["pool", "create", "p0", &pool, "--size", "64M"]);
        machine.ok(&["create", "p0/v", "--size", "8M"]);
        let medium = Self(machine);
        let tried = medium.run_program("true").status().expect("unshare starts");
        if !tried.success() {
            println!("skipped: this process may not mount");
            return None;
        }
        Some(medium)
    }

    fn run_program(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        let line = format!("{REMOUNT} && exec \"$@\"");
        command.args(["-m", "--", "/bin/sh", "-c", &line]);
        command.arg(self.0.path("medium")).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// A command that finds the pool's folder read-only.
    fn command(&self, words: &[&str]) -> Command {
        let command = self.0.command(words);
        let mut unshared = self.run_program(command.get_program().to_str().expect("a path"));
        unshared.args(command.get_args());
        for (variable, value) in command.get_envs() {
            unshared.env(variable, value.unwrap_or_default());
        }
        unshared
    }

    fn run(&self, words: &[&str]) -> Said {
        said(&self.command(words).output().expect("unshare starts"))
    }

    #[track_caller]
    fn ok(&self, words: &[&str]) -> String {
        let said = self.run(words);
        assert_eq!(said.code, 0, "ublkctl {}: {said:?}", words.join(" "));
        said.stdout
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) -> String {
        one_line(&self.run(words), 1, words)
    }

    fn serve_nbd(&self, words: &[&str]) -> Serving {
        Serving::start_by(self.command(&[&["serve-nbd"], words].concat()))
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.0.path("medium/p0.pool")).expect("the pool's file")
    }

    /// Writes numbered blocks and takes a snapshot between them, then kills the daemon: the pool was not closed.
    fn crash(&self, is_flushed: bool) {
        let daemon: Daemon = self.0.serve();
        let serving = Serving::start(&self.0, &["p0/v"]);
        let mut client = serving.client();
        for number in 1..40 {
            let offset = u64::from(number) * BLOCK as u64;
            client.write(offset, &[number; BLOCK]).expect("a write");
            if number == 20 {
                self.0.ok(&["snapshot", "p0/v@s"]);
            }
        }
        if is_flushed {
            const FLUSH: u16 = 3;
            client.change(FLUSH, 0, 0).expect("a flush");
        }
        daemon.kill();
    }
}

#[track_caller]
fn holds(serving: &Serving, numbers: std::ops::Range<u8>) {
    let mut client = serving.client();
    for number in numbers {
        let offset = u64::from(number) * BLOCK as u64;
        let found = client.read(offset, 4096).expect("a read");
        assert!(found == [number; BLOCK], "block {number} is not there");
    }
}

#[test]
fn a_crashed_pool_on_a_read_only_mount_is_served_for_reading_with_all_that_was_acknowledged() {
    for is_flushed in [true, false] {
        let Some(medium) = Medium::with_pool() else {
            return;
        };
        medium.crash(is_flushed);
        let before = medium.bytes();
        let serving = medium.serve_nbd(&["p0/v@s"]);
        holds(&serving, 1..21);
        assert_eq!(serving.end().0, Some(0));
        medium.0.is_left_alone("p0");
        let serving = medium.serve_nbd(&["--read-only", "p0/v"]);
        holds(&serving, 1..40);
        let status = medium.0.json(&["pool", "status", "--json", "p0"]);
        assert_eq!(status["read_only"], true);
        let text = status["warnings"].to_string();
        assert!(text.contains("read-only medium"), "{text}");
        assert_eq!(serving.end().0, Some(0));
        medium.0.is_left_alone("p0");
        // Without a daemon.
        for words in [
            &["list", "p0"][..],
            &["tree", "p0"],
            &["pool", "status", "p0"],
            &["pool", "check", "p0"],
            &["stats", "p0"],
            &["diff", "p0/v@s", "p0/v"],
            &["prune", "p0/v", "--keep-last", "1", "-n"],
        ] {
            assert!(!medium.ok(words).is_empty(), "{words:?}");
        }
        assert!(before == medium.bytes(), "the medium was written to");
        // Where it can be written to again, nothing is missing.
        let serving = Serving::start(&medium.0, &["p0/v"]);
        holds(&serving, 1..40);
        assert_eq!(serving.end().0, Some(0));
        medium.0.is_left_alone("p0");
        medium.0.ok(&["pool", "check", "p0"]);
    }
}

#[test]
fn what_writes_is_refused_on_a_read_only_mount() {
    let Some(medium) = Medium::with_pool() else {
        return;
    };
    medium.0.ok(&["snapshot", "p0/v@s"]);
    let before = medium.bytes();
    for words in [
        &["create", "p0/w", "--size", "1M"][..],
        &["snapshot", "p0/v@t"],
        &["rm", "p0/v@s"],
        &["pool", "grow", "p0", "128M"],
    ] {
        let line = medium.refused(words);
        assert!(line.contains("Read-only file system"), "{line}");
    }
    let line = medium.refused(&["serve-nbd", "p0/v"]);
    assert!(
        line.contains("read-only medium") && line.contains("--read-only"),
        "{line}"
    );
    let serving = medium.serve_nbd(&["p0/v@s"]);
    let line = medium.refused(&["serve-nbd", "p0/v"]);
    assert!(line.contains("read-only medium"), "{line}");
    let line = medium.refused(&["snapshot", "p0/v@t"]);
    assert!(line.contains("read-only"), "{line}");
    // One daemon, although the pool's lock lets readers in.
    let said = medium.run(&["serve", "p0"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.stderr.contains("serves this pool already"), "{said:?}");
    assert_eq!(serving.end().0, Some(0));
    medium.0.is_left_alone("p0");
    assert!(before == medium.bytes(), "the medium was written to");
}

#[test]
fn a_pool_on_a_read_only_mount_is_exported_and_imported() {
    let Some(medium) = Medium::with_pool() else {
        return;
    };
    medium.crash(true);
    let before = medium.bytes();
    let serving = medium.serve_nbd(&["--read-only", "p0/v"]);
    let line = medium.refused(&["pool", "export", "p0"]);
    assert!(line.contains("p0/v"), "{line}");
    assert_eq!(serving.end().0, Some(0));
    medium.0.is_left_alone("p0");
    medium.ok(&["pool", "export", "p0"]);
    assert!(!medium.0.path("run/p0.ring").exists());
    let path = medium.0.path("medium/p0.pool").display().to_string();
    assert_eq!(medium.ok(&["pool", "import", &path]), "p0\n");
    let serving = medium.serve_nbd(&["--read-only", "p0/v"]);
    holds(&serving, 1..40);
    assert_eq!(serving.end().0, Some(0));
    medium.0.is_left_alone("p0");
    // A daemon that a person started ends with the export.
    let mut daemon = medium.command(&["serve", "p0"]).spawn().expect("it starts");
    while medium
        .run(&["pool", "status", "--json", "p0"])
        .stdout
        .contains("\"daemon_pid\": null")
    {
        assert!(daemon.try_wait().expect("it can be waited for").is_none());
    }
    medium.ok(&["pool", "export", "p0"]);
    assert_eq!(daemon.wait().expect("it ends").code(), Some(0));
    assert!(before == medium.bytes(), "the medium was written to");
}
