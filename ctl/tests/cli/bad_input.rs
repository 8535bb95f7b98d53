//! Bad input: one clear line, the documented exit code, and a pool that is as it was.

use crate::kit::{Machine, SUPERBLOCKS, flip, one_line, restate, said};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;

#[test]
fn what_is_not_there_is_named() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    for (words, name) in [
        (&["pool", "status", "p9"][..], "p9"),
        (&["pool", "check", "p9"], "p9"),
        (&["pool", "export", "p9"], "p9"),
        (&["pool", "grow", "p9", "1G"], "p9"),
        (&["pool", "destroy", "p9", "--force"], "p9"),
        (&["create", "p9/v", "--size", "1M"], "p9"),
        (&["attach", "p9/v"], "p9"),
        (&["detach", "p9/v"], "p9"),
        (&["recover", "p9"], "p9"),
        (&["serve", "p9"], "p9"),
        (&["stats", "p9"], "p9"),
        (&["list", "p9"], "p9"),
        (&["list", "p0/w"], "p0/w"),
        (&["list", "p0/v@s"], "p0/v@s"),
        (&["detach", "p0/v"], "p0/v"),
        (&["detach", "/dev/ublkb4242"], "/dev/ublkb4242"),
        (&["diff", "p0/v@s", "p0/v"], "v@s"),
    ] {
        let line = machine.refused_untouched(1, words);
        assert!(line.contains(name), "{words:?}: {line}");
    }
}

#[test]
fn a_change_of_what_is_not_there_is_refused() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let before = machine.json(&["list", "--json"]);
    for (words, name) in [
        (&["snapshot", "p0/w@s"][..], "w"),
        (&["snapshot", "p0/v@s", "p0/w@s"], "w"),
        (&["clone", "p0/v@s", "p0/w"], "v@s"),
        (&["rollback", "p0/v@s"], "v@s"),
        (&["resize", "p0/w", "2M"], "w"),
        (&["rename", "p0/w", "p0/x"], "w"),
        (&["rm", "p0/w"], "w"),
        (&["rm", "p0/v", "p0/v@s"], "v@s"),
        (&["rm", "-n", "p0/w"], "w"),
    ] {
        let line = machine.refused_untouched(1, words);
        assert!(line.contains(name), "{words:?}: {line}");
    }
    assert_eq!(machine.json(&["list", "--json"]), before);
}

#[test]
fn what_is_there_is_not_made_again() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    let other = machine.path("other.pool").display().to_string();
    for words in [
        &["pool", "create", "p0", &other, "--size", "64M"][..],
        &["pool", "create", "p1", &machine.pool_path()],
        &["pool", "create", "p1", &machine.pool_path(), "--force"],
        &["pool", "import", &machine.pool_path()],
        &["create", "p0/v", "--size", "1M"],
        &["snapshot", "p0/v@s"],
        &["clone", "p0/v@s", "p0/v"],
    ] {
        machine.refused_untouched(1, words);
    }
    assert!(!Path::new(&other).exists());
}

#[test]
fn names_that_cannot_be_are_usage_errors() {
    let machine = Machine::with_pool();
    let long = "x".repeat(128);
    for name in [
        "", "a/b", "a@b@c", "a b", "..", "a..b", "a\nb", "a\tb", "-a", "\u{e4}", &long,
    ] {
        let volume = format!("p0/{name}");
        let line = machine.refused_untouched(2, &["create", "--size", "1M", "--", &volume]);
        assert!(line.len() < 300, "{line}");
        machine.refused_untouched(2, &["snapshot", &format!("{volume}@s")]);
        machine.refused_untouched(2, &["snapshot", &format!("p0/v@{name}")]);
        machine.refused_untouched(2, &["rename", "p0/v", &volume]);
        let other = machine.path("other").display().to_string();
        machine.refused_untouched(2, &["pool", "create", "--size", "64M", "--", name, &other]);
        assert!(!Path::new(&other).exists());
    }
    for words in [
        &["create", "p0", "--size", "1M"][..],
        &["create", "p0/v@s", "--size", "1M"],
        &["snapshot", "p0/v"],
        &["rollback", "p0/v"],
        &["clone", "p0/v@s", "p1/w"],
        &["diff", "p0/v", "p0/v@s"],
        &["rename", "p0/v", "p1/v"],
        &["rename", "p0/v@s", "p0/w"],
        &["snapshot", "p0/v@s", "p1/v@s"],
        &["rm", "p0/v", "p1/v"],
    ] {
        machine.refused_untouched(2, words);
    }
}

#[test]
fn a_snapshot_that_is_named_twice_changes_nothing() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.refused_untouched(2, &["snapshot", "p0/v@s", "p0/v@s"]);
}

#[test]
fn a_word_of_any_length_is_refused_in_a_line_that_can_be_read() {
    let machine = Machine::with_pool();
    let line = machine.refused(2, &["pool", "list", &"x".repeat(100_000)]);
    assert!(line.len() < 2000, "{} bytes", line.len());
}

#[test]
fn sizes_that_cannot_be_are_usage_errors() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    for size in [
        "0",
        "0G",
        "",
        "x",
        "10GB",
        "-4096",
        "1.0000001K",
        "4097",
        "1000",
        "2P",
        "16E",
        "1e3",
    ] {
        machine.refused_untouched(2, &["create", "p0/w", &format!("--size={size}")]);
        machine.refused_untouched(2, &["resize", "--", "p0/v", size]);
    }
    // A sector of 512 allows what one of 4096 does not, and not less.
    machine.refused_untouched(2, &["create", "p0/w", "--size", "1536"]);
    machine.refused_untouched(
        2,
        &["create", "p0/w", "--size", "1000", "--sector-size", "512"],
    );
    machine.refused_untouched(
        2,
        &["create", "p0/w", "--size", "1M", "--sector-size", "1024"],
    );
    machine.ok(&["create", "p0/w", "--size", "1536", "--sector-size", "512"]);
    for size in ["1M", "4097K", "128P", "0"] {
        let path = machine.path("other").display().to_string();
        machine.refused(2, &["pool", "create", "p1", &path, "--size", size]);
        assert!(!Path::new(&path).exists(), "{size}");
    }
    machine.refused_untouched(2, &["pool", "grow", "p0", "1M"]);
    machine.refused_untouched(2, &["pool", "grow", "p0", "32M"]);
}

#[test]
fn a_smaller_size_needs_its_flag() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M"]);
    let before = machine.json(&["list", "--json"]);
    let line = machine.refused(2, &["resize", "p0/v", "4M"]);
    assert!(line.contains("--allow-shrink"), "{line}");
    assert_eq!(machine.json(&["list", "--json"]), before);
    machine.ok(&["resize", "p0/v", "4M", "--allow-shrink"]);
    assert_eq!(machine.json(&["list", "--json"])[0]["size_bytes"], 4 << 20);
}

#[test]
fn a_pool_that_is_open_elsewhere_is_refused() {
    let machine = Machine::with_pool();
    let file = File::open(machine.pool_path()).unwrap();
    file.lock().unwrap();
    let line = machine.refused_untouched(1, &["create", "p0/v", "--size", "1M"]);
    assert!(
        line.contains(&format!("process {}", std::process::id())),
        "{line}"
    );
    machine.refused_untouched(1, &["list", "p0"]);
    machine.refused_untouched(1, &["pool", "destroy", "p0", "--force"]);
}

#[test]
fn a_truncated_pool_is_corrupt() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let file = File::options()
        .write(true)
        .open(machine.pool_path())
        .unwrap();
    for bytes in [32 << 20, 4096, 0] {
        file.set_len(bytes).unwrap();
        machine.refused_untouched(4, &["pool", "status", "p0"]);
        machine.refused_untouched(4, &["create", "p0/w", "--size", "1M"]);
        machine.refused_untouched(4, &["pool", "check", &machine.pool_path()]);
    }
}

#[test]
fn what_is_no_pool_is_not_imported() {
    let machine = Machine::new();
    let path = machine.path("text");
    let shown = path.display().to_string();
    fs::write(&path, "not a pool\n".repeat(2_000_000)).unwrap();
    let before = fs::read(&path).unwrap();
    let line = machine.refused(1, &["pool", "import", &shown]);
    assert!(line.contains(&format!("{shown}: no pool here")), "{line}");
    machine.refused(1, &["pool", "check", &shown]);
    let line = machine.refused(1, &["pool", "create", "p0", &shown]);
    assert!(line.contains("holds data"), "{line}");
    assert!(before == fs::read(&path).unwrap());
    machine.refused(
        1,
        &[
            "pool",
            "import",
            &machine.path("missing").display().to_string(),
        ],
    );
    machine.refused(
        2,
        &["pool", "import", &machine.path("").display().to_string()],
    );
    assert_eq!(machine.ok(&["pool", "list", "-H"]), "");
}

#[test]
fn a_recognised_path_is_refused_without_force() {
    let machine = Machine::new();
    let path = machine.path("disk");
    let shown = path.display().to_string();
    let file = File::create(&path).unwrap();
    file.set_len(crate::kit::POOL_BYTES).unwrap();
    file.write_all_at(&[0x53, 0xef], 1080).unwrap();
    let before = fs::read(&path).unwrap();
    let line = machine.refused(1, &["pool", "create", "p0", &shown]);
    assert!(
        line.contains("an ext2/3/4 file system") && line.contains("--force"),
        "{line}"
    );
    assert!(before == fs::read(&path).unwrap());
    machine.ok(&["pool", "create", "p0", &shown, "--force"]);
    machine.ok(&["pool", "check", "p0"]);
    machine.ok(&["pool", "export", "p0"]);
    let line = machine.refused(1, &["pool", "create", "p0", &shown]);
    assert!(line.contains("a blockfork pool"), "{line}");
}

#[test]
fn one_damaged_superblock_is_reported_and_two_are_corrupt() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let path = machine.path("p0.pool");
    flip(&path, SUPERBLOCKS[0] + 40);
    assert_ne!(
        machine.json(&["pool", "status", "p0", "--json"])["warnings"],
        serde_json::json!([])
    );
    assert_eq!(machine.names(), ["p0/v"]);
    flip(&path, SUPERBLOCKS[1] + 40);
    machine.refused_untouched(4, &["pool", "status", "p0"]);
    machine.refused_untouched(4, &["create", "p0/w", "--size", "1M"]);
    machine.refused_untouched(4, &["pool", "check", "p0"]);
}

#[test]
fn a_pool_of_a_newer_version_is_refused_by_name() {
    let machine = Machine::with_pool();
    let path = machine.path("p0.pool");
    let bytes = machine.pool_bytes();
    // The version, then each word of features that must be known.
    for (at, value, word) in [
        (8, 99, "version 99"),
        (16, 1 << 5, "bit 5"),
        (24, 1 << 6, "bit 6"),
    ] {
        fs::write(&path, &bytes).unwrap();
        restate(&path, at, &u32::to_le_bytes(value));
        for words in [
            &["pool", "status", "p0"][..],
            &["create", "p0/v", "--size", "1M"],
            &["pool", "check", "p0"],
        ] {
            let line = machine.refused_untouched(1, words);
            assert!(
                line.contains(word) && line.contains(&machine.pool_path()),
                "{line}"
            );
        }
    }
}

#[test]
fn no_permission_is_said_in_one_line() {
    let machine = Machine::with_pool();
    let open =
        |mode| fs::set_permissions(machine.path(""), fs::Permissions::from_mode(mode)).unwrap();
    open(0o755);
    let mut command = machine.command(&["pool", "status", "p0"]);
    // Only root can become somebody else; as anybody else the state directory is taken away.
    if nix::unistd::getuid().is_root() {
        command.uid(65_534);
    } else {
        fs::set_permissions(machine.path("state"), fs::Permissions::from_mode(0o000)).unwrap();
    }
    match command.output() {
        Ok(output) => {
            let line = one_line(&said(&output), 1, &["pool", "status", "p0"]);
            assert!(line.contains("ermission denied"), "{line}");
        }
        // The binary itself is out of reach for others on this machine.
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::PermissionDenied),
    }
    if !nix::unistd::getuid().is_root() {
        fs::set_permissions(machine.path("state"), fs::Permissions::from_mode(0o700)).unwrap();
    }
}

#[test]
fn without_a_driver_nothing_is_started() {
    if Path::new("/dev/ublk-control").exists() {
        return;
    }
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    let line = machine.refused_untouched(1, &["attach", "p0/v"]);
    assert!(line.contains("modprobe ublk_drv"), "{line}");
    assert!(!machine.path("run/p0.log").exists());
    assert_eq!(machine.run(&["doctor"]).code, 1);
}

#[test]
fn a_volume_with_snapshots_is_not_removed_by_accident() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    let line = machine.refused(1, &["rm", "p0/v"]);
    assert!(line.contains("v@s") || line.contains("snapshot"), "{line}");
    assert_eq!(machine.names(), ["p0/v", "p0/v@s"]);
}

#[test]
fn a_command_that_nobody_knows_is_one_line() {
    let machine = Machine::new();
    for words in [
        &["frobnicate"][..],
        &["create"],
        &["create", "p0/v"],
        &["pool", "destroy", "p0"],
        &["attach", "p0/v", "--depth", "0"],
        &["attach", "p0/v", "--queues", "many"],
        &["detach"],
        &["list", "-o", "colour"],
        &["list", "--json", "-H"],
        &["rm", "--no\nsuch"],
    ] {
        machine.refused(2, words);
    }
}
