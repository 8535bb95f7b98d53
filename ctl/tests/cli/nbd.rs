//! Volumes over NBD, as other people's programs see them (libnbd, qemu, fio), and as a client sees them that behaves
//! worse than those.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "they are a test's assertions"
)]

use crate::kit::{Machine, one_line, said};
use blockfork_tests::nbd::{self, Ask, Client};
use blockfork_tests::nbd_kill::{self, Plan};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A running `serve-nbd`, which dies with its test.
pub(crate) struct Serving {
    child: Child,
    uri: String,
    socket: PathBuf,
}

impl Serving {
    #[track_caller]
    pub(crate) fn start(machine: &Machine, words: &[&str]) -> Self {
        let mut command = machine.command(&["serve-nbd"]);
        command.args(words);
        Self::start_by(command)
    }

    /// Starts it with this command.
    #[track_caller]
    pub(crate) fn start_by(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ublkctl starts");
        let mut uri = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut uri).expect("a line");
        let uri = uri.trim_end().to_owned();
        if uri.is_empty() {
            let output = child.wait_with_output().expect("it ends");
            panic!("{command:?}: {:?}", said(&output));
        }
        let socket = uri.split_once("?socket=").map(|(_, path)| path.into());
        Self {
            child,
            uri,
            socket: socket.unwrap_or_default(),
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.socket).expect("an NBD server")
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        run("kill", &[signal, &pid]);
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as ^C does; its exit code and what it said.
    pub(crate) fn end(self) -> (Option<i32>, String) {
        self.end_by("-INT")
    }

    /// Ends it with this signal.
    pub(crate) fn end_by(self, signal: &str) -> (Option<i32>, String) {
        self.signal(signal);
        self.ends()
    }

    /// Waits until it ends by itself.
    fn ends(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().expect("it ends");
        let mut text = String::new();
        let stderr = self.child.stderr.as_mut().expect("a pipe");
        stderr.read_to_string(&mut text).expect("text");
        (status.code(), text)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().expect("it can be killed");
            self.child.wait().expect("it ends");
        }
    }
}

/// Runs a program that must succeed; its stdout.
#[track_caller]
fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; `cargo x setup` installs it"));
    let said = said(&output);
    assert_eq!(said.code, 0, "{program} {}: {said:?}", words.join(" "));
    said.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of a test")
}

/// A machine with the pool `p0` and an empty volume `v` of 8 MiB.
fn machine() -> Machine {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M"]);
    machine
}

/// A file of so many bytes: noise, with a hole in the middle.
fn image(machine: &Machine, bytes: u64) -> PathBuf {
    let mut content = vec![0; usize::try_from(bytes).expect("a small image")];
    let mut state = 1_u64;
    for (at, byte) in content.iter_mut().enumerate() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        if !(1 << 20..2 << 20).contains(&at) {
            *byte = state.to_le_bytes()[7];
        }
    }
    let path = machine.path("image");
    fs::write(&path, content).expect("the image");
    path
}

#[test]
fn an_export_says_what_it_is() {
    let machine = machine();
    machine.ok(&["create", "p0/small", "--size", "1M", "--sector-size", "512"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    let about = |serving: &Serving| -> Value {
        let text = run("nbdinfo", &["--json", &serving.uri]);
        let about: Value = serde_json::from_str(&text).expect("JSON");
        about["exports"][0].clone()
    };
    let serving = Serving::start(&machine, &["p0/v"]);
    let export = about(&serving);
    assert_eq!(export["export-name"], "p0/v");
    assert_eq!(export["export-size"], 8 * MIB);
    assert_eq!(export["contexts"][0], "base:allocation");
    for able in [
        "flush",
        "fua",
        "trim",
        "zero",
        "fast_zero",
        "df",
        "multi_conn",
    ] {
        assert_eq!(export[format!("can_{able}")], true, "{able}: {export}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 4096);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let default = format!("nbd+unix:///?socket={}", text(&serving.socket));
    assert!(run("nbdinfo", &["--list", &default]).contains("\"p0/v\""));
    assert_eq!(
        run("nbdinfo", &["--size", &default]).trim(),
        (8 * MIB).to_string()
    );
    let snapshot = Serving::start(&machine, &["p0/v@s"]);
    let export = about(&snapshot);
    assert_eq!(
        (&export["is_read_only"], &export["can_trim"]),
        (&true.into(), &false.into())
    );
    let small = Serving::start(&machine, &["p0/small", "--read-only"]);
    let export = about(&small);
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["is_read_only"], true);
}

#[test]
fn what_is_copied_in_comes_out_again() {
    let machine = machine();
    let image = image(&machine, 8 * MIB);
    let serving = Serving::start(&machine, &["p0/v"]);
    let (uri, image) = (serving.uri.as_str(), text(&image));
    let copy = machine.path("copy");
    let copy = text(&copy);
    run("nbdcopy", &["--connections=4", "--flush", image, uri]);
    run("nbdcopy", &["--connections=4", uri, copy]);
    assert!(fs::read(image).unwrap() == fs::read(copy).unwrap());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", image, uri],
    );
    // A hole in the source stays one.
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", uri]);
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let holes: Vec<_> = (map.as_array().expect("a list").iter())
        .filter(|run| run["data"] == false)
        .map(|run| (run["start"].as_u64(), run["length"].as_u64()))
        .collect();
    assert_eq!(holes, [(Some(MIB), Some(MIB))]);
    let qcow2 = machine.path("copy.qcow2");
    let qcow2 = text(&qcow2);
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", uri, qcow2],
    );
    machine.ok(&["create", "p0/w", "--size", "8M"]);
    let other = Serving::start(&machine, &["p0/w"]);
    let convert = ["convert", "-n", "-f", "qcow2", "-O", "raw", "-W", "-m", "8"];
    run("qemu-img", &[&convert[..], &[qcow2, &other.uri]].concat());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", uri, &other.uri],
    );
}

#[test]
fn what_is_allocated_is_told_to_the_block() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut client = serving.client();
    let mut expected = vec![false; 2048];
    let mut set = |from: usize, to: usize, is_mapped: bool| {
        expected[from..to].fill(is_mapped);
    };
    client.write(4096, &[1; 8192]).unwrap();
    set(1, 3, true);
    client.write(500 * 4096, &vec![2; 100 * 4096]).unwrap();
    set(500, 600, true);
    client.change(nbd::TRIM, 510 * 4096, 4096).unwrap();
    set(510, 511, false);
    client.change(nbd::WRITE_ZEROES, 520 * 4096, 4096).unwrap();
    set(520, 521, false);
    let kept = client.call(nbd::WRITE_ZEROES, nbd::NO_HOLE, 2047 * 4096, 4096, &[]);
    assert_eq!(kept.unwrap().errno, 0);
    set(2047, 2048, true);
    let mut told = Vec::new();
    while told.len() < 2048 {
        let offset = told.len() as u64 * 4096;
        let rest = u32::try_from(8 * MIB - offset).unwrap();
        let reply = client
            .call(nbd::BLOCK_STATUS, 0, offset, rest, &[])
            .unwrap();
        assert!(!reply.status.is_empty());
        for (bytes, flags) in reply.status {
            assert!(bytes % 4096 == 0 && [0, 3].contains(&flags));
            told.extend(std::iter::repeat_n(flags == 0, bytes as usize / 4096));
        }
    }
    assert!(told == expected);
    // One run is one run, and none is longer than what was asked for.
    let one = client
        .call(nbd::BLOCK_STATUS, 1 << 3, 4096, 4096, &[])
        .unwrap();
    assert_eq!(one.status, [(4096, 0)]);
    assert_eq!(client.read(2047 * 4096, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.read(520 * 4096, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.read(521 * 4096, 4096).unwrap(), [2; 4096]);
}

#[test]
fn qemu_finds_every_pattern_it_wrote() {
    let machine = machine();
    machine.ok(&["create", "p0/small", "--size", "8M", "--sector-size", "512"]);
    for volume in ["p0/v", "p0/small"] {
        let serving = Serving::start(&machine, &[volume]);
        let mut words = vec!["-f", "raw", "-n"];
        for command in [
            "write -P 0x11 0 1M",
            "write -P 0x22 513k 3k",
            "write -f -P 0x33 1536 512",
            "aio_write -P 0x44 2M 64k",
            "aio_flush",
            "write -z 64k 64k",
            "write -z -u 192k 64k",
            "discard 320k 64k",
            "flush",
            "read -P 0x11 0 1536",
            "read -P 0x33 1536 512",
            "read -P 0x22 513k 3k",
            "read -P 0x11 516k 508k",
            "read -P 0x44 2M 64k",
            "read -P 0 64k 64k",
            "read -P 0 192k 64k",
            "read -P 0 320k 64k",
            "read -P 0 4M 4M",
        ] {
            words.extend(["-c", command]);
        }
        words.push(&serving.uri);
        let out = run("qemu-io", &words);
        assert!(!out.contains("Pattern verification failed"), "{out}");
    }
}

#[test]
fn fio_verifies_what_it_wrote_over_several_connections() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "16M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    let uri = format!("--uri={}", serving.uri);
    let load = [
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--numjobs=4",
        "--size=4m",
        "--offset_increment=4m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--group_reporting",
        "--fsync=64",
        "--name=load",
    ];
    let folder = machine.path("");
    let mut fio = Command::new("fio");
    fio.args(load).current_dir(folder).stdin(Stdio::null());
    let said = said(&fio.output().expect("fio; `cargo x setup` installs it"));
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stdout.contains("err= 0"), "{said:?}");
    drop(serving);
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn every_connection_sees_what_another_one_was_told_is_written() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut clients: Vec<Client> = (0..4).map(|_| serving.client()).collect();
    for round in 0..50_u8 {
        let writer = usize::from(round) % clients.len();
        let offset = u64::from(round % 7) * 4096;
        let content = [round + 1; 8192];
        clients[writer].write(offset, &content).unwrap();
        if round % 5 == 0 {
            clients[(writer + 1) % 4].change(nbd::FLUSH, 0, 0).unwrap();
        }
        for client in &mut clients {
            assert!(client.read(offset, 8192).unwrap() == content);
        }
    }
}

#[test]
fn a_snapshot_is_served_as_it_was_while_the_volume_changes() {
    let machine = machine();
    let volume = Serving::start(&machine, &["p0/v"]);
    let mut writer = volume.client();
    writer.write(0, &vec![1; 65536]).unwrap();
    machine.ok(&["snapshot", "p0/v@s"]);
    writer.write(0, &vec![2; 65536]).unwrap();
    let snapshot = Serving::start(&machine, &["p0/v@s"]);
    let mut reader = snapshot.client();
    writer.write(4096, &[3; 4096]).unwrap();
    assert!(reader.read(0, 65536).unwrap() == vec![1; 65536]);
    for (command, payload) in [(nbd::WRITE, &[0; 4096][..]), (nbd::TRIM, &[])] {
        let refused = reader.call(command, 0, 0, 4096, payload).unwrap();
        assert_eq!(refused.errno, 1, "EPERM");
    }
    let zeroes = reader.call(nbd::WRITE_ZEROES, 0, 0, 4096, &[]).unwrap();
    assert_eq!(zeroes.errno, 1, "EPERM");
    assert!(reader.read(0, 65536).unwrap() == vec![1; 65536]);
    reader.change(nbd::FLUSH, 0, 0).unwrap();
}

#[test]
fn what_is_served_counts_as_attached() {
    let machine = machine();
    machine.ok(&["snapshot", "p0/v@s"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    for words in [
        &["rm", "-r", "p0/v"][..],
        &["rename", "p0/v", "p0/w"],
        &["rollback", "p0/v@s"],
        &["pool", "export", "p0"],
        &["detach", "p0/v"],
    ] {
        let line = machine.refused(1, words);
        assert!(
            line.contains("serve-nbd") && line.contains(&serving.uri),
            "{line}"
        );
    }
    let line = machine.refused(1, &["serve-nbd", "p0/v"]);
    assert!(line.contains(&serving.uri), "{line}");
    machine.refused(1, &["resize", "p0/v", "4M", "--allow-shrink"]);
    let rows = machine.json(&["list", "--json", "p0/v"]);
    assert_eq!(
        (&rows[0]["device"], &rows[0]["served"]),
        (&serving.uri.as_str().into(), &true.into())
    );
    assert_eq!(
        machine.json(&["pool", "status", "p0", "--json"])["exports"],
        1
    );
    // The snapshot is another thing.
    machine.ok(&["rm", "p0/v@s"]);
    // A client that comes later sees the new size.
    machine.ok(&["resize", "p0/v", "12M"]);
    assert_eq!(serving.client().bytes, 12 * MIB);
    assert_eq!(serving.end(), (Some(0), String::new()));
    machine.ok(&["rm", "p0/v"]);
}

#[test]
fn space_that_a_removal_waited_for_is_back() {
    let machine = machine();
    let status = || machine.json(&["pool", "status", "p0", "--json"]);
    let daemon = machine.serve();
    machine.ok(&["rm", "--wait", "p0/v"]);
    let (used, free) = (
        status()["used_bytes"].clone(),
        status()["free_bytes"].clone(),
    );
    machine.ok(&["create", "p0/w", "--size", "16M"]);
    let serving = Serving::start(&machine, &["p0/w"]);
    let mut client = serving.client();
    for number in 0..8 {
        for at in (0..4096 * 2048).step_by(65536) {
            client.write(at + number * 4096, &[7; 4096]).unwrap();
        }
        machine.ok(&["snapshot", &format!("p0/w@{number}")]);
    }
    assert_eq!(serving.end(), (Some(0), String::new()));
    let said = machine.ok(&["rm", "-n", "-r", "p0/w"]);
    assert!(said.contains("would free 4."), "{said}");
    let said = machine.run(&["rm", "--wait", "-r", "p0/w"]);
    assert_eq!(
        (said.code, said.stdout.as_str(), said.stderr.as_str()),
        (0, "", "")
    );
    let now = status();
    assert_eq!(
        (&now["reclaiming"], &now["backlog_bytes"]),
        (&0.into(), &0.into())
    );
    assert_eq!((&now["used_bytes"], &now["free_bytes"]), (&used, &free));
    assert_eq!(
        machine.json(&["stats", "--json", "p0"])[0]["backlog_bytes"],
        0
    );
    let text = machine.ok(&["pool", "status", "p0"]);
    assert!(
        text.lines().any(|line| line.starts_with("backlog")),
        "{text}"
    );
    // Nothing is on its way, and a list says nothing of it.
    assert_eq!(machine.run(&["list"]).stderr, "");
    assert_eq!(daemon.terminate(), Some(0));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn everything_is_durable_and_gone_when_the_command_has_ended() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let socket = serving.socket.clone();
    let found = fs::symlink_metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let mut client = serving.client();
    client.write(0, &[7; 4096]).unwrap();
    assert_eq!(serving.end(), (Some(0), String::new()));
    assert!(!socket.exists());
    assert!(client.read(0, 4096).is_err());
    // The daemon that was started for it ends too.
    for _ in 0..500 {
        if !machine.socket().exists() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!machine.socket().exists());
    machine.ok(&["pool", "check", "p0"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    assert!(serving.client().read(0, 4096).unwrap() == [7; 4096]);
}

#[test]
fn a_command_that_is_killed_takes_its_export_along_and_a_daemon_its_commands() {
    let machine = machine();
    machine.ok(&["create", "p0/w", "--size", "1M"]);
    let daemon = machine.serve();
    let first = Serving::start(&machine, &["p0/v"]);
    let second = Serving::start(&machine, &["p0/w"]);
    first.signal("-KILL");
    first.ends();
    let mut is_free = false;
    for _ in 0..500 {
        let exports = machine.json(&["pool", "status", "p0", "--json"])["exports"].clone();
        is_free = exports == 1;
        if is_free {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert!(is_free);
    let first = Serving::start(&machine, &["p0/v"]);
    first.client().write(0, &[7; 4096]).unwrap();
    let (stale, other) = (first.socket.clone(), second.socket.clone());
    daemon.kill();
    for serving in [first, second] {
        let (code, said) = serving.ends();
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains("the daemon"), "{said}");
    }
    // What a dead daemon left is no obstacle, and what it acknowledged is there.
    assert!(stale.exists() && other.exists());
    let first = Serving::start(&machine, &["p0/v"]);
    assert_eq!(first.socket, stale);
    assert!(first.client().read(0, 4096).unwrap() == [7; 4096]);
    // A daemon that is asked to stop ends what it serves in order.
    let daemon = machine.json(&["pool", "status", "p0", "--json"])["daemon_pid"].to_string();
    run("kill", &[&daemon]);
    assert_eq!(first.ends().0, Some(1));
    assert!(!stale.exists());
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn addresses_are_taken_as_they_are_named() {
    let machine = machine();
    machine.ok(&["create", "p0/w", "--size", "1M"]);
    let path = machine.path("my socket");
    let serving = Serving::start(&machine, &["p0/v", "--socket", text(&path)]);
    assert!(serving.uri.ends_with("/my%20socket"), "{}", serving.uri);
    run("nbdinfo", &["--size", &serving.uri]);
    let line = machine.refused(1, &["serve-nbd", "p0/w", "--socket", text(&path)]);
    assert!(line.contains("somebody listens there"), "{line}");
    let mine = machine.path("mine");
    fs::write(&mine, "x").unwrap();
    machine.refused(1, &["serve-nbd", "p0/w", "--socket", text(&mine)]);
    assert_eq!(fs::read(&mine).unwrap(), b"x");
    drop(UnixListener::bind(machine.path("stale")).unwrap());
    let stale = machine.path("stale");
    let replaced = Serving::start(&machine, &["p0/w", "--socket", text(&stale)]);
    assert_eq!(replaced.end().0, Some(0));
    // Nothing that failed keeps the volume.
    let tcp = Serving::start(&machine, &["p0/w", "--listen", "0"]);
    assert!(tcp.uri.starts_with("nbd://127.0.0.1:"), "{}", tcp.uri);
    assert_eq!(
        run("nbdinfo", &["--size", &tcp.uri]).trim(),
        MIB.to_string()
    );
    let port = tcp
        .uri
        .trim_start_matches("nbd://")
        .split('/')
        .next()
        .unwrap();
    machine.ok(&["create", "p0/x", "--size", "1M"]);
    let words = ["serve-nbd", "p0/x", "--listen", port];
    assert!(machine.refused(1, &words).contains("cannot be bound"));
    machine.refused(2, &["serve-nbd", "p0/x", "--listen", "somewhere:1"]);
    machine.refused(2, &["serve-nbd", "p0/x", "--listen", "1", "--socket", "s"]);
    machine.refused(1, &["serve-nbd", "p0/nobody"]);
    machine.refused(1, &["serve-nbd", "p9/v"]);
    machine.refused(2, &["serve-nbd", "p0"]);
}

#[test]
fn a_client_that_stalls_stalls_nobody_else() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut stalled: Vec<Client> = (0..3).map(|_| serving.client()).collect();
    let ask = |cookie, command, bytes| Ask {
        cookie,
        command,
        flags: 0,
        offset: 0,
        bytes,
    };
    // It asks for more than it takes,
    for client in &mut stalled[..1] {
        client.stream().set_nonblocking(true).unwrap();
        for cookie in 0..10_000 {
            if client.send(ask(cookie, nbd::READ, 8 << 20), &[]).is_err() {
                break;
            }
        }
    }
    // or stops in the middle of a payload, or of a request.
    stalled[1]
        .send(ask(0, nbd::WRITE, 8 << 20), &[1; 100])
        .unwrap();
    stalled[2].stream().write_all(&[0x25, 0x60]).unwrap();
    let _silent = std::os::unix::net::UnixStream::connect(&serving.socket).unwrap();
    let mut client = serving.client();
    client.write(0, &[9; 4096]).unwrap();
    client.change(nbd::FLUSH, 0, 0).unwrap();
    assert!(client.read(0, 4096).unwrap() == [9; 4096]);
    machine.ok(&["snapshot", "p0/v@s"]);
    // Nor does any of them keep the export from ending.
    assert_eq!(serving.end().0, Some(0));
}

#[test]
fn hostile_bytes_end_their_connection_and_nothing_else() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut client = serving.client();
    client.write(0, &[9; 4096]).unwrap();
    let mut state = 7_u64;
    let mut noise = |bytes: usize| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_le_bytes()[7]
        };
        (0..bytes).map(|_| next()).collect()
    };
    for round in 0..40 {
        let mut stream = std::os::unix::net::UnixStream::connect(&serving.socket).unwrap();
        let garbage = noise(round * 50);
        // The server may have closed it by then.
        drop(stream.write_all(&garbage));
        let mut stream = nbd::greeted(&serving.socket).unwrap();
        let hostile = match round % 4 {
            0 => noise(64),
            1 => nbd::option(7, &noise(round)),
            2 => nbd::option(10, &noise(round * 10)),
            _ => [&b"IHAVEOPT"[..], &[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]].concat(),
        };
        drop(stream.write_all(&hostile));
        let mut client = serving.client();
        drop(client.stream().write_all(&noise(28 + round)));
        assert!(client.receive().is_err());
    }
    // A write longer than any is not read, so its connection ends.
    let mut long = serving.client();
    let reply = long.call(nbd::WRITE, 0, 0, u32::MAX, &[]);
    assert!(reply.is_err(), "{reply:?}");
    // Impossible requests are answered, and the connection goes on.
    for (command, offset, bytes, errno) in [
        (nbd::READ, 8 * MIB, 4096, 22),
        (nbd::READ, u64::MAX - 4095, 4096, 22),
        (nbd::READ, 0, u32::MAX - 4095, 22),
        (nbd::READ, 1, 4096, 22),
        (nbd::READ, 0, 512, 22),
        (nbd::TRIM, 8 * MIB, 4096, 22),
        (nbd::WRITE_ZEROES, 8 * MIB - 4096, 8192, 28),
        (nbd::BLOCK_STATUS, 0, 0, 22),
        (5, 0, 4096, 22),
        (999, 0, 4096, 22),
        (nbd::READ, 0, 0, 0),
        (nbd::FLUSH, u64::MAX, u32::MAX, 0),
    ] {
        let reply = client.call(command, 0, offset, bytes, &[]).unwrap();
        assert_eq!(reply.errno, errno, "{command} {offset} {bytes}");
    }
    let beyond = client.call(nbd::WRITE, 0, 8 * MIB, 4096, &[1; 4096]);
    assert_eq!(beyond.unwrap().errno, 28);
    let unaligned = client.call(nbd::WRITE, 0, 512, 512, &[1; 512]);
    assert_eq!(unaligned.unwrap().errno, 22);
    let unknown_flag = client.call(nbd::WRITE, 1 << 9, 0, 4096, &[1; 4096]);
    assert_eq!(unknown_flag.unwrap().errno, 22);
    assert!(client.read(0, 4096).unwrap() == [9; 4096]);
    assert_eq!(serving.end().0, Some(0));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_connection_too_many_is_turned_away_and_room_comes_back() {
    let machine = machine();
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut clients: Vec<Client> = (0..64).map(|_| serving.client()).collect();
    assert!(Client::connect(&serving.socket).is_err());
    assert!(clients[63].read(0, 4096).is_ok());
    clients.pop();
    for _ in 0..500 {
        if Client::connect(&serving.socket).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("no room");
}

#[test]
fn a_full_pool_is_enospc_and_reads_go_on() {
    let machine = Machine::new();
    let pool = machine.pool_path();
    machine.ok(&["pool", "create", "p0", &pool, "--size", "16M"]);
    machine.ok(&["create", "p0/v", "--size", "64M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut client = serving.client();
    let mut written = 0;
    let errno = loop {
        let reply = client.call(nbd::WRITE, 0, written, 1 << 20, &vec![5; 1 << 20]);
        match reply.unwrap().errno {
            0 => written += MIB,
            errno => break errno,
        }
    };
    assert_eq!(errno, 28);
    assert!(written >= 4 * MIB && client.read(0, 4096).unwrap() == [5; 4096]);
    client.change(nbd::TRIM, 0, 4 << 20).unwrap();
    client.write(0, &[6; 4096]).unwrap();
    let output = machine.command(&["pool", "check", "p0"]).output().unwrap();
    assert_eq!(said(&output).code, 0);
    let words = ["serve-nbd", "p0/v"];
    one_line(&machine.run(&words), 1, &words);
}

#[test]
fn thirty_kills_under_load_lose_nothing_that_was_acknowledged() {
    let machine = Machine::new();
    let plan = Plan {
        program: env!("CARGO_BIN_EXE_ublkctl").into(),
        folder: machine.path(""),
        cycles: 30,
        seed: 30,
        without_ring: false,
    };
    let outcome = nbd_kill::run(&plan).unwrap();
    assert_eq!(outcome.violations(), 0, "{outcome:#?}");
    assert_eq!(outcome.kills, 30);
    assert!(outcome.acknowledged_blocks > 1000, "{outcome:#?}");
}
