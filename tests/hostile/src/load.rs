//! A client that does its work while others are hostile: it writes, reads back, flushes and trims a volume over NBD, knows what
//! each block holds, and counts.

use super::machine::{Machine, Server};
use nbd_client::{Client, FLUSH, TRIM, WRITE_ZEROES};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The volume, which no hostile case names.
const VOLUME: &str = "io";
const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;
/// Blocks of the longest request.
const RUN_MAX: u64 = 8;
/// Between two operations, so that the processors are for the hostile ones.
const PAUSE: Duration = Duration::from_micros(200);

/// What such clients met.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Met {
    /// Operations that were answered, each in the right way.
    pub(crate) operations: u64,
    /// Those that failed, or read what was not written.
    pub(crate) errors: u64,
    /// The longest that one took.
    pub(crate) waited: Duration,
}

impl Met {
    pub(crate) fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.errors += other.errors;
        self.waited = self.waited.max(other.waited);
    }
}

/// The client and its volume.
pub(crate) struct Load {
    client: Client,
    /// The number of the last write to each block; 0 for zeros.
    stamps: Vec<u64>,
    next: u64,
    rng: fastrand::Rng,
    met: Met,
    first_error: Option<String>,
    /// The export ends with it.
    _server: Server,
}

impl Load {
    /// The volume made and served by the machine's daemon, and the client connected.
    pub(crate) fn new(machine: &Machine, seed: u64) -> Self {
        let size = format!("{}K", BLOCKS * BLOCK as u64 / 1024);
        let target = format!("p0/{VOLUME}");
        let said = machine.run(&["create", &target, "--size", &size]);
        assert_eq!(said.code, Some(0), "{said:?}");
        let (server, socket) = machine.serve_nbd(&target);
        Self {
            client: Client::connect(&socket).unwrap(),
            stamps: vec![0; usize::try_from(BLOCKS).unwrap()],
            next: 1,
            rng: fastrand::Rng::with_seed(seed),
            met: Met::default(),
            first_error: None,
            _server: server,
        }
    }

    /// Works until it is over, then reads everything once more.
    pub(crate) fn run(mut self, is_over: &AtomicBool) -> (Met, Result<(), String>) {
        while !is_over.load(Ordering::Relaxed) {
            self.step();
            thread::sleep(PAUSE);
        }
        for first in (0..BLOCKS).step_by(8) {
            self.note(|load| load.read(first, 8));
        }
        let ended = self.first_error.map_or(Ok(()), Err);
        (self.met, ended)
    }

    fn step(&mut self) {
        let first = self.rng.u64(0..BLOCKS);
        let count = self.rng.u64(1..=RUN_MAX.min(BLOCKS - first));
        match self.rng.u8(0..16) {
            0 => self.note(|load| load.client.change(FLUSH, 0, 0)),
            1 => self.note(|load| load.zero(TRIM, first, count)),
            2 => self.note(|load| load.zero(WRITE_ZEROES, first, count)),
            3..=8 => self.note(|load| load.write(first, count)),
            _ => self.note(|load| load.read(first, count)),
        }
    }

    fn note(&mut self, work: impl FnOnce(&mut Self) -> io::Result<()>) {
        let begun = Instant::now();
        let ended = work(self);
        self.met.waited = self.met.waited.max(begun.elapsed());
        match ended {
            Ok(()) => self.met.operations += 1,
            Err(error) => {
                self.met.errors += 1;
                let number = self.met.operations + self.met.errors;
                let fact = format!("operation {number} over NBD: {error}");
                self.first_error.get_or_insert(fact);
            }
        }
    }

    fn write(&mut self, first: u64, count: u64) -> io::Result<()> {
        let stamp = self.next;
        self.next += 1;
        let bytes: Vec<u8> = (first..first + count)
            .flat_map(|block| content(block, stamp))
            .collect();
        self.client.write(first * BLOCK as u64, &bytes)?;
        self.stamped(first, count, stamp);
        Ok(())
    }

    fn zero(&mut self, command: u16, first: u64, count: u64) -> io::Result<()> {
        let (offset, bytes) = range(first, count);
        self.client.change(command, offset, bytes)?;
        self.stamped(first, count, 0);
        Ok(())
    }

    fn stamped(&mut self, first: u64, count: u64, stamp: u64) {
        for block in first..first + count {
            self.stamps[usize::try_from(block).unwrap()] = stamp;
        }
    }

    fn read(&mut self, first: u64, count: u64) -> io::Result<()> {
        let (offset, bytes) = range(first, count);
        let data = self.client.read(offset, bytes)?;
        for (block, found) in (first..first + count).zip(data.chunks_exact(BLOCK)) {
            let stamp = self.stamps[usize::try_from(block).unwrap()];
            if found != content(block, stamp) {
                let found: Vec<u8> = found[..16].to_vec();
                let fact = format!("block {block} holds {found:?}, not write {stamp}");
                return Err(io::Error::other(fact));
            }
        }
        Ok(())
    }
}

/// What a write leaves in a block: its place and the write's number throughout.
fn content(block: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    let unit = [block.to_le_bytes(), stamp.to_le_bytes()].concat();
    unit.repeat(BLOCK / unit.len())
}

fn range(first: u64, count: u64) -> (u64, u32) {
    let block = BLOCK as u64;
    (first * block, u32::try_from(count * block).unwrap())
}
