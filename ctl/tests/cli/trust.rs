//! Whom a command believes: files and daemons that only root or its own user can have put there, and a daemon of the very
//! pool that is meant.

use crate::kit::{Daemon, Machine, one_line, said};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// Somebody else.
const STRANGER: u32 = 65_534;

fn is_root() -> bool {
    nix::unistd::getuid().is_root()
}

/// A command with the state directory of another user of the same runtime directory.
fn elsewhere(machine: &Machine, words: &[&str]) -> Command {
    let mut command = machine.command(words);
    command.env("UBLKCTL_STATE_DIR", machine.path("other-state"));
    command
}

#[test]
fn a_command_reaches_its_own_pool_and_no_other_of_that_name() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/precious", "--size", "1M"]);
    let other = machine.path("other.pool").display().to_string();
    for words in [
        &["pool", "create", "p0", &other, "--size", "64M"][..],
        &["create", "p0/precious", "--size", "1M"],
    ] {
        let made = said(&elsewhere(&machine, words).output().expect("ublkctl starts"));
        assert_eq!(made.code, 0, "{made:?}");
    }
    let daemon = machine.serve();
    let ring = fs::read(machine.path("run/p0.ring")).expect("the ring");
    let socket = machine.socket().display().to_string();
    for words in [
        &["rm", "p0/precious"][..],
        &["list", "p0"],
        &["watch", "p0"],
        &["serve-nbd", "p0/precious"],
        &["pool", "status", "p0"],
        &["pool", "export", "--force", "p0"],
        &["pool", "destroy", "--force", "p0"],
        &["pool", "check", "--repair", "--yes", "p0"],
    ] {
        let refused = said(&elsewhere(&machine, words).output().expect("ublkctl starts"));
        let line = one_line(&refused, 1, words);
        assert!(line.contains(&socket), "{line}");
        assert!(line.contains("UBLKCTL_RUNTIME_DIR"), "{line}");
    }
    // Nor does its daemon take the place of the one that runs, or its ring.
    let output = elsewhere(&machine, &["serve", "p0"])
        .output()
        .expect("ublkctl starts");
    let refused = said(&output);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains(&socket), "{refused:?}");
    assert!(ring == fs::read(machine.path("run/p0.ring")).expect("the ring"));
    assert_eq!(machine.names(), ["p0/precious"]);
    assert_eq!(daemon.terminate(), Some(0));
    let listed = said(
        &elsewhere(&machine, &["list", "-H", "-o", "name"])
            .output()
            .expect("ublkctl starts"),
    );
    assert_eq!(listed.stdout, "p0/precious\n");
}

/// What a command must not do where others can write.
#[track_caller]
fn refuses_everything(machine: &Machine, folder: &str, fact: &str) {
    let shown = machine.path(folder).display().to_string();
    for words in [
        &["list", "p0"][..],
        &["pool", "status", "p0"],
        &["create", "p0/w", "--size", "1M"],
        &["serve-nbd", "p0/v"],
        &["pool", "export", "--force", "p0"],
        &["pool", "destroy", "--force", "p0"],
        &["detach", "--all"],
        &["recover", "p0"],
    ] {
        // Where no pool has a device, nothing is looked up in the registry.
        if folder != "run" && words[0] == "detach" {
            continue;
        }
        let line = machine.refused_untouched(1, words);
        assert!(
            line.contains(&shown) && line.contains(fact),
            "{words:?}: {line}"
        );
    }
    let served = machine.run(&["serve", "p0"]);
    assert_eq!(served.code, 1, "{served:?}");
    assert!(served.stderr.contains(fact), "{served:?}");
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.serve().terminate();
    for folder in ["run", "state", "state/pools"] {
        for mode in [0o777, 0o1777, 0o770, 0o722] {
            let set =
                |mode| fs::set_permissions(machine.path(folder), fs::Permissions::from_mode(mode));
            set(mode).expect("its mode");
            refuses_everything(&machine, folder, "chmod go-w");
            set(0o755).expect("its mode");
        }
    }
    assert_eq!(machine.names(), ["p0/v"]);
}

#[test]
fn a_directory_of_another_user_is_refused() {
    if !is_root() {
        return;
    }
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.serve().terminate();
    for folder in ["run", "state", "state/pools"] {
        chown(machine.path(folder), Some(STRANGER), None).expect("its owner");
        refuses_everything(&machine, folder, "belongs to user 65534");
        chown(machine.path(folder), Some(0), None).expect("its owner");
    }
    // A link of another user leads wherever that user likes.
    fs::rename(machine.path("run"), machine.path("real")).expect("a rename");
    symlink(machine.path("real"), machine.path("run")).expect("a link");
    assert_eq!(machine.names(), ["p0/v"]);
    lchown(machine.path("run"), Some(STRANGER), None).expect("its owner");
    refuses_everything(&machine, "run", "belongs to user 65534");
}

#[test]
fn no_link_is_followed_in_place_of_a_runtime_file() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    machine.serve().terminate();
    let victim = machine.path("victim");
    let content = "something long enough to be cut\n".repeat(40_000);
    for (file, command) in [
        ("p0.log", &["serve-nbd", "p0/v"][..]),
        ("p0.start", &["serve-nbd", "p0/v"]),
        ("p0.devices.json", &["list", "p0"]),
    ] {
        let link = machine.path("run").join(file);
        fs::write(&victim, &content).expect("a file");
        if link.exists() {
            fs::remove_file(&link).expect("the file");
        }
        symlink(&victim, &link).expect("a link");
        let failed = machine.run(command);
        assert_ne!(failed.code, 0, "{file}: {failed:?}");
        assert!(
            failed.stderr.contains(&link.display().to_string()),
            "{file}: {failed:?}"
        );
        assert!(
            content == fs::read_to_string(&victim).expect("the file"),
            "{file}"
        );
        fs::remove_file(&link).expect("the link");
    }
    // What is replaced by a rename takes the place of the link.
    symlink(&victim, machine.path("run/p0.pid")).expect("a link");
    let daemon: Daemon = machine.serve();
    assert!(content == fs::read_to_string(&victim).expect("the file"));
    assert_eq!(daemon.terminate(), Some(0));
}

#[test]
fn a_daemon_of_another_user_is_not_believed() {
    // Only root can become somebody else.
    if !is_root() {
        return;
    }
    let machine = Machine::with_pool();
    machine.serve().terminate();
    let id = machine.json(&["pool", "list", "--json"])[0]["id"].clone();
    let script = format!(
        r#"use Socket; $| = 1;
        socket(S, AF_UNIX, SOCK_STREAM, 0) or die $!;
        bind(S, pack_sockaddr_un($ARGV[0])) or die $!;
        $> = {STRANGER}; listen(S, 8) or die $!; $> = 0;
        print "ready\n";
        while (accept(C, S)) {{
            syswrite(C, "{{\"hello\":{{\"version\":2,\"pool\":\"p0\",\"id\":$ARGV[1],\"pid\":1}}}}\n");
            sysread(C, $b, 4096); syswrite(C, "{{\"reply\":\"done\"}}\n"); close(C);
        }}"#
    );
    let mut stranger = Command::new("perl")
        .args(["-e", &script, "--"])
        .arg(machine.socket())
        .arg(id.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("perl starts");
    let mut line = String::new();
    let out = stranger.stdout.take().expect("its stdout");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
    assert_eq!(line, "ready\n");
    let refused = machine.run(&["create", "p0/v", "--size", "1M"]);
    stranger.kill().expect("it can be killed");
    stranger.wait().expect("it ends");
    let line = one_line(&refused, 1, &["create"]);
    assert!(line.contains("of user 65534 listens there"), "{line}");
    assert!(Path::new(&machine.socket()).exists());
    machine.ok(&["create", "p0/v", "--size", "1M"]);
}
