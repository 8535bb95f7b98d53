//! Space marks and `watch`: what is said when space runs short, and what a script hears.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "they are a test's assertions"
)]

use crate::kit::{Machine, flip};
use crate::nbd::Serving;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// A running `watch p0`, which dies with its test.
struct Watching {
    child: Child,
    lines: Receiver<Value>,
}

impl Watching {
    fn start(machine: &Machine) -> Self {
        let mut command = machine.command(&["watch", "p0"]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("ublkctl");
        let stdout = child.stdout.take().expect("a pipe");
        let (told, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).expect("JSON");
                if told.send(line).is_err() {
                    return;
                }
            }
        });
        let watching = Self { child, lines };
        watching.hears("watching");
        watching
    }

    /// Waits for the next event of a kind; none of another kind comes before.
    #[track_caller]
    fn hears(&self, event: &str) -> Value {
        let told = self.lines.recv_timeout(Duration::from_secs(20));
        let told = told.unwrap_or_else(|e| panic!("no {event}: {e}"));
        assert_eq!(told["event"], event, "{told}");
        assert!(told["at"].as_u64().expect("a time") > 1 << 60, "{told}");
        told
    }

    fn hears_any(&self) -> Value {
        let told = self.lines.recv_timeout(Duration::from_secs(20));
        told.expect("an event")
    }

    #[track_caller]
    fn hears_nothing(&self) {
        let told = self.lines.recv_timeout(Duration::from_millis(500));
        assert!(told.is_err(), "{told:?}");
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

fn warning(machine: &Machine) -> Option<String> {
    let status = machine.json(&["pool", "status", "p0", "--json"]);
    let warnings = status["warnings"].as_array().expect("a list").clone();
    warnings
        .first()
        .map(|text| text.as_str().expect("text").to_owned())
}

#[test]
fn marks_are_said_passed_and_left_again() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "64M"]);
    machine.ok(&["set", "p0", "marks=30,50,99"]);
    let daemon = machine.serve();
    let watching = Watching::start(&machine);
    let serving = Serving::start(&machine, &["p0/v"]);
    let added = watching.hears("export-added");
    assert_eq!(added["name"], "p0/v");
    let mut client = serving.client();
    assert_eq!(warning(&machine), None);
    client.write(0, &vec![1; 24 << 20]).unwrap();
    let mark = watching.hears("space-mark");
    assert_eq!((&mark["mark"], &mark["passed"]), (&30.into(), &"up".into()));
    let said = warning(&machine).expect("a warning");
    assert!(said.contains("above the mark of 30%"), "{said}");
    let text = machine.ok(&["pool", "status", "p0"]);
    assert!(
        text.lines()
            .any(|line| line.starts_with("warning") && line.contains("30%")),
        "{text}"
    );
    client.write(24 << 20, &vec![1; 12 << 20]).unwrap();
    assert_eq!(watching.hears("space-mark")["mark"], 50);
    // Other marks count at once, in a daemon that runs.
    machine.ok(&["set", "p0", "marks=none"]);
    assert_eq!(warning(&machine), None);
    watching.hears_nothing();
    machine.ok(&["set", "p0", "marks=40"]);
    assert_eq!(watching.hears("space-mark")["mark"], 40);
    drop(client);
    assert_eq!(serving.end().0, Some(0));
    watching.hears("export-gone");
    machine.ok(&["rm", "p0/v"]);
    let mut told = [watching.hears_any(), watching.hears_any()];
    told.sort_by_key(|told| told["event"].to_string());
    assert_eq!(told[0]["event"], "reclaim-done");
    assert_eq!(
        (&told[1]["mark"], &told[1]["passed"]),
        (&40.into(), &"down".into())
    );
    assert_eq!(daemon.terminate(), Some(0));
    let log = fs::read_to_string(machine.path("serve.log")).expect("the log");
    assert!(
        log.contains("WARN") && log.contains("above the mark of 50%"),
        "{log}"
    );
    // Without a daemon too, and from the next one on.
    machine.ok(&["set", "p0", "marks=1"]);
    assert!(warning(&machine).expect("a warning").contains("mark of 1%"));
}

#[test]
fn who_watches_hears_the_last_before_the_daemon_ends() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let daemon = machine.serve();
    let watching = Watching::start(&machine);
    let _serving = Serving::start(&machine, &["p0/v"]);
    watching.hears("export-added");
    assert_eq!(daemon.terminate(), Some(0));
    assert_eq!(watching.hears("export-gone")["name"], "p0/v");
}

#[test]
fn marks_that_cannot_be_are_refused_and_go_with_their_pool() {
    let machine = Machine::with_pool();
    for words in [
        ["set", "p0", "marks=95,80"],
        ["set", "p0", "marks=0"],
        ["set", "p0", "marks="],
        ["set", "p0", "quota=1G"],
        ["set", "p0/v", "marks=80"],
    ] {
        machine.refused_untouched(2, &words);
    }
    machine.refused(1, &["set", "p1", "marks=80"]);
    machine.ok(&["set", "p0", "marks=1"]);
    assert!(warning(&machine).is_some());
    machine.ok(&["pool", "export", "p0"]);
    machine.ok(&["pool", "import", &machine.pool_path()]);
    assert_eq!(warning(&machine), None);
    // A file of marks that cannot be read keeps nobody from the pool.
    fs::write(machine.path("state/pools/p0.marks"), "[9").unwrap();
    assert_eq!(warning(&machine), None);
    assert_eq!(machine.ok(&["pool", "list", "-H"]).lines().count(), 1);
}

#[test]
fn damage_that_a_check_finds_is_told() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    machine.ok(&["create", "p0/w", "--size", "4M"]);
    let _daemon = machine.serve();
    let watching = Watching::start(&machine);
    machine.ok(&["pool", "check", "p0"]);
    watching.hears_nothing();
    // The counts of the first region, in both places.
    for block in [16, 18] {
        flip(
            std::path::Path::new(&machine.pool_path()),
            block * 4096 + 100,
        );
    }
    assert_eq!(machine.run(&["pool", "check", "p0"]).code, 4);
    let told = watching.hears("error");
    assert_eq!(told["kind"], "corrupt");
}

#[test]
fn who_watches_needs_a_daemon_and_hears_when_it_ends() {
    let machine = Machine::with_pool();
    let line = machine.refused_untouched(1, &["watch", "p0"]);
    assert!(line.contains("ublkctl serve p0"), "{line}");
    machine.refused(1, &["watch", "p1"]);
    let daemon = machine.serve();
    let mut watching = Watching::start(&machine);
    let second = Watching::start(&machine);
    drop(second);
    assert_eq!(daemon.terminate(), Some(0));
    assert_eq!(watching.child.wait().expect("it ends").code(), Some(1));
}

#[test]
fn who_watches_and_does_not_read_holds_nobody_up() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    let daemon = machine.serve();
    let slow: Vec<UnixStream> = (0..32)
        .map(|_| {
            let stream = UnixStream::connect(machine.socket()).expect("a daemon");
            let mut lines = BufReader::new(stream);
            let mut next = || {
                let mut line = String::new();
                lines.read_line(&mut line).expect("a line");
                line
            };
            assert!(next().contains("hello"));
            lines.get_mut().write_all(b"\"watch\"\n").expect("a daemon");
            let mut line = String::new();
            lines.read_line(&mut line).expect("a line");
            assert!(line.contains("reply"), "{line}");
            line.clear();
            lines.read_line(&mut line).expect("a line");
            assert!(line.contains("watching"), "{line}");
            lines.into_inner()
        })
        .collect();
    let line = machine.refused(1, &["watch", "p0"]);
    assert!(line.contains("watched 32 times"), "{line}");
    for _ in 0..20 {
        machine.ok(&["set", "p0", "marks=1"]);
        machine.ok(&["set", "p0", "marks=none"]);
    }
    machine.ok(&["snapshot", "p0/v@s"]);
    drop(slow);
    // Each is seen to be gone at its next look.
    thread::sleep(Duration::from_secs(1));
    Watching::start(&machine);
    assert_eq!(daemon.terminate(), Some(0));
}
