//! What a command inherits from its shell does no harm: limits, ignored and blocked signals, open descriptors.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::{Daemon, Machine, said};
use crate::nbd::Serving;
use nix::sys::signal::{SigSet, Signal};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

const MIB: usize = 1 << 20;

/// Writes a whole volume over NBD, reads it back, and makes it durable.
#[track_caller]
fn fill(serving: &Serving, mib: usize, byte: u8) {
    let mut client = serving.client();
    for at in 0..mib {
        let offset = (at * MIB) as u64;
        client.write(offset, &vec![byte; MIB]).expect("a write");
    }
    let last = ((mib - 1) * MIB) as u64;
    let found = client.read(last, 4096).expect("a read");
    assert_eq!(found, [byte; 4096]);
}

/// Whether this process has a capability, by its number.
fn is_able(capability: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = u64::from_str_radix(line.expect("capabilities").trim(), 16).expect("a mask");
    set >> capability & 1 == 1
}

/// Sets the soft limit on the size of files of a process that runs.
#[track_caller]
fn limit_files(daemon: &Daemon, soft: &str) {
    let pid = daemon.pid().to_string();
    let limit = format!("--fsize={soft}:");
    let status = Command::new("prlimit")
        .args(["--pid", &pid, &limit])
        .status();
    assert!(status.expect("prlimit starts").success());
}

#[test]
fn a_limit_on_the_size_of_files_ends_neither_a_daemon_nor_a_command() {
    let machine = Machine::with_pool();
    let limited = "ulimit -S -f 1";
    let create = machine.command_after(limited, &["create", "p0/v", "--size", "16M"]);
    let output = { create }.output().expect("sh starts");
    assert_eq!(said(&output).code, 0, "{:?}", said(&output));
    let command = machine.command_after(limited, &["serve", "p0"]);
    let mut daemon = machine.serve_by("p0", command);
    let serving = Serving::start(&machine, &["p0/v"]);
    fill(&serving, 16, 7);
    assert_eq!(serving.end().0, Some(0));
    assert!(daemon.is_running());
    assert_eq!(daemon.terminate(), Some(0));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_hard_limit_is_lifted_or_named_before_anything_is_written() {
    const CAP_SYS_RESOURCE: u32 = 24;
    let machine = Machine::with_pool();
    let before = machine.pool_bytes();
    let words = ["create", "p0/v", "--size", "4M"];
    let output = machine.command_after("ulimit -f 1", &words).output();
    let said = said(&output.expect("sh starts"));
    if is_able(CAP_SYS_RESOURCE) {
        assert_eq!(said.code, 0, "{said:?}");
        return;
    }
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.stderr.contains("ulimit -f unlimited"), "{said:?}");
    assert!(before == machine.pool_bytes(), "the pool was written to");
    let other = machine.path("other.pool").display().to_string();
    let words = ["pool", "create", "p1", &other, "--size", "64M"];
    let output = machine.command_after("ulimit -f 1", &words).output();
    let said = crate::kit::said(&output.expect("sh starts"));
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.stderr.contains("ulimit -f"), "{said:?}");
    assert!(!Path::new(&other).exists());
}

#[test]
fn a_limit_that_comes_later_fails_the_writes_beyond_it_and_no_more() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "16M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    fill(&serving, 16, 7);
    assert_eq!(serving.end().0, Some(0));
    machine.is_left_alone("p0");
    // Opened anew, so that the volume's blocks are overwritten in place and nothing waits for a checkpoint.
    let mut daemon = machine.serve();
    let serving = Serving::start(&machine, &["p0/v"]);
    // The journal lies before this, the volume's last block behind it.
    limit_files(&daemon, "8388608");
    let mut client = serving.client();
    let last = (15 * MIB) as u64;
    let refused = client.write(last, &[8; 4096]).expect_err("the limit");
    assert!(refused.to_string().contains('5'), "EIO: {refused}");
    assert_eq!(client.read(last, 4096).expect("a read"), [7; 4096]);
    limit_files(&daemon, "unlimited");
    client.write(last, &[9; 4096]).expect("a write");
    drop(client);
    assert_eq!(serving.end().0, Some(0));
    assert!(daemon.is_running());
    assert_eq!(daemon.terminate(), Some(0));
    let log = fs::read_to_string(machine.path("serve.log")).expect("the log");
    let named = |line: &&str| line.contains("File too large") && line.contains("ulimit -f");
    assert_eq!(log.lines().filter(named).count(), 1, "{log}");
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_daemon_that_inherits_blocked_signals_can_be_stopped() {
    let machine = Machine::with_pool();
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTERM);
    blocked.thread_block().expect("signals can be blocked");
    let mut daemon = machine.serve();
    blocked.thread_unblock().expect("and unblocked");
    let pid = daemon.pid().to_string();
    let killed = Command::new("kill").arg(pid).status().expect("kill starts");
    assert!(killed.success());
    for _ in 0..1000 {
        if !daemon.is_running() {
            assert_eq!(daemon.ends(), Some(0));
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("SIGTERM did not reach the daemon");
}

#[test]
fn a_signal_that_its_shell_ignores_ends_no_export() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let command = machine.command_after("trap '' HUP INT", &["serve-nbd", "p0/v"]);
    let serving = Serving::start_by(command);
    let mask = fs::read_to_string(format!("/proc/{}/status", serving.pid())).expect("/proc");
    let set = |name: &str| {
        let line = mask.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.expect("a mask").trim(), 16).expect("a mask")
    };
    let bit = |signal: Signal| 1_u64 << (signal as u32 - 1);
    let both = bit(Signal::SIGHUP) | bit(Signal::SIGINT);
    assert_eq!(set("SigIgn:") & both, both, "{mask}");
    serving.signal("-HUP");
    serving.signal("-INT");
    serving.client().write(0, &[1; 4096]).expect("a write");
    assert_eq!(serving.end_by("-TERM").0, Some(0));
}

#[test]
fn a_daemon_keeps_no_descriptor_of_the_command_that_started_it() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let lock = machine.path("lock");
    let setup = format!("exec 9>{}", lock.display());
    let serving = Serving::start_by(machine.command_after(&setup, &["serve-nbd", "p0/v"]));
    let pid = fs::read_to_string(machine.path("run/p0.pid")).expect("a pid file");
    let open = |pid: &str| {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", pid.trim())).expect("/proc");
        let links = descriptors
            .flatten()
            .map(|entry| fs::read_link(entry.path()));
        links.flatten().any(|target| target == lock)
    };
    assert!(
        open(&serving.pid().to_string()),
        "the command itself has it"
    );
    assert!(!open(&pid), "the daemon has it too");
    assert_eq!(serving.end().0, Some(0));
}
