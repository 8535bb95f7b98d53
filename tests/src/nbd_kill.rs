//! Kills of a daemon under verifying NBD clients: `kill -9` at random moments, then every block is compared with what
//! was acknowledged.
//!
//! Each connection has blocks of its own and never two requests on one block, so the requests to a block have an order.
//! After a kill a block holds what its last acknowledged request left, or what a later one, not acknowledged, left. A
//! block written carries volume, place and number in every 32 bytes, so old, foreign and mixed blocks are told apart.
//! Snapshots are taken meanwhile, and held against what was acknowledged before and asked for until the end.

use crate::nbd::{self, Ask, Client};
use fastrand::Rng;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

const BLOCK: u64 = 4096;
/// Blocks of the volume.
const BLOCKS: usize = 2048;
/// Connections at a time, and requests on each.
const CONNECTIONS: usize = 4;
const DEPTH: usize = 8;
/// Blocks of the longest request.
const RUN_MAX: usize = 8;
/// The longest time under load before the kill.
const LOAD_MS_MAX: u64 = 50;
/// In one of so many cycles the kill comes while the daemon starts and recovers.
const EARLY_ONE_IN: u64 = 6;
/// In one of so many cycles a snapshot is taken under load.
const SNAPSHOT_ONE_IN: u64 = 10;
/// After so many cycles the pool is checked.
const CHECK_EVERY: u64 = 10;
const MAGIC: u64 = 0x6b69_6c6c_6564_2121;

/// What is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `ublkctl`.
    pub program: PathBuf,
    /// An empty folder for the pool and the state.
    pub folder: PathBuf,
    /// Kills.
    pub cycles: u64,
    /// Decides what is written and when the kill comes, as far as a schedule of processes lets it.
    pub seed: u64,
    /// The negative control: the ring goes with the daemon, as if it did not outlive it.
    pub without_ring: bool,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Kills, those while the daemon started among them.
    pub kills: u64,
    /// Kills while the daemon started.
    pub early_kills: u64,
    /// Changes of a block that were acknowledged.
    pub acknowledged_blocks: u64,
    /// Blocks that held something older than what was acknowledged.
    pub lost_blocks: u64,
    /// Blocks that held what nobody wrote there.
    pub foreign_blocks: u64,
    /// Requests that failed.
    pub failed_requests: u64,
    /// Snapshots that were compared.
    pub snapshots: u64,
    /// Snapshots that were acknowledged and are not there.
    pub lost_snapshots: u64,
    /// Checks of the pool.
    pub checks: u64,
    /// Those that found something.
    pub bad_checks: u64,
    /// The first things that were wrong.
    pub facts: Vec<String>,
}

impl Outcome {
    /// Everything that may not happen.
    pub fn violations(&self) -> u64 {
        self.lost_blocks
            + self.foreign_blocks
            + self.failed_requests
            + self.lost_snapshots
            + self.bad_checks
    }

    /// Adds what another run came to.
    pub fn add(&mut self, other: Self) {
        self.kills += other.kills;
        self.early_kills += other.early_kills;
        self.acknowledged_blocks += other.acknowledged_blocks;
        self.lost_blocks += other.lost_blocks;
        self.foreign_blocks += other.foreign_blocks;
        self.failed_requests += other.failed_requests;
        self.snapshots += other.snapshots;
        self.lost_snapshots += other.lost_snapshots;
        self.checks += other.checks;
        self.bad_checks += other.bad_checks;
        other.facts.into_iter().for_each(|fact| self.note(fact));
    }

    fn note(&mut self, fact: String) {
        if self.facts.len() < 20 {
            self.facts.push(fact);
        }
    }
}

/// What a request leaves in a block: a stamp with this number, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeros,
    Stamp(u64),
}

/// What was asked for of a block since its content was last known.
#[derive(Clone, Debug)]
struct Block {
    contents: Vec<Content>,
    /// The last of them that was acknowledged.
    acknowledged: usize,
    is_busy: bool,
}

/// The blocks of one connection.
type Region = Mutex<Vec<Block>>;

/// A snapshot's blocks: what each may hold.
struct Expected {
    is_acknowledged: bool,
    blocks: Vec<Vec<Content>>,
}

/// A process that dies with this run.
struct Process(Child);

impl Process {
    fn kill(mut self) {
        self.kill_now();
    }

    fn kill_now(&mut self) {
        // One that ended by itself is as good.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_now();
    }
}

struct Run<'a> {
    plan: &'a Plan,
    rng: Rng,
    regions: Vec<Region>,
    next_stamp: u64,
    snapshot: Option<Expected>,
    outcome: Outcome,
}

/// Runs the plan.
///
/// # Errors
///
/// What keeps the run from going on: a command that fails although nothing was killed.
pub fn run(plan: &Plan) -> Result<Outcome, String> {
    let block = Block {
        contents: vec![Content::Zeros],
        acknowledged: 0,
        is_busy: false,
    };
    let region = || Mutex::new(vec![block.clone(); BLOCKS / CONNECTIONS]);
    let mut run = Run {
        plan,
        rng: Rng::with_seed(plan.seed),
        regions: (0..CONNECTIONS).map(|_| region()).collect(),
        next_stamp: 1,
        snapshot: None,
        outcome: Outcome::default(),
    };
    let pool = plan.folder.join("p0.pool");
    let pool = pool.display().to_string();
    run.must(&["pool", "create", "p0", &pool, "--size", "96M"])?;
    run.must(&["create", "p0/v", "--size", "8M"])?;
    for cycle in 1..=plan.cycles {
        run.cycle(cycle)?;
    }
    // Once more, without a kill.
    let _daemon = run.daemon()?;
    run.verify()?;
    run.check();
    Ok(run.outcome)
}

impl Run<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.plan.program);
        command.args(words).stdin(Stdio::null());
        command.env("UBLKCTL_STATE_DIR", self.plan.folder.join("state"));
        command.env("UBLKCTL_RUNTIME_DIR", self.plan.folder.join("run"));
        command
    }

    fn output(&self, words: &[&str]) -> Result<Output, String> {
        let output = self.command(words).output();
        output.map_err(|e| format!("{}: {e}", self.plan.program.display()))
    }

    fn must(&self, words: &[&str]) -> Result<String, String> {
        let output = self.output(words)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("ublkctl {}: {said}", words.join(" ")))
    }

    fn start(&self, words: &[&str]) -> Result<Process, String> {
        let mut command = self.command(words);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn();
        child.map(Process).map_err(|e| format!("ublkctl: {e}"))
    }

    /// A daemon that answers.
    fn daemon(&self) -> Result<Process, String> {
        let mut daemon = self.start(&["serve", "p0"])?;
        let socket = self.plan.folder.join("run/p0.sock");
        for _ in 0..30_000 {
            if UnixStream::connect(&socket).is_ok() {
                return Ok(daemon);
            }
            if !matches!(daemon.0.try_wait(), Ok(None)) {
                let said = self.output(&["pool", "check", "p0"])?;
                return Err(format!("the daemon does not start; a check says {said:?}"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Err("the daemon does not answer".to_owned())
    }

    /// A `serve-nbd`, and the socket that it serves on.
    fn export(&self, target: &str) -> Result<(Process, PathBuf), String> {
        let mut export = self.start(&["serve-nbd", target])?;
        let mut uri = String::new();
        if let Some(stdout) = export.0.stdout.as_mut() {
            let read = BufReader::new(stdout).read_line(&mut uri);
            read.map_err(|e| e.to_string())?;
        }
        match uri.trim_end().split_once("?socket=") {
            Some((_, path)) => Ok((export, path.into())),
            None => Err(format!("{target} is not served")),
        }
    }

    fn cycle(&mut self, cycle: u64) -> Result<(), String> {
        if self.rng.u64(..EARLY_ONE_IN) == 0 {
            let daemon = self.start(&["serve", "p0"])?;
            thread::sleep(Duration::from_micros(self.rng.u64(..40_000)));
            daemon.kill();
            self.outcome.early_kills += 1;
            self.killed();
            return Ok(());
        }
        let daemon = self.daemon()?;
        let (export, socket) = self.verify()?;
        if cycle.is_multiple_of(CHECK_EVERY) {
            self.check();
        }
        let takes_snapshot = self.rng.u64(..SNAPSHOT_ONE_IN) == 0;
        let time = Duration::from_micros(self.rng.u64(1000..LOAD_MS_MAX * 1000));
        self.load(&socket, daemon, time, takes_snapshot)?;
        drop(export);
        self.killed();
        Ok(())
    }

    fn killed(&mut self) {
        self.outcome.kills += 1;
        if self.plan.without_ring {
            drop(fs::remove_file(self.plan.folder.join("run/p0.ring")));
        }
    }

    fn check(&mut self) {
        self.outcome.checks += 1;
        if let Err(fact) = self.must(&["pool", "check", "p0"]) {
            self.outcome.bad_checks += 1;
            self.outcome.note(fact);
        }
    }

    /// Compares the volume, and a snapshot that was taken before the kill. What is found is what counts from now on.
    fn verify(&mut self) -> Result<(Process, PathBuf), String> {
        if let Some(expected) = self.snapshot.take() {
            self.verify_snapshot(&expected)?;
        }
        let (export, socket) = self.export("p0/v")?;
        let found = contents(&socket).map_err(|e| format!("p0/v: {e}"))?;
        for (index, found) in found.into_iter().enumerate() {
            let region = self.regions[index / (BLOCKS / CONNECTIONS)].get_mut();
            let region = region.map_err(|e| e.to_string())?;
            let block = &mut region[index % (BLOCKS / CONNECTIONS)];
            let allowed = &block.contents[block.acknowledged..];
            let older = &block.contents[..block.acknowledged];
            judge(&mut self.outcome, "v", index, found, allowed, older);
            *block = Block {
                contents: vec![found.unwrap_or(Content::Zeros)],
                acknowledged: 0,
                is_busy: false,
            };
        }
        Ok((export, socket))
    }

    fn verify_snapshot(&mut self, expected: &Expected) -> Result<(), String> {
        let names = self.must(&["list", "-H", "-o", "name", "p0"])?;
        if !names.lines().any(|name| name == "p0/v@s") {
            if expected.is_acknowledged {
                self.outcome.lost_snapshots += 1;
                self.outcome.note("a snapshot is not there".to_owned());
            }
            return Ok(());
        }
        let (export, socket) = self.export("p0/v@s")?;
        let found = contents(&socket).map_err(|e| format!("p0/v@s: {e}"))?;
        for (index, found) in found.into_iter().enumerate() {
            let allowed = &expected.blocks[index];
            judge(&mut self.outcome, "v@s", index, found, allowed, &[]);
        }
        self.outcome.snapshots += 1;
        drop(export);
        // Until the daemon has seen that the command is gone, the snapshot is still served.
        for _ in 0..1000 {
            if self.output(&["rm", "p0/v@s"])?.status.success() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(2));
        }
        self.must(&["rm", "p0/v@s"]).map(drop)
    }

    /// Writes over all connections until the daemon is killed.
    fn load(
        &mut self,
        socket: &Path,
        daemon: Process,
        time: Duration,
        takes_snapshot: bool,
    ) -> Result<(), String> {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = Client::connect(socket).map_err(|e| format!("p0/v: {e}"))?;
            clients.push(client);
        }
        let seeds: Vec<u64> = clients.iter().map(|_| self.rng.u64(..)).collect();
        let first_stamp = self.next_stamp;
        let this = &*self;
        let (ended, snapshot) = thread::scope(|scope| {
            let mut workers = Vec::new();
            for (index, client) in clients.into_iter().enumerate() {
                let (region, seed) = (&this.regions[index], seeds[index]);
                let stamps = first_stamp + index as u64;
                let work = move || Writer::new(client, index, region, seed, stamps).run();
                workers.push(scope.spawn(work));
            }
            let snapshot = takes_snapshot.then(|| {
                scope.spawn(|| {
                    thread::sleep(time / 2);
                    let begin = this.acknowledged();
                    let taken = this.output(&["snapshot", "p0/v@s"]);
                    let is_acknowledged = taken.is_ok_and(|output| output.status.success());
                    // What is asked for later than the answer cannot be in it.
                    let end = is_acknowledged.then(|| this.asked());
                    (begin, end)
                })
            });
            thread::sleep(time);
            daemon.kill();
            let ended: Vec<_> = workers
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            let snapshot = snapshot.map(thread::ScopedJoinHandle::join);
            (ended, snapshot)
        });
        let mut stamps = first_stamp;
        for ended in ended {
            let ended = ended.map_err(|panic| crate::parallel::message(panic.as_ref()))?;
            self.outcome.acknowledged_blocks += ended.acknowledged_blocks;
            self.outcome.failed_requests += ended.failures.len() as u64;
            ended
                .failures
                .into_iter()
                .for_each(|fact| self.outcome.note(fact));
            stamps = stamps.max(ended.next_stamp);
        }
        self.next_stamp = stamps;
        if let Some(snapshot) = snapshot {
            let (begin, end) =
                snapshot.map_err(|panic| crate::parallel::message(panic.as_ref()))?;
            let is_acknowledged = end.is_some();
            let end = end.unwrap_or_else(|| self.asked());
            let blocks = begin.into_iter().zip(end);
            self.snapshot = Some(Expected {
                is_acknowledged,
                blocks: blocks
                    .map(|(begin, contents)| contents[begin..].to_vec())
                    .collect(),
            });
        }
        Ok(())
    }

    /// Of each block, which request was acknowledged last.
    fn acknowledged(&self) -> Vec<usize> {
        self.of_each_block(|block| block.acknowledged)
    }

    /// Of each block, everything that was asked for.
    fn asked(&self) -> Vec<Vec<Content>> {
        self.of_each_block(|block| block.contents.clone())
    }

    fn of_each_block<T>(&self, look: impl Fn(&Block) -> T) -> Vec<T> {
        let regions = self.regions.iter().map(|region| region.lock().unwrap());
        regions
            .flat_map(|region| region.iter().map(&look).collect::<Vec<_>>())
            .collect()
    }
}

/// Holds what a block holds against what it may hold.
fn judge(
    outcome: &mut Outcome,
    name: &str,
    index: usize,
    found: Option<Content>,
    allowed: &[Content],
    older: &[Content],
) {
    match found {
        Some(found) if allowed.contains(&found) => return,
        // Before the first request that is known of there were zeros, or a stamp that is not kept.
        Some(found) if older.contains(&found) || found == Content::Zeros => {
            outcome.lost_blocks += 1;
        }
        Some(Content::Stamp(number)) if allowed.iter().all(|other| newer(*other, number)) => {
            outcome.lost_blocks += 1;
        }
        _ => outcome.foreign_blocks += 1,
    }
    outcome.note(format!(
        "{name}, block {index}: {found:?}, not one of {allowed:?}"
    ));
}

fn newer(content: Content, number: u64) -> bool {
    match content {
        Content::Zeros => true,
        Content::Stamp(other) => other > number,
    }
}

/// What each block of an export holds; none for what nobody wrote there.
fn contents(socket: &Path) -> std::io::Result<Vec<Option<Content>>> {
    const BYTES: u32 = 1 << 20;
    let mut client = Client::connect(socket)?;
    let mut found = Vec::with_capacity(BLOCKS);
    for offset in (0..BLOCKS as u64 * BLOCK).step_by(BYTES as usize) {
        let data = client.read(offset, BYTES)?;
        for block in data.chunks_exact(4096) {
            found.push(content(block, found.len() as u64));
        }
    }
    Ok(found)
}

fn content(block: &[u8], index: u64) -> Option<Content> {
    if block.iter().all(|byte| *byte == 0) {
        return Some(Content::Zeros);
    }
    let number = block.get(16..24)?.try_into().ok().map(u64::from_le_bytes)?;
    (block == stamped(index, number)).then_some(Content::Stamp(number))
}

/// A block that only this request leaves.
fn stamped(index: u64, number: u64) -> Vec<u8> {
    let words = [MAGIC, index, number, MAGIC ^ index ^ number.rotate_left(17)];
    let record: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    record.repeat(4096 / record.len())
}

/// One connection's load.
struct Writer<'a> {
    client: Client,
    first_block: usize,
    region: &'a Region,
    rng: Rng,
    next_stamp: u64,
    under_way: Vec<(u64, usize, usize)>,
    next_cookie: u64,
    ended: Ended,
}

/// What a connection's load came to.
#[derive(Default)]
struct Ended {
    acknowledged_blocks: u64,
    next_stamp: u64,
    failures: Vec<String>,
}

impl<'a> Writer<'a> {
    fn new(client: Client, index: usize, region: &'a Region, seed: u64, stamps: u64) -> Self {
        Self {
            client,
            first_block: index * (BLOCKS / CONNECTIONS),
            region,
            rng: Rng::with_seed(seed),
            next_stamp: stamps,
            under_way: Vec::new(),
            next_cookie: 0,
            ended: Ended::default(),
        }
    }

    /// Runs until the connection ends.
    fn run(mut self) -> Ended {
        loop {
            while self.under_way.len() < DEPTH {
                if self.ask().is_err() {
                    return self.end();
                }
            }
            let Ok(reply) = self.client.receive() else {
                return self.end();
            };
            let position = self
                .under_way
                .iter()
                .position(|(cookie, ..)| *cookie == reply.cookie);
            let Some(position) = position else {
                self.ended.failures.push("an answer to nothing".to_owned());
                return self.end();
            };
            let (_, from, count) = self.under_way.swap_remove(position);
            if reply.errno != 0 {
                let fact = format!("a request at block {from}: errno {}", reply.errno);
                self.ended.failures.push(fact);
                return self.end();
            }
            let mut region = self.region.lock().unwrap();
            for block in &mut region[from..from + count] {
                block.acknowledged = block.contents.len() - 1;
                block.is_busy = false;
            }
            self.ended.acknowledged_blocks += count as u64;
        }
    }

    fn end(mut self) -> Ended {
        self.ended.next_stamp = self.next_stamp;
        self.ended
    }

    /// Sends one request on blocks that no other is on.
    fn ask(&mut self) -> std::io::Result<()> {
        let (mut from, mut count) = (0, 0);
        let command = match self.rng.u32(..20) {
            0 => nbd::FLUSH,
            1 => nbd::TRIM,
            2 => nbd::WRITE_ZEROES,
            _ => nbd::WRITE,
        };
        let flags = match self.rng.u32(..16) {
            0 if command != nbd::FLUSH => nbd::FUA,
            1 if command == nbd::WRITE_ZEROES => nbd::NO_HOLE,
            _ => 0,
        };
        let mut payload = Vec::new();
        if command != nbd::FLUSH {
            let mut region = self.region.lock().unwrap();
            count = self.rng.usize(1..=RUN_MAX);
            from = self.rng.usize(..=region.len() - count);
            while region[from..from + count].iter().any(|block| block.is_busy) {
                from = self.rng.usize(..=region.len() - count);
            }
            for (index, block) in region[from..from + count].iter_mut().enumerate() {
                block.is_busy = true;
                if command != nbd::WRITE {
                    block.contents.push(Content::Zeros);
                    continue;
                }
                let number = self.next_stamp;
                self.next_stamp += CONNECTIONS as u64;
                block.contents.push(Content::Stamp(number));
                let index = (self.first_block + from + index) as u64;
                payload.extend(stamped(index, number));
            }
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.under_way.push((cookie, from, count));
        let ask = Ask {
            cookie,
            command,
            flags,
            offset: (self.first_block + from) as u64 * BLOCK,
            bytes: u32::try_from(count).unwrap_or(0) * 4096,
        };
        self.client.send(ask, &payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_by_its_place_and_number() {
        let block = stamped(7, 9);
        assert_eq!(content(&block, 7), Some(Content::Stamp(9)));
        assert_eq!(content(&block, 8), None);
        assert_eq!(content(&[0; 4096], 8), Some(Content::Zeros));
        let mut mixed = stamped(7, 9);
        mixed[2048..].copy_from_slice(&stamped(7, 10)[2048..]);
        assert_eq!(content(&mixed, 7), None);
    }

    #[test]
    fn what_is_older_than_the_acknowledged_is_lost() {
        let judged = |found, allowed: &[Content]| {
            let mut outcome = Outcome::default();
            judge(&mut outcome, "v", 0, found, allowed, &[]);
            (outcome.lost_blocks, outcome.foreign_blocks)
        };
        let window = [Content::Stamp(5), Content::Stamp(9)];
        assert_eq!(judged(Some(Content::Stamp(5)), &window), (0, 0));
        assert_eq!(judged(Some(Content::Stamp(4)), &window), (1, 0));
        assert_eq!(judged(Some(Content::Zeros), &window), (1, 0));
        assert_eq!(judged(Some(Content::Stamp(6)), &window), (0, 1));
        assert_eq!(judged(None, &window), (0, 1));
    }
}
