//! Where the output goes: a full disk or a reader that left is not a pool without space, and never ends a daemon.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::{Machine, said};
use crate::nbd::Serving;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

/// A file that has no room for anything.
fn full() -> File {
    let options = File::options().write(true).open("/dev/full");
    options.expect("/dev/full")
}

#[test]
fn an_output_without_room_is_a_failure_and_not_a_full_pool() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    for words in [
        &["list"][..],
        &["list", "--json"],
        &["list", "-H", "-p"],
        &["tree", "p0"],
        &["diff", "p0/v@s", "p0/v"],
        &["stats", "p0"],
        &["pool", "list"],
        &["pool", "status", "p0"],
        &["pool", "status", "--json", "p0"],
        &["pool", "check", "p0"],
        &["prune", "p0/v", "--keep-last", "1", "-n"],
        &["rm", "-n", "p0/v@s"],
        &["pool", "destroy", "--dry-run", "p0"],
        &["completions", "bash"],
        &["--help"],
        &["list", "--help"],
        &["--version"],
    ] {
        let output = machine.command(words).stdout(full()).output();
        let said = said(&output.expect("ublkctl starts"));
        assert_eq!(said.code, 1, "{words:?}: {said:?}");
        let line = "ublkctl: stdout: cannot be written: No space left on device (os error 28)\n";
        assert_eq!(said.stderr, line, "{words:?}");
    }
}

#[test]
fn a_watch_ends_with_its_reader() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    let mut watch = machine.command(&["watch", "p0"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut first = String::new();
    let mut reader = BufReader::new(watch.stdout.take().expect("a pipe"));
    reader.read_line(&mut first).expect("a line");
    assert!(first.contains("watching"), "{first}");
    drop(reader);
    // An event that nobody reads; without one the watch has nothing to write.
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    let ended = (0..500).find_map(|_| {
        thread::sleep(Duration::from_millis(20));
        watch.try_wait().expect("it can be waited for")
    });
    if ended.is_none() {
        watch.kill().expect("it can be killed");
    }
    assert_eq!(ended.map(|status| status.code()), Some(Some(0)));
    assert_eq!(serving.end().0, Some(0));
    assert_eq!(daemon.terminate(), Some(0));
}

#[test]
fn a_log_without_room_does_not_end_the_daemon() {
    let machine = Machine::with_pool();
    let command = machine.command(&["serve", "p0"]);
    let mut daemon = machine.serve_logging("p0", command, full());
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    serving.client().write(0, &[7; 4096]).expect("a write");
    assert_eq!(serving.end().0, Some(0));
    assert!(daemon.is_running());
    assert_eq!(daemon.terminate(), Some(0));
    machine.ok(&["pool", "check", "p0"]);
}
