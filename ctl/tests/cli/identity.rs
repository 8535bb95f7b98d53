//! Names and ids of pools: a copy beside its original, and `pool rename`.

use crate::kit::{Machine, one_line, said};
use crate::nbd::Serving;
use std::fs;
use std::process::Stdio;

fn shown(machine: &Machine, file: &str) -> String {
    machine.path(file).display().to_string()
}

fn id(machine: &Machine, pool: &str) -> String {
    machine.json(&["pool", "status", "--json", pool])["id"].to_string()
}

#[test]
fn a_copy_of_a_pool_is_used_beside_the_pool() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    machine.ok(&["set", "p0", "marks=42"]);
    let copy = shown(&machine, "copy.pool");
    fs::copy(machine.pool_path(), &copy).expect("a copy");
    let before = fs::read(&copy).expect("the copy");
    for (words, fact) in [
        (&[][..], "export that first"),
        (&["--name", "p1"], "--new-id"),
        (&["--new-id"], "--name"),
        (&["--new-id", "--name", "p0"], "--name"),
    ] {
        let line = machine.refused(1, &[&["pool", "import", &copy], words].concat());
        assert!(line.contains(fact), "{words:?}: {line}");
        assert!(before == fs::read(&copy).expect("the copy"), "{words:?}");
    }
    machine.refused(2, &["pool", "import", &copy, "--new-id", "--name", "a/b"]);
    let import = ["pool", "import", &copy, "--name", "p1", "--new-id"];
    assert_eq!(machine.ok(&import), "p1\n");
    assert_ne!(id(&machine, "p0"), id(&machine, "p1"));

    // Each goes its own way, at the same time.
    let (one, two) = (machine.serve_pool("p0"), machine.serve_pool("p1"));
    machine.ok(&["create", "p0/only", "--size", "1M"]);
    machine.ok(&["rollback", "p1/v@s"]);
    machine.ok(&["rm", "-r", "--wait", "p1/v"]);
    assert_eq!(machine.names(), ["p0/only", "p0/v", "p0/v@s"]);
    assert_eq!(machine.ok(&["list", "-H", "p1"]), "");
    for daemon in [one, two] {
        assert_eq!(daemon.terminate(), Some(0));
    }
    for pool in ["p0", "p1"] {
        machine.ok(&["pool", "check", pool]);
    }
    // The name and the id are the copy's own wherever it goes.
    let own = id(&machine, "p1");
    machine.ok(&["pool", "export", "p1"]);
    machine.ok(&["pool", "import", &copy]);
    assert_eq!(id(&machine, "p1"), own);
    // A copy of the copy, under a third name; and the original again, under its own.
    let third = shown(&machine, "third.pool");
    fs::copy(&copy, &third).expect("a copy");
    let line = machine.refused(1, &["pool", "import", &third]);
    assert!(line.contains("p1"), "{line}");
    machine.ok(&["pool", "import", &third, "--new-id", "--name", "p2"]);
    machine.ok(&["create", "p2/v", "--size", "1M"]);
    machine.ok(&["pool", "check", "p2"]);
}

#[test]
fn a_copy_of_a_pool_in_use_leaves_the_ring_to_the_pool() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let daemon = machine.serve();
    machine.ok(&["snapshot", "p0/v@s"]);
    let copy = shown(&machine, "copy.pool");
    fs::copy(machine.pool_path(), &copy).expect("a copy");
    machine.ok(&["snapshot", "p0/v@later"]);
    machine.ok(&["pool", "import", &copy, "--new-id", "--name", "p1"]);
    assert_eq!(
        machine.ok(&["list", "-H", "-o", "name", "p1"]),
        "p1/v\np1/v@s\n"
    );
    machine.ok(&["create", "p1/w", "--size", "1M"]);
    machine.ok(&["pool", "check", "p1"]);
    // The same of a pool whose daemon was killed: the pool is there, so what is imported is the copy.
    daemon.kill();
    let second = shown(&machine, "second.pool");
    fs::copy(machine.pool_path(), &second).expect("a copy");
    let ring = fs::read(machine.path("run/p0.ring")).expect("the ring");
    machine.ok(&["pool", "import", &second, "--new-id", "--name", "p2"]);
    machine.ok(&["create", "p2/w", "--size", "1M"]);
    assert!(ring == fs::read(machine.path("run/p0.ring")).expect("the ring"));
    assert_eq!(machine.names(), ["p0/v", "p0/v@s", "p0/v@later"]);
    for pool in ["p0", "p1", "p2"] {
        machine.ok(&["pool", "check", pool]);
    }
}

#[test]
fn a_pool_that_was_not_closed_keeps_its_id() {
    let machine = Machine::with_pool();
    let daemon = machine.serve();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    daemon.kill();
    // This registry knows no original of which it could be a copy.
    let import = |words: &[&str]| {
        let path = machine.pool_path();
        let mut command = machine.command(&[&["pool", "import", &path], words].concat());
        command.env("UBLKCTL_STATE_DIR", machine.path("other-state"));
        said(&command.output().expect("ublkctl starts"))
    };
    let before = machine.pool_bytes();
    for words in [
        &["--new-id"][..],
        &["--name", "p1"],
        &["--new-id", "--name", "p1"],
    ] {
        let line = one_line(&import(words), 1, words);
        assert!(line.contains("was not closed"), "{line}");
        assert!(before == machine.pool_bytes(), "{words:?}");
    }
    // Closed, it gets what it was refused.
    assert_eq!(machine.names(), ["p0/v"]);
    machine.ok(&["pool", "export", "p0"]);
    let path = machine.pool_path();
    machine.ok(&["pool", "import", &path, "--new-id", "--name", "p0"]);
    machine.ok(&["pool", "check", "p0"]);
    assert_eq!(machine.names(), ["p0/v"]);
}

#[test]
fn a_pool_gets_another_name() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    machine.ok(&["set", "p0", "marks=42"]);
    let own = id(&machine, "p0");
    let other = shown(&machine, "other.pool");
    machine.ok(&["pool", "create", "p9", &other, "--size", "16M"]);
    for (from, to, code) in [
        ("p0", "p9", 1),
        ("p0", "p0", 1),
        ("p7", "p8", 1),
        ("p0", "a/b", 2),
    ] {
        machine.refused_untouched(code, &["pool", "rename", from, to]);
    }
    // An idle daemon ends for it.
    let daemon = machine.serve();
    machine.ok(&["pool", "rename", "p0", "p1"]);
    assert_eq!(daemon.ends(), Some(0));
    assert_eq!(id(&machine, "p1"), own);
    assert_eq!(
        machine.ok(&["list", "-H", "-o", "name", "p1"]),
        "p1/v\np1/v@s\n"
    );
    machine.refused(1, &["pool", "status", "p0"]);
    machine.ok(&["pool", "check", "p1"]);
    let daemon = machine.serve_pool("p1");
    assert_eq!(
        machine.json(&["pool", "status", "--json", "p1"])["name"],
        "p1"
    );
    assert_eq!(daemon.terminate(), Some(0));
    // The name is in the pool, so it travels with the pool, and the old one is free.
    machine.ok(&["pool", "export", "p1"]);
    assert_eq!(
        machine.ok(&["pool", "import", &machine.pool_path()]),
        "p1\n"
    );
    let third = shown(&machine, "third.pool");
    machine.ok(&["pool", "create", "p0", &third, "--size", "16M"]);
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn marks_move_with_the_name() {
    let machine = Machine::with_pool();
    machine.ok(&["set", "p0", "marks=42"]);
    machine.ok(&["pool", "rename", "p0", "p1"]);
    let marks =
        |pool: &str| fs::read_to_string(machine.path("state/pools").join(format!("{pool}.marks")));
    assert!(marks("p1").expect("its marks").contains("42"));
    assert!(marks("p0").is_err());
}

#[test]
fn what_is_attached_keeps_the_pools_name_and_is_named() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    let line = machine.refused(1, &["pool", "rename", "p0", "p1"]);
    assert!(line.contains("p0/v"), "{line}");
    assert_eq!(machine.names(), ["p0/v"]);
    drop(serving);
    machine.is_left_alone("p0");
    machine.ok(&["pool", "rename", "p0", "p1"]);
    machine.ok(&["pool", "check", "p1"]);
}

#[test]
fn a_pool_is_renamed_once_by_many_at_once() {
    for _ in 0..8 {
        let machine = Machine::with_pool();
        machine.ok(&["create", "p0/v", "--size", "1M"]);
        let names = ["p1", "p2", "p3", "p4"];
        let start = |name| {
            let mut command = machine.command(&["pool", "rename", "p0", name]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("ublkctl starts")
        };
        let running = names.map(start);
        let all = running.map(|child| said(&child.wait_with_output().expect("ublkctl ends")));
        let won: Vec<&str> = names
            .iter()
            .zip(&all)
            .filter(|(_, said)| said.code == 0)
            .map(|(name, _)| *name)
            .collect();
        assert_eq!(won.len(), 1, "{all:?}");
        let listed = machine.ok(&["list", "-H", "-o", "name"]);
        assert_eq!(listed, format!("{}/v\n", won[0]));
        machine.ok(&["pool", "check", won[0]]);
    }
}
