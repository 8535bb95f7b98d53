//! The whole life of a pool without a daemon: each command opens it, does its work and closes it.

use crate::kit::Machine;
use serde_json::json;
use std::fs;
use std::path::Path;

#[test]
fn a_pool_lives_and_dies() {
    let machine = Machine::with_pool();
    let status = machine.json(&["pool", "status", "p0", "--json"]);
    assert_eq!(status["name"], "p0");
    assert_eq!(status["size_bytes"], crate::kit::POOL_BYTES);
    assert_eq!(status["daemon_pid"], json!(null));
    let line = machine.ok(&["pool", "list", "-H", "-p"]);
    let cells: Vec<&str> = line.trim_end().split('\t').collect();
    assert_eq!(cells[0..2], ["p0", "67108864"]);
    assert_eq!(cells[7..], ["closed", &machine.pool_path()]);
    machine.ok(&["pool", "grow", "p0", "96M"]);
    assert_eq!(fs::metadata(machine.pool_path()).unwrap().len(), 96 << 20);
    assert_eq!(
        machine.json(&["pool", "status", "p0", "--json"])["size_bytes"],
        96 << 20
    );
    machine.ok(&["pool", "check", "p0"]);
    machine.ok(&["pool", "export", "p0"]);
    assert_eq!(machine.ok(&["pool", "list", "-H"]), "");
    machine.ok(&["pool", "check", &machine.pool_path()]);
    assert_eq!(
        machine.ok(&["pool", "import", &machine.pool_path()]),
        "p0\n"
    );
    let said = machine.ok(&["pool", "destroy", "p0", "-n"]);
    assert!(said.starts_with("would destroy pool p0"), "{said}");
    machine.ok(&["pool", "destroy", "p0", "--force"]);
    assert!(Path::new(&machine.pool_path()).exists());
    machine.refused(1, &["pool", "import", &machine.pool_path()]);
    machine.refused(1, &["pool", "status", "p0"]);
}

#[test]
fn volumes_fork_and_go_in_any_order() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "10M"]);
    machine.ok(&[
        "create",
        "p0/w",
        "--size",
        "4M",
        "--sector-size",
        "512",
        "--redirect",
        "always",
    ]);
    machine.ok(&["snapshot", "p0/v@a", "p0/w@a"]);
    machine.ok(&["snap", "p0/v@b"]);
    machine.ok(&["clone", "p0/v@a", "p0/c"]);
    machine.ok(&["snapshot", "p0/c@x"]);
    machine.ok(&["clone", "p0/c@x", "p0/d"]);
    machine.ok(&["rollback", "p0/v@a"]);
    machine.ok(&["rename", "p0/d", "p0/e"]);
    machine.ok(&["rename", "p0/v@b", "p0/v@later"]);
    assert_eq!(
        machine.names(),
        [
            "p0/c",
            "p0/c@x",
            "p0/e",
            "p0/v",
            "p0/v@a",
            "p0/v@later",
            "p0/w",
            "p0/w@a"
        ]
    );
    let said = machine.ok(&["rm", "-n", "-r", "p0/v"]);
    assert!(
        said.contains("would remove p0/v@a\n") && said.contains("would free "),
        "{said}"
    );
    assert_eq!(machine.names().len(), 8);
    machine.ok(&["rm", "p0/v@a"]);
    machine.ok(&["rm", "-r", "p0/v"]);
    machine.ok(&["rm", "--wait", "p0/c@x", "p0/c"]);
    assert_eq!(machine.names(), ["p0/e", "p0/w", "p0/w@a"]);
    machine.ok(&["pool", "check", "p0"]);
    assert_eq!(
        machine.json(&["pool", "status", "p0", "--json"])["reclaiming"],
        0
    );
}

#[test]
fn a_list_is_read_by_people_scripts_and_programs() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "10M"]);
    machine.ok(&["snapshot", "p0/v@a"]);
    machine.ok(&["clone", "p0/v@a", "p0/c"]);
    let text = machine.ok(&["ls"]);
    let header: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        header,
        [
            "NAME", "TYPE", "SIZE", "USED", "UNIQUE", "SHARED", "DEVICE", "CREATED"
        ]
    );
    assert_eq!(text.lines().count(), 4);
    let text = machine.ok(&["list", "p0/v", "-H", "-p", "-o", "name,type,size,device"]);
    assert_eq!(
        text,
        "p0/v\tvolume\t10485760\t-\np0/v@a\tsnapshot\t10485760\t-\n"
    );
    assert_eq!(
        machine.ok(&["list", "p0/v@a", "-H", "-o", "name"]),
        "p0/v@a\n"
    );
    assert_eq!(
        machine.ok(&["list", "p0/c", "-H", "-o", "origin"]),
        "p0/v@a\n"
    );
    let rows = machine.json(&["list", "--json", "p0/v@a"]);
    let row = &rows[0];
    assert_eq!(
        (&row["name"], &row["pool"]),
        (&json!("p0/v@a"), &json!("p0"))
    );
    assert_eq!(
        (&row["kind"], &row["size_bytes"]),
        (&json!("snapshot"), &json!(10 << 20))
    );
    assert_eq!(
        (&row["device"], &row["served"]),
        (&json!(null), &json!(false))
    );
}

#[test]
fn an_empty_diff_is_empty() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "10M"]);
    machine.ok(&["snapshot", "p0/v@a"]);
    assert_eq!(
        machine.json(&["diff", "--json", "p0/v@a", "p0/v"]),
        json!([])
    );
    assert_eq!(machine.ok(&["diff", "-H", "p0/v@a", "p0/v"]), "");
}

#[test]
fn a_check_has_figures() {
    let machine = Machine::with_pool();
    let report = machine.json(&["pool", "check", "--json", "p0"]);
    assert_eq!(
        (&report["damage"], &report["leaked_blocks"]),
        (&json!([]), &json!(0))
    );
    assert!(machine.ok(&["pool", "check", "p0"]).starts_with("result"));
}

#[test]
fn stats_and_completions_are_printed() {
    let machine = Machine::with_pool();
    assert_eq!(machine.json(&["stats", "--json", "p0"])[0]["pool"], "p0");
    assert!(machine.ok(&["stats"]).starts_with("POOL"));
    assert!(machine.ok(&["completions", "bash"]).contains("ublkctl"));
    assert!(machine.ok(&["--help"]).contains("Exit codes"));
    assert!(machine.ok(&["--version"]).starts_with("ublkctl "));
}

#[test]
fn a_long_name_is_as_good_as_a_short_one() {
    let machine = Machine::new();
    let name = "x".repeat(127);
    machine.ok(&[
        "pool",
        "create",
        &name,
        &machine.pool_path(),
        "--size",
        "16M",
    ]);
    machine.ok(&["create", &format!("{name}/{name}"), "--size", "4K"]);
    machine.ok(&["snapshot", &format!("{name}/{name}@{name}")]);
    machine.ok(&["pool", "check", &name]);
}
