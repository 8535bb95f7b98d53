//! The pool's file is deleted, moved or replaced while a daemon serves it: the daemon says so, and what it says to do
//! saves every acknowledged write.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "they are a test's assertions"
)]

use crate::kit::Machine;
use crate::nbd::Serving;
use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const BLOCK: usize = 4096;

/// Waits until something holds.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("still not: {what}");
}

/// What `pool status` says about the pool's file.
fn misplaced(machine: &Machine) -> Option<String> {
    let status = machine.json(&["pool", "status", "--json", "p0"]);
    let warnings = status["warnings"].as_array().expect("warnings");
    let mut said = warnings.iter().filter_map(|warning| warning.as_str());
    let said = said.rfind(|warning| warning.contains("the pool's file"));
    assert_eq!(status["misplaced"], said.is_some(), "{status}");
    said.map(str::to_owned)
}

/// Runs the shell line that a message recommends between backticks, as a person would.
#[track_caller]
fn follow(machine: &Machine, message: &str) {
    let line = message.split('`').nth(1).expect("a shell line");
    let programs = machine.path("bin");
    fs::create_dir_all(&programs).expect("a folder");
    let program = programs.join("ublkctl");
    drop(fs::remove_file(&program));
    symlink(env!("CARGO_BIN_EXE_ublkctl"), &program).expect("a link");
    let path = std::env::var("PATH").expect("a path");
    let output = Command::new("/bin/sh")
        .args(["-c", line])
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("UBLKCTL_STATE_DIR", machine.path("state"))
        .env("UBLKCTL_RUNTIME_DIR", machine.path("run"))
        .stdin(Stdio::null())
        .output()
        .expect("sh starts");
    assert!(output.status.success(), "{line}: {output:?}");
}

/// Writes numbered blocks that no flush covers.
#[track_caller]
fn write(serving: &Serving, blocks: std::ops::Range<u8>) {
    let mut client = serving.client();
    for number in blocks {
        let offset = u64::from(number) * BLOCK as u64;
        client.write(offset, &[number; BLOCK]).expect("a write");
    }
}

#[track_caller]
fn holds(serving: &Serving, blocks: std::ops::Range<u8>) {
    let mut client = serving.client();
    for number in blocks {
        let offset = u64::from(number) * BLOCK as u64;
        let found = client.read(offset, 4096).expect("a read");
        assert!(found == [number; BLOCK], "block {number} is not there");
    }
}

#[test]
fn a_deleted_file_is_saved_with_all_that_was_acknowledged() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M"]);
    let daemon = machine.serve();
    let serving = Serving::start(&machine, &["p0/v"]);
    write(&serving, 1..50);
    machine.ok(&["snapshot", "p0/v@s"]);
    assert_eq!(misplaced(&machine), None);
    let watch = fs::File::create(machine.path("events")).expect("a file");
    let mut watch = machine
        .command(&["watch", "p0"])
        .stdout(watch)
        .spawn()
        .expect("it starts");
    let events = || fs::read_to_string(machine.path("events")).expect("the events");
    eventually("somebody watches", || events().contains("watching"));
    fs::remove_file(machine.pool_path()).expect("the pool's file goes");
    let message = misplaced(&machine).expect("it is said at once");
    eventually("the watch tells", || events().contains("was deleted"));
    let log = || fs::read_to_string(machine.path("serve.log")).expect("the log");
    assert!(log().contains("was deleted"), "{}", log());
    let list = machine.ok(&["pool", "list"]);
    assert!(list.contains("its file is gone"), "{list}");

    // Nothing that ends a daemon ends this one, as long as it is the only one that has the data.
    write(&serving, 50..100);
    assert_eq!(serving.end().0, Some(0));
    let line = machine.refused(1, &["pool", "export", "p0"]);
    assert!(line.contains("was deleted"), "{line}");
    let kill = Command::new("kill").arg(daemon.pid().to_string()).status();
    assert!(kill.expect("kill starts").success());
    eventually("the daemon heard it", || log().contains("not stopping"));
    let serving = Serving::start(&machine, &["p0/v"]);
    write(&serving, 100..150);

    follow(&machine, &message);
    watch.wait().expect("it ends with the daemon");
    drop(serving);
    machine.ok(&["pool", "check", "p0"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    holds(&serving, 1..150);
    assert_eq!(misplaced(&machine), None);
    assert_eq!(serving.end().0, Some(0));
    machine.is_left_alone("p0");
    let serving = Serving::start(&machine, &["p0/v@s"]);
    holds(&serving, 1..50);
    assert_eq!(serving.end().0, Some(0));
    machine.is_left_alone("p0");
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_daemon_that_a_command_started_does_not_end_with_the_only_copy() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    write(&serving, 1..50);
    let away = machine.path("away");
    fs::rename(machine.pool_path(), &away).expect("a rename");
    let moved = misplaced(&machine).expect("it is said");
    assert!(moved.contains("was moved"), "{moved}");
    follow(&machine, &moved);
    assert_eq!(misplaced(&machine), None);
    fs::write(&away, "something else").expect("a file");
    fs::rename(&away, machine.pool_path()).expect("a replacement");
    let message = misplaced(&machine).expect("it is said");
    assert!(message.contains("Another file is there now"), "{message}");
    assert_eq!(serving.end().0, Some(0));
    write(&Serving::start(&machine, &["p0/v"]), 50..60);
    fs::rename(machine.pool_path(), &away).expect("a rename");
    follow(&machine, &message);
    let serving = Serving::start(&machine, &["p0/v"]);
    holds(&serving, 1..60);
    assert_eq!(serving.end().0, Some(0));
    machine.is_left_alone("p0");
    machine.ok(&["pool", "check", "p0"]);
}
