//! `pool check --repair` as its users see it: it says what it will do, asks, does it, and names what it cannot mend.

#![expect(clippy::expect_used, reason = "they are a test's assertions")]

use crate::kit::{Machine, one_line, recount, reseal, said};
use blockfork_tests::damage::{Damage, Scene};
use blockfork_tests::sim_device::SimDevice;
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

const MAP: u8 = 1;
const COUNTS: u8 = 2;
const COUNT_INDEX: u8 = 4;
const CATALOG: u8 = 5;
const SUPERBLOCK: u8 = 100;
const JOURNAL: u8 = 101;

/// A machine that knows the damaged pool of a scene as `p`.
fn machine(scene: &Scene, damages: &[Damage]) -> Machine {
    let machine = Machine::new();
    let bytes = scene.damaged(damages).with_bytes(|bytes| bytes.to_vec());
    fs::write(machine.pool_path(), bytes).expect("the pool");
    machine.ok(&["pool", "import", &machine.pool_path()]);
    machine
}

fn zero(block: u64) -> Damage {
    Damage::Zero { block }
}

/// Whether the pool holds all data of the scene, and a check by the engine finds nothing.
fn is_whole(machine: &Machine, scene: &Scene) -> bool {
    let bytes = machine.pool_bytes();
    let device = SimDevice::new(bytes.len() as u64 / 4096);
    device.with_bytes(|now| now.copy_from_slice(&bytes));
    scene.is_whole(&device).expect("the pool opens")
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// `VOLUME` or `VOLUME@SNAPSHOT`, from its JSON.
fn shown(path: &Value) -> String {
    let name = |key: &str| path[key].as_str().map(str::to_owned);
    let volume = name("volume").expect("a volume");
    name("snapshot").map_or(volume.clone(), |snapshot| format!("{volume}@{snapshot}"))
}

/// A second repair finds nothing and writes nothing.
#[track_caller]
fn is_mended(machine: &Machine) {
    let before = machine.pool_bytes();
    let text = machine.ok(&["pool", "check", "--repair", "p"]);
    assert!(text.starts_with("nothing to repair\n"), "{text}");
    assert!(text.contains("clean"), "{text}");
    assert!(before == machine.pool_bytes(), "it changed the pool");
    machine.ok(&["pool", "check", "p"]);
}

#[test]
fn a_whole_pool_needs_no_repair_and_no_consent() {
    for scene in [Scene::closed(), Scene::crashed()] {
        let machine = machine(&scene, &[]);
        let before = machine.pool_bytes();
        machine.ok(&["pool", "check", "--repair", "-n", "p"]);
        is_mended(&machine);
        let repaired = machine.json(&["pool", "check", "--repair", "--json", "p"]);
        assert_eq!(repaired["steps"], json!([]));
        assert_eq!(repaired["done"], json!(false));
        assert_eq!(repaired["after"]["damage"], json!([]));
        let looked = machine.json(&["pool", "check", "--repair", "-n", "--json", "p"]);
        assert_eq!(looked, json!({"steps": [], "done": false, "after": null}));
        assert!(before == machine.pool_bytes(), "it changed the pool");
    }
}

#[test]
fn every_kind_of_damage_that_needs_no_guessing_is_mended() {
    for scene in [Scene::closed(), Scene::crashed()] {
        let mut blocks = scene.live_of(SUPERBLOCK);
        blocks.extend(scene.live_of(COUNTS));
        blocks.extend(scene.live_of(COUNT_INDEX));
        assert!(blocks.len() > 5, "{blocks:?}");
        for block in blocks {
            let machine = machine(&scene, &[zero(block)]);
            let found = machine.run(&["pool", "check", "p"]);
            assert_eq!(found.code, 4, "block {block}: {found:?}");
            let before = machine.pool_bytes();
            let planned = machine.run(&["pool", "check", "--repair", "-n", "--json", "p"]);
            assert_eq!(planned.code, 4, "{planned:?}");
            assert!(before == machine.pool_bytes(), "a dry run changed the pool");
            let done = machine.run(&["pool", "check", "--repair", "--yes", "--json", "p"]);
            assert_eq!(done.code, 0, "block {block}: {done:?}");
            let (planned, done) = (parsed(&planned.stdout), parsed(&done.stdout));
            assert_eq!(planned["after"], json!(null));
            assert_eq!(
                (&planned["done"], &done["done"]),
                (&json!(false), &json!(true))
            );
            assert_eq!(planned["steps"], done["steps"]);
            for step in done["steps"].as_array().expect("steps") {
                assert_eq!(step["mends"], json!(true));
                for key in ["what", "place", "action"] {
                    assert!(step[key].as_str().is_some_and(|text| !text.is_empty()));
                }
            }
            assert_eq!(done["after"]["damage"], json!([]));
            is_mended(&machine);
            assert!(is_whole(&machine, &scene), "block {block}");
        }
    }
}

#[test]
fn lost_blocks_are_given_back() {
    let scene = Scene::closed();
    let machine = machine(&scene, &[]);
    let free = machine.json(&["pool", "status", "--json", "p"])["free_bytes"].clone();
    // Blocks that nothing names, at the pool's end.
    for block in [4000, 4001, 4002] {
        assert_eq!(recount(&machine, block, 1), 1);
    }
    let found = machine.run(&["pool", "check", "--json", "p"]);
    assert_eq!(found.code, 5, "{found:?}");
    assert_eq!(parsed(&found.stdout)["leaked_blocks"], 3);
    let dry = machine.run(&["pool", "check", "--repair", "-n", "p"]);
    assert_eq!(dry.code, 4, "{dry:?}");
    assert!(dry.stdout.contains("give them back"), "{dry:?}");
    let done = machine.ok(&["pool", "check", "--repair", "-y", "p"]);
    assert!(
        done.contains("3 blocks") && done.contains("clean"),
        "{done}"
    );
    is_mended(&machine);
    assert_eq!(
        machine.json(&["pool", "status", "--json", "p"])["free_bytes"],
        free
    );
    assert!(is_whole(&machine, &scene));
}

#[test]
fn counts_that_are_too_low_are_counted_again() {
    let scene = Scene::closed();
    let machine = machine(&scene, &[]);
    let mut counts = Vec::new();
    for page in scene.live_of(MAP) {
        counts.push(recount(&machine, page, -1));
        let found = machine.run(&["pool", "check", "p"]);
        assert_eq!(found.code, 4, "{found:?}");
        let done = machine.ok(&["pool", "check", "--repair", "-y", "p"]);
        assert!(done.contains("counted too low"), "{done}");
        is_mended(&machine);
        assert!(is_whole(&machine, &scene));
    }
    // Free blocks that are none, and shared ones that look like somebody's own.
    assert!(counts.contains(&0) && counts.contains(&1), "{counts:?}");
}

#[test]
fn nobody_on_the_terminal_means_nothing_is_changed() {
    let scene = Scene::closed();
    let machine = machine(&scene, &[zero(8)]);
    let before = machine.pool_bytes();
    let asked = machine.run(&["pool", "check", "--repair", "p"]);
    assert_eq!(asked.code, 2, "{asked:?}");
    assert!(asked.stdout.contains("write it again"), "{asked:?}");
    assert!(asked.stderr.contains("--yes"), "{asked:?}");
    assert!(before == machine.pool_bytes(), "it changed the pool");
    machine.refused_untouched(2, &["pool", "check", "--repair", "--json", "p"]);
    // What belongs to a repair is nothing without one.
    machine.refused_untouched(2, &["pool", "check", "--yes", "p"]);
    machine.refused_untouched(2, &["pool", "check", "--dry-run", "p"]);
    machine.refused_untouched(2, &["pool", "check", "--discard-journal", "p"]);
    machine.refused(1, &["pool", "check", "--repair", "--yes", "q"]);
}

/// A terminal: the side of the person, the side of the program.
fn terminal() -> (File, OwnedFd) {
    let person = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).expect("a terminal");
    grantpt(&person).expect("a terminal");
    unlockpt(&person).expect("a terminal");
    let name = ptsname_r(&person).expect("its name");
    let program = File::options().read(true).write(true).open(name);
    let person = OwnedFd::from(person);
    (person.into(), program.expect("its other side").into())
}

#[test]
fn a_person_sees_the_plan_before_the_question() {
    let scene = Scene::closed();
    let machine = machine(&scene, &[zero(8)]);
    let before = machine.pool_bytes();
    for (answer, code) in [("n\n", 2), ("\n", 2), ("yes please\n", 2), ("y\n", 0)] {
        let (mut person, program) = terminal();
        let shown = program.try_clone().expect("a descriptor");
        let mut command = machine.command(&["pool", "check", "--repair", "p"]);
        command.stdin(program);
        command.stdout(shown.try_clone().expect("a descriptor"));
        command.stderr(shown);
        let mut child = command.spawn().expect("ublkctl starts");
        drop(command);
        let mut text = String::new();
        while !text.contains("[y/N] ") {
            let mut bytes = [0; 4096];
            let count = person.read(&mut bytes).expect("a question");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        assert!(
            before == machine.pool_bytes(),
            "it did not wait for an answer"
        );
        let (plan, question) = text.split_once("Repair it?").expect("a question");
        assert!(plan.contains("write it again"), "{plan}{question}");
        person.write_all(answer.as_bytes()).expect("an answer");
        // The terminal ends when the program has let go of it.
        let mut rest = [0; 4096];
        while person.read(&mut rest).is_ok_and(|count| count > 0) {}
        let status = child.wait().expect("it ends");
        assert_eq!(status.code(), Some(code), "{answer:?}");
        assert_eq!(before == machine.pool_bytes(), code != 0, "{answer:?}");
    }
    is_mended(&machine);
}

#[test]
fn a_program_is_not_asked() {
    let scene = Scene::closed();
    let machine = machine(&scene, &[zero(8)]);
    let before = machine.pool_bytes();
    let (_person, program) = terminal();
    let words = ["pool", "check", "--repair", "--json", "p"];
    let mut command = machine.command(&words);
    let output = command.stdin(program).output().expect("ublkctl starts");
    let line = one_line(&said(&output), 2, &words);
    assert!(line.contains("--yes"), "{line}");
    assert!(before == machine.pool_bytes(), "it changed the pool");
}

#[test]
fn a_served_pool_is_not_repaired() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let daemon = machine.serve();
    for words in [
        &["pool", "check", "--repair", "--yes", "p0"][..],
        &["pool", "check", "--repair", "--dry-run", "p0"],
        &["pool", "check", "--repair", "--yes", &machine.pool_path()],
    ] {
        let line = machine.refused_untouched(1, words);
        assert!(line.contains("a daemon serves it"), "{line}");
    }
    // Nor by somebody who does not know that it is a known pool.
    let stranger = Machine::new();
    stranger.refused(
        1,
        &["pool", "check", "--repair", "--yes", &machine.pool_path()],
    );
    assert_eq!(daemon.terminate(), Some(0));
    machine.ok(&["pool", "check", "--repair", "--yes", "p0"]);
}

#[test]
fn without_a_superblock_nothing_is_tried() {
    let scene = Scene::closed();
    let machine = Machine::new();
    let bytes = scene.damaged(&[zero(0), Damage::Flip { block: 8, bit: 999 }]);
    fs::write(
        machine.pool_path(),
        bytes.with_bytes(|bytes| bytes.to_vec()),
    )
    .expect("the pool");
    let words = ["pool", "check", "--repair", "--yes", &machine.pool_path()];
    machine.refused_untouched(4, &words);
}

#[test]
fn a_lost_map_page_is_named_and_the_other_volumes_stay() {
    let scene = Scene::closed();
    for block in scene.live_of(MAP) {
        let machine = machine(&scene, &[zero(block)]);
        let done = machine.run(&["pool", "check", "--repair", "--yes", "--json", "p"]);
        assert_eq!(done.code, 4, "{done:?}");
        let done = parsed(&done.stdout);
        let named = done["after"]["unreadable"].as_array().expect("volumes");
        let lost: Vec<String> = named.iter().map(|lost| shown(&lost["path"])).collect();
        assert!(!lost.is_empty(), "{done}");
        let steps = done["steps"].as_array().expect("steps");
        for path in &lost {
            let of_it = steps.iter().find(|step| step["place"] == *path);
            assert_eq!(of_it.expect("a step")["mends"], json!(false));
        }
        let text = machine.run(&["pool", "check", "p"]);
        assert_eq!(text.code, 4, "{text:?}");
        // The rest takes changes; what is lost can be removed, and then everything is well again.
        machine.ok(&["create", "p/new", "--size", "1M"]);
        let lost: Vec<String> = lost.iter().map(|path| format!("p/{path}")).collect();
        let mut words = vec!["rm", "-r"];
        words.extend(lost.iter().map(String::as_str));
        machine.ok(&words);
        let done = machine.run(&["pool", "check", "--repair", "--yes", "p"]);
        assert_eq!(done.code, 0, "{done:?}");
        is_mended(&machine);
    }
}

#[test]
fn a_lost_catalog_page_leaves_its_snapshots_under_a_name_that_says_so() {
    let machine = Machine::new();
    let path = machine.pool_path();
    machine.ok(&["pool", "create", "p", &path, "--size", "64M"]);
    machine.ok(&["create", "p/v", "--size", "4M"]);
    // A catalog page has 15 slots: the volume's is in the first, some of its snapshots' in the second.
    let snapshots: Vec<String> = (0..20).map(|number| format!("p/v@s{number}")).collect();
    for snapshot in &snapshots {
        machine.ok(&["snapshot", snapshot]);
    }
    let mut bytes = machine.pool_bytes();
    let pages = bytes.chunks_exact_mut(4096);
    let has_volume =
        |page: &&mut [u8]| page.starts_with(b"BFpg") && page[40] == CATALOG && page[64] == 1;
    let mut zeroed = 0;
    for page in pages.filter(has_volume) {
        page.fill(0);
        zeroed += 1;
    }
    assert!(zeroed > 0, "no catalog page");
    fs::write(&path, &bytes).expect("the pool");
    let done = machine.run(&["pool", "check", "--repair", "--yes", "--json", "p"]);
    assert_eq!(done.code, 4, "{done:?}");
    let done = parsed(&done.stdout);
    assert_eq!(done["done"], json!(false));
    assert_eq!(done["steps"][0]["mends"], json!(false));
    assert!(
        done["steps"][0]["place"]
            .as_str()
            .expect("text")
            .contains("15 slots"),
        "{done}"
    );
    assert!(bytes == machine.pool_bytes(), "it changed the pool");
    // Number 1 is the volume's; what it was called is gone.
    let names = machine.ok(&["list", "-H", "-o", "name", "p"]);
    let names: Vec<&str> = names.lines().collect();
    assert_eq!(names[0], "p/lost-1");
    assert_eq!(names.len(), 1 + 6, "{names:?}");
    for name in &snapshots[14..] {
        let name = name.replace("p/v@", "p/lost-1@");
        assert!(names.contains(&name.as_str()), "{names:?}");
    }
    machine.refused(4, &["create", "p/w", "--size", "1M"]);
    assert!(
        machine
            .ok(&["diff", "-H", "p/lost-1@s15", "p/lost-1@s16"])
            .is_empty()
    );
}

#[test]
fn a_lost_journal_block_is_given_up_only_when_asked() {
    let scene = Scene::crashed();
    let block = scene.live_of(JOURNAL)[1];
    let machine = machine(&scene, &[zero(block)]);
    let before = machine.pool_bytes();
    let left = machine.run(&["pool", "check", "--repair", "--yes", "--json", "p"]);
    assert_eq!(left.code, 4, "{left:?}");
    let named = parsed(&left.stdout)["after"]["unreadable"].clone();
    let named: Vec<String> = (named.as_array().expect("volumes").iter())
        .map(|lost| shown(&lost["path"]))
        .collect();
    assert_eq!(named, ["a", "b", "c"]);
    assert!(before == machine.pool_bytes(), "it changed the pool");
    let words = ["pool", "check", "--repair", "--discard-journal", "p"];
    let asked = machine.run(&words);
    assert_eq!(asked.code, 2, "{asked:?}");
    assert!(asked.stdout.contains("given up"), "{asked:?}");
    assert!(before == machine.pool_bytes(), "it changed the pool");
    let mut words = words.to_vec();
    words.push("--yes");
    machine.ok(&words);
    is_mended(&machine);
    machine.ok(&["create", "p/new", "--size", "1M"]);
}

#[test]
fn a_page_that_is_sealed_again_is_still_the_same_page() {
    // The control of this file's own tool: a page that is only sealed again is not damage.
    let scene = Scene::closed();
    let machine = machine(&scene, &[]);
    let mut bytes = machine.pool_bytes();
    for block in scene.live_of(COUNTS) {
        let at = usize::try_from(block).expect("a small pool") * 4096;
        reseal(&mut bytes[at..at + 4096]);
    }
    assert!(bytes == machine.pool_bytes());
}
