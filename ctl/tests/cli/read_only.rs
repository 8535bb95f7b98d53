//! A pool that is too damaged to be written to is served all the same: what is whole of it, read-only.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::Machine;
use crate::nbd::Serving;
use blockfork_tests::damage::{Damage, Scene};
use serde_json::json;
use std::fs;

const COUNT_INDEX: u8 = 4;
const CATALOG: u8 = 5;
const JOURNAL: u8 = 101;
const BLOCK: u64 = 4096;

/// A machine that knows a scene's pool as `p`, with one block zeroed.
fn known(scene: &Scene, block: u64) -> Machine {
    let machine = Machine::new();
    let device = scene.damaged(&[Damage::Zero { block }]);
    let bytes = device.with_bytes(|bytes| bytes.to_vec());
    fs::write(machine.pool_path(), bytes).expect("the pool");
    machine.ok(&["pool", "import", &machine.pool_path()]);
    machine
}

/// Compares all of a volume or snapshot over NBD with the scene; what the command said on stderr.
#[track_caller]
fn reads_as_ever(machine: &Machine, scene: &Scene, path: &str) -> String {
    let serving = Serving::start(machine, &[&format!("p/{path}")]);
    let mut client = serving.client();
    for (at, stamp) in (0..).zip(scene.content(path)) {
        let bytes = client.read(at * BLOCK, 4096).expect("it can be read");
        assert_eq!(bytes[..8], stamp.to_le_bytes(), "{path} block {at}");
    }
    let refused = client.write(0, &[7; 4096]).expect_err("it is read-only");
    assert_eq!(refused.raw_os_error(), Some(1), "{refused}");
    drop(client);
    let (code, said) = serving.end();
    assert_eq!(code, Some(0), "{said}");
    said
}

#[test]
fn volumes_without_an_index_of_counts_can_be_read_until_they_are_repaired() {
    for scene in [Scene::closed(), Scene::crashed()] {
        for block in scene.live_of(COUNT_INDEX) {
            let machine = known(&scene, block);
            let before = machine.pool_bytes();
            for path in ["a", "b", "c"] {
                let said = reads_as_ever(&machine, &scene, path);
                assert_eq!(said.lines().count(), 1, "{said}");
                assert!(said.contains("pool check p"), "{said}");
            }
            // Who asks for reading is not told.
            assert_eq!(reads_as_ever(&machine, &scene, "a@1"), "");
            let after = machine.pool_bytes();
            let differs = |block: &usize| {
                let range = block * 4096..(block + 1) * 4096;
                before[range.clone()] != after[range]
            };
            let changed: Vec<usize> = (0..before.len() / 4096).filter(differs).collect();
            // An attempt to open it for writing takes a new generation.
            assert_eq!(changed, [0, 8]);
            machine.is_left_alone("p");
            let words = ["pool", "check", "--repair", "--yes", "--json", "p"];
            let repaired = machine.json(&words);
            assert_eq!(repaired["after"]["damage"], json!([]));
            let serving = Serving::start(&machine, &["p/a"]);
            let mut client = serving.client();
            client.write(0, &[7; 4096]).expect("it can be written");
            drop(client);
            assert_eq!(serving.end(), (Some(0), String::new()));
            machine.ok(&["pool", "check", "p"]);
        }
    }
}

#[test]
fn a_daemon_says_that_it_only_reads_and_refuses_changes() {
    let scene = Scene::closed();
    let machine = known(&scene, scene.live_of(COUNT_INDEX)[0]);
    let daemon = machine.serve_pool("p");
    let status = machine.json(&["pool", "status", "--json", "p"]);
    assert_eq!(status["read_only"], json!(true));
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("open for reading"), "{warnings}");
    // The pool was closed: there is no ring that could be missing.
    assert!(!warnings.contains("ring"), "{warnings}");
    let shown = machine.ok(&["pool", "status", "p"]);
    assert!(shown.contains("served read-only"), "{shown}");
    for words in [
        &["create", "p/new", "--size", "1M"][..],
        &["snapshot", "p/a@new"],
        &["rm", "-r", "p/b"],
        &["rollback", "p/a@1"],
        &["resize", "p/a", "8M"],
        &["rename", "p/a", "p/z"],
    ] {
        let line = machine.refused_untouched(1, words);
        assert!(line.contains("read-only"), "{line}");
    }
    assert_eq!(machine.run(&["pool", "check", "p"]).code, 4);
    let log = fs::read_to_string(machine.path("serve.log")).expect("the log");
    assert!(log.contains("cannot be opened for writing"), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
    assert_eq!(daemon.terminate(), Some(0));
    assert!(!machine.path("run/p.sock").exists());
    machine.ok(&["pool", "check", "--repair", "--yes", "p"]);
    machine.ok(&["create", "p/new", "--size", "1M"]);
}

#[test]
fn what_may_lack_writes_is_withheld_and_snapshots_are_served() {
    let scene = Scene::crashed();
    let machine = known(&scene, scene.live_of(JOURNAL)[1]);
    for path in ["a@1", "b@1"] {
        reads_as_ever(&machine, &scene, path);
    }
    for path in ["p/a", "p/b", "p/c"] {
        let line = machine.refused(4, &["serve-nbd", path]);
        assert!(line.contains("acknowledged writes"), "{line}");
    }
}

#[test]
fn snapshots_of_a_volume_whose_name_is_lost_are_served() {
    let machine = Machine::new();
    let path = machine.pool_path();
    machine.ok(&["pool", "create", "p", &path, "--size", "64M"]);
    machine.ok(&["create", "p/v", "--size", "4M"]);
    let serving = Serving::start(&machine, &["p/v"]);
    serving.client().write(BLOCK, &[9; 4096]).expect("a write");
    assert_eq!(serving.end(), (Some(0), String::new()));
    for number in 0..20 {
        machine.ok(&["snapshot", &format!("p/v@s{number}")]);
    }
    let mut bytes = machine.pool_bytes();
    for page in bytes.chunks_exact_mut(4096) {
        // The first page of the catalog begins with the volume.
        if page.starts_with(b"BFpg") && page[40] == CATALOG && page[64] == 1 {
            page.fill(0);
        }
    }
    fs::write(&path, &bytes).expect("the pool");
    let serving = Serving::start(&machine, &["p/lost-1@s19"]);
    let found = serving.client().read(BLOCK, 4096).expect("it can be read");
    assert!(found.iter().all(|byte| *byte == 9));
    assert_eq!(serving.end().0, Some(0));
    machine.refused(4, &["serve-nbd", "p/lost-1"]);
}

#[test]
fn what_only_the_ring_of_a_killed_daemon_holds_waits_there_for_the_repair() {
    for exports in [false, true] {
        let machine = Machine::with_pool();
        machine.ok(&["create", "p0/v", "--size", "4M"]);
        let daemon = machine.serve();
        let serving = Serving::start(&machine, &["p0/v"]);
        serving.client().write(0, &[5; 4096]).expect("a write");
        daemon.kill();
        drop(serving);
        let mut bytes = machine.pool_bytes();
        for page in bytes.chunks_exact_mut(4096) {
            if page.starts_with(b"BFpg") && page[40] == COUNT_INDEX {
                page.fill(0);
            }
        }
        fs::write(machine.pool_path(), &bytes).expect("the pool");
        let reads = |text: &str| {
            let serving = Serving::start(&machine, &["p0/v"]);
            let found = serving.client().read(0, 4096).expect("it can be read");
            assert!(found.iter().all(|byte| *byte == 5), "{text}");
            assert_eq!(serving.end().0, Some(0), "{text}");
        };
        let ring = machine.path("run/p0.ring");
        reads("damaged");
        assert!(ring.exists());
        machine.is_left_alone("p0");
        if exports {
            let daemon = machine.serve();
            machine.refused(4, &["pool", "export", "p0"]);
            assert_eq!(daemon.ends(), Some(0));
            assert!(ring.exists());
        }
        machine.ok(&["pool", "check", "--repair", "--yes", "p0"]);
        assert!(!ring.exists());
        reads("repaired");
    }
}
