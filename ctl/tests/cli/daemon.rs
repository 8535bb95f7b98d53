//! The daemon without a device: one for each pool, reached by its owner alone, ended and replaced without a trace.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::Machine;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;

#[test]
fn commands_go_through_the_daemon() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    let status = machine.json(&["pool", "status", "p0", "--json"]);
    assert_eq!(status["daemon_pid"], daemon.pid());
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    machine.refused(1, &["snapshot", "p0/v@s"]);
    machine.ok(&["clone", "p0/v@s", "p0/c"]);
    machine.ok(&["rollback", "p0/v@s"]);
    machine.ok(&["pool", "grow", "p0", "80M"]);
    machine.ok(&["pool", "check", "p0"]);
    machine.ok(&["pool", "check", &machine.pool_path()]);
    machine.ok(&["rm", "--wait", "-r", "p0/v"]);
    assert_eq!(machine.names(), ["p0/c"]);
    assert_eq!(daemon.terminate(), Some(0));
    assert!(!machine.socket().exists() && !machine.path("run/p0.pid").exists());
    assert_eq!(machine.names(), ["p0/c"]);
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn memory_for_metadata_is_what_was_asked_for() {
    let machine = Machine::with_pool();
    let line = machine
        .run(&["serve", "p0", "--metadata-cache", "15M"])
        .stderr;
    assert!(line.contains("16M"), "{line}");
    assert_eq!(
        machine.run(&["serve", "p0", "--metadata-cache", "1"]).code,
        2
    );
    let daemon = machine.serve_with("p0", &["--metadata-cache", "16M"]);
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let stats = machine.json(&["stats", "--json", "p0"]);
    assert!(stats[0]["metadata_bytes"].as_u64().unwrap() <= 16 << 20);
    assert_eq!(daemon.terminate(), Some(0));
}

#[test]
fn a_second_daemon_is_refused() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    let said = machine.run(&["serve", "p0"]);
    assert_eq!(said.code, 1, "{said:?}");
    let last = said.stderr.lines().last().unwrap();
    assert!(
        last.contains(&format!("process {}", daemon.pid())),
        "{last}"
    );
    assert_eq!(
        machine.json(&["pool", "status", "p0", "--json"])["daemon_pid"],
        daemon.pid()
    );
}

#[test]
fn a_killed_daemon_leaves_nothing_in_the_way() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    daemon.kill();
    assert!(machine.socket().exists());
    assert_eq!(machine.names(), ["p0/v"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    let said = machine.run(&["recover", "p0"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, ""));
    fs::remove_file(machine.path("run/p0.pid")).unwrap();
    let daemon = machine.serve();
    assert_eq!(machine.names(), ["p0/v", "p0/v@s"]);
    assert_eq!(daemon.terminate(), Some(0));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_daemon_keeps_no_copy_of_the_machines_mounts() {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    // Elsewhere, and where init's may not be looked at, the daemon has one of its own.
    if namespace("1") == namespace("self") {
        let machine = Machine::with_pool();
        let daemon = machine.serve();
        assert_eq!(namespace(&daemon.pid().to_string()), namespace("self"));
    }
}

#[test]
fn an_export_ends_the_daemon() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    machine.ok(&["pool", "export", "p0"]);
    assert_eq!(daemon.ends(), Some(0));
    machine.ok(&["pool", "import", &machine.pool_path()]);
    assert_eq!(machine.names(), ["p0/v"]);
}

#[test]
fn many_commands_at_once_all_get_their_answer() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    thread::scope(|scope| {
        for index in 0..16 {
            let machine = &machine;
            scope.spawn(move || machine.ok(&["create", &format!("p0/v{index}"), "--size", "1M"]));
        }
    });
    assert_eq!(machine.names().len(), 16);
    assert_eq!(daemon.terminate(), Some(0));
    assert_eq!(machine.names().len(), 16);
}

/// A connection that has been greeted.
fn greeted(machine: &Machine) -> BufReader<UnixStream> {
    let mut stream = BufReader::new(UnixStream::connect(machine.socket()).expect("a daemon"));
    let hello = line(&mut stream);
    assert_eq!(hello["hello"]["pool"], "p0");
    stream
}

fn line(stream: &mut BufReader<UnixStream>) -> Value {
    let mut text = String::new();
    stream.read_line(&mut text).expect("an answer");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn hostile_lines_are_answered_and_survived() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    let mut stream = greeted(&machine);
    for text in [
        "",
        "{",
        "null",
        "\"stop\" \"stop\"",
        "{\"rollback\":{\"snapshot\":\"../../etc\"}}",
        "\u{0}\u{1}",
    ] {
        stream
            .get_mut()
            .write_all(format!("{text}\n").as_bytes())
            .unwrap();
        assert_eq!(line(&mut stream)["error"]["kind"], "invalid", "{text:?}");
    }
    // The connection is still good.
    stream.get_mut().write_all(b"\"status\"\n").unwrap();
    assert_eq!(line(&mut stream)["reply"]["status"]["name"], "p0");
    // Too long a line ends it, whatever is in it.
    let mut stream = greeted(&machine);
    let long = vec![b'x'; (1 << 20) + 1];
    stream.get_mut().write_all(&long).unwrap();
    let answer = line(&mut stream);
    assert_eq!(
        answer["error"]["message"],
        json!("request: the line is too long")
    );
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(
        machine.json(&["pool", "status", "p0", "--json"])["daemon_pid"],
        daemon.pid()
    );
}

#[test]
fn idle_connections_do_not_keep_others_out_for_ever() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    let idle: Vec<_> = (0..64).map(|_| greeted(&machine)).collect();
    let line = machine.refused(1, &["pool", "status", "p0"]);
    assert!(line.contains("too many connections"), "{line}");
    drop(idle);
    for _ in 0..100 {
        if machine.run(&["pool", "status", "p0"]).code == 0 {
            assert_eq!(daemon.terminate(), Some(0));
            return;
        }
        thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("the daemon still turns everybody away");
}

#[test]
fn the_socket_is_its_owners() {
    let machine = Machine::with_pool();
    let _daemon = machine.serve();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(machine.socket()), 0o600);
    assert_eq!(mode(machine.path("run")), 0o700);
}
