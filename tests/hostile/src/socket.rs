//! A daemon's control socket under hostile bytes, while another client works and measures how long it waits.

use super::load::{Load, Met};
use super::machine::{Machine, Server};
use super::{Plan, guarded, seeded};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The longest request that a daemon takes.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// How long a client that behaves may wait while others do not.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// Clients that connect and say nothing, kept while the other cases run.
const STALLED: usize = 24;
/// What a daemon that was sent a gigabyte may hold in memory.
const MEMORY_KB_MAX: u64 = 256 << 10;
const CASES: u64 = 1500;
const SAMPLE: u64 = 100;

const REQUESTS: &[&str] = &[
    r#""status""#,
    r#""list""#,
    r#""stats""#,
    r#""devices""#,
    r#""check""#,
    r#"{"diff":{"from":{"volume":"v","snapshot":"s"},"to":{"volume":"v","snapshot":null}}}"#,
    r#"{"create":{"volume":"x","options":{"bytes":1048576,"sector_bytes":4096,"redirect":"shared"}}}"#,
    r#"{"remove":{"targets":[{"volume":"x","snapshot":null}],"recursive":true,"dry_run":false}}"#,
    r#"{"rename":{"from":{"volume":"x","snapshot":null},"to":{"volume":"y","snapshot":null}}}"#,
    r#"{"resize":{"volume":"x","bytes":1048576,"allow_shrink":false}}"#,
    r#"{"snapshot":{"targets":[{"volume":"x","snapshot":"s"}]}}"#,
    r#"{"clone":{"snapshot":{"volume":"v","snapshot":"s"},"volume":"z"}}"#,
    r#"{"rollback":{"snapshot":{"volume":"x","snapshot":"s"}}}"#,
    r#""outline""#,
    r#"{"hold":{"tag":"t","snapshots":[{"volume":"v","snapshot":"s"}]}}"#,
    r#"{"release":{"tag":"t","snapshots":[{"volume":"v","snapshot":"s"}]}}"#,
    r#"{"prune":{"volume":"v","policy":{"last":1,"hourly":0,"daily":0,"weekly":0,"monthly":0,"yearly":0},"dry_run":true}}"#,
    r#"{"grow":{"bytes":1}}"#,
    r#"{"detach":{"devices":{"paths":[{"volume":"v","snapshot":null}]},"force":true}}"#,
];

/// What stands in the place of a number or a word.
const VALUES: &[&str] = &[
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "0.5",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"../x\"",
    "\"a/b\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"\u{1f4a3}\"",
    "4097",
    "511",
    "36028797018963968",
    "1180591620717411303424",
    "{\"volume\":\"v\"}",
    "[[[[]]]]",
];

/// What the clients that behave met; how many cases ran, and which failed.
pub(crate) fn run(program: &Path, plan: &Plan) -> (Met, (u64, Vec<String>)) {
    let machine = Machine::new(program);
    let mut daemon = machine.serve();
    let load = Load::new(&machine, plan.seed);
    let numbers = plan.numbers(CASES, SAMPLE);
    let count = numbers.end - numbers.start;
    let mut failures = Vec::new();
    let is_over = AtomicBool::new(false);
    let met = thread::scope(|scope| {
        let worker = scope.spawn(|| work(&machine, &is_over));
        let load = scope.spawn(|| load.run(&is_over));
        let mut stalled = Vec::new();
        for number in numbers {
            if stalled.len() < STALLED && number % 8 == 0 {
                stalled.extend(stall(&machine.socket(), number));
            }
            let mut ended = guarded(|| one(&machine.socket(), number, seeded(plan, number)));
            if !daemon.is_alive() {
                let log = fs::read_to_string(machine.path("serve.log")).unwrap_or_default();
                ended = Err(format!("the daemon died: {log:.600}"));
            }
            if let Err(fact) = ended {
                failures.push(format!("socket:{number}: {fact}"));
            }
            if !daemon.is_alive() {
                daemon = machine.serve();
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let (mut met, io) = load.join().unwrap();
        let (waited, work) = worker.join().unwrap();
        met.waited = met.waited.max(waited);
        let ended = [("works over NBD", io), ("behaves", work)];
        for (who, ended) in ended {
            if let Err(fact) = ended {
                failures.push(format!("socket: the client that {who}: {fact}"));
            }
        }
        met
    });
    if let Err(fact) = sound(&machine, daemon) {
        failures.push(format!("socket: {fact}"));
    }
    (met, (count, failures))
}

/// After all: no memory lost to a client, and a pool without damage.
fn sound(machine: &Machine, daemon: Server) -> Result<(), String> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    if peak.is_none_or(|peak| peak > MEMORY_KB_MAX) {
        return Err(format!("the daemon held {peak:?} KiB"));
    }
    drop(daemon);
    machine.is_sound()
}

/// The longest that the client that behaves waited, and how it ended.
fn work(machine: &Machine, is_over: &AtomicBool) -> (Duration, Result<(), String>) {
    let mut waited = Duration::ZERO;
    let ended = rounds(machine, is_over, &mut waited);
    (waited, ended)
}

/// The client that behaves: it makes, forks, lists and removes, and nothing of it may fail or take long.
fn rounds(machine: &Machine, is_over: &AtomicBool, waited: &mut Duration) -> Result<(), String> {
    let mut round = 0;
    while !is_over.load(Ordering::Relaxed) || round == 0 {
        round += 1;
        let volume = format!("work{round}");
        for request in [
            format!(
                r#"{{"create":{{"volume":"{volume}","options":{{"bytes":1048576,"sector_bytes":4096,"redirect":"shared"}}}}}}"#
            ),
            format!(r#"{{"snapshot":{{"targets":[{{"volume":"{volume}","snapshot":"s"}}]}}}}"#),
            r#""list""#.to_owned(),
            format!(
                r#"{{"remove":{{"targets":[{{"volume":"{volume}","snapshot":null}}],"recursive":true,"dry_run":false}}}}"#
            ),
        ] {
            let begun = Instant::now();
            let answer = ask(&machine.socket(), &request)?;
            let took = begun.elapsed();
            *waited = (*waited).max(took);
            if took > WAIT_MAX || !answer.starts_with(r#"{"reply":"#) {
                return Err(format!("{request} took {took:?}: {answer:.300}"));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn connect(socket: &Path) -> Result<(UnixStream, BufReader<UnixStream>), String> {
    let said = |e: std::io::Error| format!("cannot connect: {e}");
    let stream = UnixStream::connect(socket).map_err(said)?;
    stream.set_read_timeout(Some(WAIT_MAX)).map_err(said)?;
    stream.set_write_timeout(Some(WAIT_MAX)).map_err(said)?;
    let reader = BufReader::new(stream.try_clone().map_err(said)?);
    Ok((stream, reader))
}

/// One request of a client that takes "too many connections" for "again".
fn ask(socket: &Path, request: &str) -> Result<String, String> {
    for _ in 0..500 {
        let (mut stream, mut lines) = connect(socket)?;
        let hello = line(&mut lines)?;
        if !hello.starts_with(r#"{"hello""#) {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        writeln!(stream, "{request}").map_err(|e| e.to_string())?;
        loop {
            let answer = line(&mut lines)?;
            if !answer.starts_with(r#"{"progress""#) {
                return Ok(answer);
            }
        }
    }
    Err("the daemon is always full".into())
}

/// The next line; an empty one is the end.
fn line(lines: &mut impl BufRead) -> Result<String, String> {
    let mut line = String::new();
    match lines.read_line(&mut line) {
        Ok(_) => Ok(line),
        Err(e) if is_cut_off(&e) => Ok(String::new()),
        Err(e) => Err(format!("no answer: {e}")),
    }
}

fn is_cut_off(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    )
}

/// A client that says nothing, or half a request, and stays.
fn stall(socket: &Path, number: u64) -> Option<UnixStream> {
    let (mut stream, _) = connect(socket).ok()?;
    if number.is_multiple_of(16) {
        stream.write_all(b"{\"sta").ok()?;
    }
    Some(stream)
}

fn one(socket: &Path, number: u64, mut rng: fastrand::Rng) -> Result<(), String> {
    if number == 1 {
        return flood(socket, 1 << 30);
    }
    match rng.u8(0..16) {
        0 => leave(socket, &mut rng),
        1 => crowd(socket, &mut rng),
        2 => flood(socket, REQUEST_BYTES_MAX + rng.usize(0..3)),
        3 => unread(socket, &mut rng),
        _ => talk(socket, &mut rng),
    }
}

/// Lines of every kind of nonsense; each is answered by one line, or ends the connection.
fn talk(socket: &Path, rng: &mut fastrand::Rng) -> Result<(), String> {
    let (mut stream, mut lines) = connect(socket)?;
    let hello = line(&mut lines)?;
    if !hello.starts_with(r#"{"hello""#) {
        return if hello.contains("too many") {
            Ok(())
        } else {
            Err(format!("greeted with {hello:?}"))
        };
    }
    for _ in 0..rng.usize(1..5) {
        let mut request = nonsense(rng);
        request.retain(|byte| *byte != b'\n');
        request.push(b'\n');
        match stream.write_all(&request) {
            Err(e) if is_cut_off(&e) => return Ok(()),
            written => written.map_err(|e| e.to_string())?,
        }
        let shown = String::from_utf8_lossy(&request[..request.len().min(200)]).into_owned();
        loop {
            let answer = line(&mut lines).map_err(|e| format!("{shown:?}: {e}"))?;
            if answer.starts_with(r#"{"progress""#) {
                continue;
            }
            let is_answer = answer.starts_with(r#"{"error""#) || answer.starts_with(r#"{"reply""#);
            if !is_answer || !answer.ends_with('\n') {
                return Err(format!("{shown:?} was answered with {answer:.200?}"));
            }
            break;
        }
    }
    Ok(())
}

fn nonsense(rng: &mut fastrand::Rng) -> Vec<u8> {
    let request = rng.choice(REQUESTS).copied().unwrap();
    match rng.u8(0..9) {
        0 => {
            let length = rng.usize(1..2000);
            std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
        }
        1 => request.as_bytes()[..rng.usize(0..request.len())].to_vec(),
        2 => "[".repeat(rng.usize(1..200_000)).into_bytes(),
        3 => "{\"a\":".repeat(rng.usize(1..100_000)).into_bytes(),
        4 => "9".repeat(rng.usize(1..100_000)).into_bytes(),
        5 => {
            let mut bytes = request.as_bytes().to_vec();
            let place = rng.usize(0..bytes.len());
            bytes[place] = rng.u8(..);
            bytes
        }
        6 => format!("{request}{request}").into_bytes(),
        _ => {
            // A value in the place of another.
            let ends: Vec<usize> = request.match_indices(':').map(|(at, _)| at + 1).collect();
            let Some(&at) = rng.choice(&ends) else {
                return rng.choice(VALUES).unwrap().as_bytes().to_vec();
            };
            let rest = &request[at..];
            let end = rest.find([',', '}']).unwrap_or(rest.len());
            let value = rng.choice(VALUES).unwrap();
            format!("{}{value}{}", &request[..at], &rest[end..]).into_bytes()
        }
    }
}

/// A line that is too long is cut off, however long it goes on.
fn flood(socket: &Path, bytes: usize) -> Result<(), String> {
    let (mut stream, mut lines) = connect(socket)?;
    line(&mut lines)?;
    let part = vec![b'x'; 1 << 16];
    let mut sent = 0;
    while sent < bytes {
        match stream.write(&part[..part.len().min(bytes - sent)]) {
            Ok(count) => sent += count,
            Err(e) if is_cut_off(&e) => return Ok(()),
            Err(e) => return Err(format!("after {sent} bytes: {e}")),
        }
    }
    stream.write_all(b"\n").ok();
    let answer = line(&mut lines)?;
    if answer.is_empty()
        || answer.contains("too long")
        || answer.contains("too many")
        || bytes < REQUEST_BYTES_MAX
    {
        return Ok(());
    }
    Err(format!("{bytes} bytes were answered with {answer:.200}"))
}

/// A request whose sender is gone before the answer, or before its end.
fn leave(socket: &Path, rng: &mut fastrand::Rng) -> Result<(), String> {
    let (mut stream, _) = connect(socket)?;
    let request = rng.choice(REQUESTS).unwrap();
    let length = rng.usize(0..=request.len());
    // Who is turned away at once finds nobody to write to.
    stream.write_all(&request.as_bytes()[..length]).ok();
    if rng.bool() {
        stream.write_all(b"\n").ok();
    }
    if rng.bool() {
        stream.shutdown(Shutdown::Write).ok();
    }
    Ok(())
}

/// More clients than a daemon takes; each is greeted or told so.
fn crowd(socket: &Path, rng: &mut fastrand::Rng) -> Result<(), String> {
    let mut clients = Vec::new();
    for _ in 0..rng.usize(2..30) {
        clients.push(connect(socket)?);
    }
    for (_, lines) in &mut clients {
        let hello = line(lines)?;
        if !hello.starts_with(r#"{"hello""#) && !hello.contains("too many") {
            return Err(format!("one of many was greeted with {hello:?}"));
        }
    }
    Ok(())
}

/// Many requests by one who reads no answer.
fn unread(socket: &Path, rng: &mut fastrand::Rng) -> Result<(), String> {
    let (mut stream, mut lines) = connect(socket)?;
    for _ in 0..rng.usize(1..50) {
        if stream.write_all(b"\"list\"\n").is_err() {
            break;
        }
    }
    stream.shutdown(Shutdown::Write).ok();
    let mut rest = Vec::new();
    match lines.read_to_end(&mut rest) {
        Err(e) if !is_cut_off(&e) => Err(format!("no end: {e}")),
        _ => Ok(()),
    }
}
