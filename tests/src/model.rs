//! A pool as a test understands it: a map from block to stamp for each volume and snapshot, driven by seeded random
//! operations beside the real pool, and compared with it block by block.
//!
//! After a crash a block of a volume may hold what the last flush covered or anything written later: the window. Each
//! stamp is unique, so a foreign or an old block is recognised.

use crate::short_way;
use crate::sim_device::{Fault, FaultKind, Loss, SimDevice};
use blockfork::clock::ManualClock;
use blockfork::device::BlockBuf;
use blockfork::error::ErrorKind;
use blockfork::name::{Name, VolumePath};
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use fastrand::Rng;
use futures_lite::future::block_on;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// A smaller pool is nearly full from the start.
const ROOMY_BLOCKS: u64 = 8192;

/// What a block holds: 0 for zeros, else a stamp that no other write has.
pub type Stamp = u64;

/// The blocks of a volume or snapshot as the model has them, and what a crash may turn them into.
#[derive(Clone, Debug, Default)]
struct Content {
    blocks: u64,
    now: BTreeMap<u64, Stamp>,
    /// Everything that each block held since the last flush, the value at that flush included.
    window: BTreeMap<u64, BTreeSet<Stamp>>,
    /// What the request that failed last would have left: it may have taken effect.
    unsure: BTreeMap<u64, Stamp>,
}

impl Content {
    fn get(&self, lba: u64) -> Stamp {
        self.now.get(&lba).copied().unwrap_or(0)
    }

    fn set(&mut self, lba: u64, stamp: Stamp) {
        let old = self.get(lba);
        self.window
            .entry(lba)
            .or_insert_with(|| BTreeSet::from([old]))
            .insert(stamp);
        self.now.insert(lba, stamp);
    }

    fn flushed(&mut self) {
        self.window.clear();
    }
}

/// What a request does to its blocks.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// Writes stamps from this one on.
    Write(Stamp),
    Discard,
    Zero {
        keep_space: bool,
    },
}

/// A request, as the kernel keeps it until it is answered: for the next daemon, if this one dies.
#[derive(Clone, Debug)]
struct Request {
    volume: String,
    start: u64,
    count: u64,
    change: Change,
}

/// Which steps of a seed's history are taken. Each has random numbers of its own, so that it is the same whether those
/// before it are left out or not, as far as there is still something for it to do.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Only these, if any are named.
    pub kept: Option<BTreeSet<u32>>,
    /// Whether each says on stderr what it does.
    pub is_told: bool,
}

/// A pool and its model.
#[derive(Debug)]
pub struct Pair {
    seed: u64,
    history: History,
    /// Steps so far, those left out included.
    steps: u32,
    device: SimDevice,
    /// The pool's size when it was made.
    first_blocks: u64,
    /// The two volumes that were forked last.
    forked: Vec<String>,
    /// The request that was under way when the device failed.
    unanswered: Option<Request>,
    /// A volume that fills most of the pool and is left alone.
    filler: Option<String>,
    /// Whether the device refuses one operation and goes on.
    is_refusing: bool,
    pool: Option<Arc<Pool>>,
    volumes: BTreeMap<String, Content>,
    snapshots: BTreeMap<(String, String), Content>,
    attached: BTreeMap<String, Arc<Attached>>,
    next_stamp: Stamp,
    next_name: u64,
    rng: Rng,
    ring: Option<PathBuf>,
    clock: Arc<ManualClock>,
    redirect: Redirect,
    max_blocks: u64,
}

fn path(volume: &str, snapshot: Option<&str>) -> VolumePath {
    VolumePath {
        volume: volume.parse().unwrap(),
        snapshot: snapshot.map(|name| name.parse().unwrap()),
    }
}

fn fill(buffer: &mut [u8], stamp: Stamp) {
    for word in buffer.chunks_exact_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
}

fn stamp_of(block: &[u8]) -> Stamp {
    let stamp = Stamp::from_le_bytes(block[..8].try_into().unwrap());
    assert!(
        block[8..] == block[..block.len() - 8],
        "a block holds a mix of stamps, the first {stamp}"
    );
    stamp
}

impl Pair {
    /// A new pool of `pool_blocks` with one volume, driven by `seed`.
    pub fn new(seed: u64, pool_blocks: u64, with_ring: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let ring = with_ring.then(|| {
            std::env::temp_dir().join(format!(
                "blockfork-model-{}-{seed}.ring",
                std::process::id()
            ))
        });
        let redirect = if rng.u8(..4) == 0 {
            Redirect::Always
        } else {
            Redirect::Shared
        };
        // A block written in place tears where the device below does; one that is redirected never does.
        let sector = if redirect == Redirect::Always {
            512
        } else {
            4096
        };
        let mut pair = Self {
            seed,
            history: History::default(),
            steps: 0,
            device: SimDevice::with_sector(pool_blocks, sector),
            first_blocks: pool_blocks,
            forked: Vec::new(),
            unanswered: None,
            filler: None,
            is_refusing: false,
            pool: None,
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            attached: BTreeMap::new(),
            next_stamp: 1,
            next_name: 0,
            redirect,
            max_blocks: match rng.u8(..8) {
                0..3 => 24,
                3..5 => 700,
                5..7 => 200_000,
                _ => 3 << 32,
            },
            rng,
            ring,
            clock: Arc::new(ManualClock::default()),
        };
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([seed.to_le_bytes()[0]; 16]),
            blocks: pool_blocks,
            created: Timestamp(1),
        };
        block_on(Pool::create(&pair.device, options)).unwrap();
        pair.open();
        pair.create();
        if pool_blocks < ROOMY_BLOCKS {
            pair.fill();
        }
        pair
    }

    /// Leaves room for a few hundred blocks.
    fn fill(&mut self) {
        let name = self.fresh_name();
        let left = 50 + self.rng.u64(..400);
        let options = VolumeOptions {
            bytes: self.first_blocks * 4096,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        block_on(
            self.pool()
                .create_volume(&self.device, &name.parse().unwrap(), options),
        )
        .unwrap();
        let filler = self.pool().attach(&path(&name, None), false).unwrap();
        let buffer = BlockBuf::zeroed(64);
        let mut at = 0;
        loop {
            let free = self.pool().status().free_bytes / 4096;
            let count = free.saturating_sub(left).min(64);
            if count == 0 {
                break;
            }
            let bytes = usize::try_from(count * 4096).unwrap();
            block_on(filler.write(&self.device, at * 4096, &buffer[..bytes])).unwrap();
            at += count;
        }
        block_on(self.pool().checkpoint(&self.device)).unwrap();
        self.filler = Some(name);
    }

    fn pool(&self) -> &Arc<Pool> {
        self.pool.as_ref().unwrap()
    }

    fn options(&self) -> OpenOptions {
        let ring = match &self.ring {
            Some(path) => RingPlace::File {
                path: path.clone(),
                boot_id: [1; 16],
            },
            None => RingPlace::Nowhere,
        };
        OpenOptions {
            read_only: false,
            device_blocks: self.device.blocks(),
            ring,
            clock: self.clock.clone(),
        }
    }

    fn open(&mut self) {
        let pool = block_on(Pool::open(&self.device, self.options())).expect("the pool opens");
        self.pool = Some(Arc::new(pool));
    }

    fn fresh_name(&mut self) -> String {
        self.next_name += 1;
        format!("n{}", self.next_name)
    }

    fn attached(&mut self, volume: &str) -> Arc<Attached> {
        if let Some(attached) = self.attached.get(volume) {
            return Arc::clone(attached);
        }
        let attached = self.pool().attach(&path(volume, None), false).unwrap();
        self.attached
            .insert(volume.to_owned(), Arc::clone(&attached));
        attached
    }

    fn flushed(&mut self) {
        for content in self.volumes.values_mut() {
            content.flushed();
        }
    }

    /// Often one of the last pair that share everything.
    fn pick_volume(&mut self) -> Option<String> {
        let is_there = |name: &&String| self.volumes.contains_key(*name);
        let pair: Vec<String> = self.forked.iter().filter(is_there).cloned().collect();
        if pair.len() > 1 && self.rng.bool() {
            return self.rng.choice(pair);
        }
        let names: Vec<String> = self.volumes.keys().cloned().collect();
        self.rng.choice(names)
    }

    fn pick_snapshot(&mut self) -> Option<(String, String)> {
        let names: Vec<(String, String)> = self.snapshots.keys().cloned().collect();
        self.rng.choice(names)
    }

    /// A place in a volume, near others so that writes meet.
    fn pick_range(&mut self, blocks: u64, most: u64) -> (u64, u64) {
        let start = match self.rng.u8(..4) {
            0 => self.rng.u64(..blocks),
            1 => self.rng.u64(..blocks.min(64)),
            2 => (512 + self.rng.u64(..8)).min(blocks - 1).saturating_sub(4),
            _ => self.rng.u64(..blocks.min(1100)),
        };
        // Where a volume is that large, also where 32 bits do not reach.
        let lap = start + ((1 + self.rng.u64(..4)) << 32);
        let start = if lap < blocks && self.rng.bool() {
            lap
        } else {
            start
        };
        let count = 1 + self.rng.u64(..most);
        (start, count.min(blocks - start))
    }

    fn create(&mut self) {
        let name = self.fresh_name();
        let blocks = 1 + self.rng.u64(..self.max_blocks);
        let options = VolumeOptions {
            bytes: blocks * 4096,
            sector_bytes: 4096,
            redirect: self.redirect,
        };
        let name_typed: Name = name.parse().unwrap();
        match block_on(
            self.pool()
                .create_volume(&self.device, &name_typed, options),
        ) {
            Ok(_) => {
                self.flushed();
                let content = Content {
                    blocks,
                    ..Content::default()
                };
                self.volumes.insert(name, content);
            }
            Err(error) => {
                self.failed(&error);
            }
        }
    }

    /// Writes, discards or zeroes; true if the device failed.
    fn change_blocks(&mut self) -> bool {
        let Some(volume) = self.pick_volume() else {
            return false;
        };
        let blocks = self.volumes[&volume].blocks;
        // Now and then whole leaves, which go in one piece where they are shared.
        let takes_leaves = blocks >= 1024 && self.rng.u8(..20) == 0;
        let (start, count) = if takes_leaves {
            (0, 512 * (1 + self.rng.u64(..2)))
        } else {
            self.pick_range(blocks, 20)
        };
        let kind = if takes_leaves { 8 } else { self.rng.u8(..10) };
        let change = match kind {
            0..7 => Change::Write(self.next_stamp),
            7..9 => Change::Discard,
            _ => Change::Zero {
                keep_space: self.rng.bool(),
            },
        };
        if let Change::Write(first) = change {
            self.next_stamp = first + count;
        }
        self.carry_out(Request {
            volume,
            start,
            count,
            change,
        })
    }

    /// Carries a request out, the first time or again; true if the device failed.
    fn carry_out(&mut self, request: Request) -> bool {
        let Request {
            volume,
            start,
            count,
            change,
        } = request.clone();
        self.tell(&request);
        let attached = self.attached(&volume);
        let content = self.volumes.get_mut(&volume).unwrap();
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        let (offset, bytes) = (start * 4096, count * 4096);
        let result = match change {
            Change::Write(first) => {
                for (stamp, block) in (first..).zip(buffer.chunks_exact_mut(4096)) {
                    fill(block, stamp);
                }
                block_on(short_way::write(&attached, &self.device, offset, &buffer))
            }
            Change::Discard => block_on(attached.discard(&self.device, offset, bytes)),
            Change::Zero { keep_space } => {
                block_on(attached.write_zeroes(&self.device, offset, bytes, keep_space))
            }
        };
        match result {
            Ok(()) => {
                for (lba, block) in (start..).zip(buffer.chunks_exact(4096)) {
                    content.set(lba, stamp_of(block));
                }
                false
            }
            Err(error) => {
                // Whatever part of it took place: each block holds one or the other.
                for (lba, block) in (start..).zip(buffer.chunks_exact(4096)) {
                    let old = content.get(lba);
                    content.set(lba, stamp_of(block));
                    content.now.insert(lba, old);
                    content.unsure.insert(lba, stamp_of(block));
                }
                if self.is_refusing || error.kind() == ErrorKind::OutOfSpace {
                    let has_read = self.adopt(&volume, start, count);
                    return !has_read || error.kind() != ErrorKind::OutOfSpace;
                }
                assert!(
                    matches!(error.kind(), ErrorKind::Io | ErrorKind::Poisoned),
                    "{error}"
                );
                self.unanswered = Some(request);
                true
            }
        }
    }

    /// After a request that failed halfway: takes over what the blocks hold, which must be old or new. False if the
    /// device failed for good meanwhile.
    fn adopt(&mut self, volume: &str, start: u64, count: u64) -> bool {
        let attached = self.attached(volume);
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        // The first try may be the one operation that the device refuses.
        let has_read = (0..2)
            .any(|_| block_on(attached.read(&self.device, start * 4096, &mut buffer)).is_ok());
        if !has_read {
            return false;
        }
        let content = self.volumes.get_mut(volume).unwrap();
        for (lba, block) in (start..).zip(buffer.chunks_exact(4096)) {
            let stamp = stamp_of(block);
            assert!(
                content.window[&lba].contains(&stamp),
                "block {lba} holds {stamp}"
            );
            content.now.insert(lba, stamp);
            content.unsure.remove(&lba);
        }
        true
    }

    fn snapshot(&mut self) -> bool {
        let count = 1 + self.rng.usize(..2);
        let mut volumes: Vec<String> = self.volumes.keys().cloned().collect();
        self.rng.shuffle(&mut volumes);
        volumes.truncate(count);
        self.snapshot_of(volumes)
    }

    /// Takes a snapshot of these at once, under a new name.
    fn snapshot_of(&mut self, volumes: Vec<String>) -> bool {
        let name = self.fresh_name();
        let targets: Vec<VolumePath> = volumes
            .iter()
            .map(|volume| path(volume, Some(&name)))
            .collect();
        if targets.is_empty() {
            return false;
        }
        match block_on(self.pool().snapshot(&self.device, &targets)) {
            Ok(()) => {
                self.flushed();
                for volume in volumes {
                    let content = self.volumes[&volume].clone();
                    self.snapshots.insert((volume, name.clone()), content);
                }
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    #[expect(clippy::unused_self, reason = "reads as a step of the run")]
    fn failed(&self, error: &blockfork::error::Error) -> bool {
        assert!(
            matches!(
                error.kind(),
                ErrorKind::Io | ErrorKind::Poisoned | ErrorKind::OutOfSpace
            ),
            "{error}"
        );
        error.kind() != ErrorKind::OutOfSpace
    }

    fn clone_snapshot(&mut self) -> bool {
        match self.pick_snapshot() {
            Some((volume, snapshot)) => self.clone_of(volume, snapshot),
            None => false,
        }
    }

    fn clone_of(&mut self, volume: String, snapshot: String) -> bool {
        let name = self.fresh_name();
        let made = block_on(self.pool().clone_snapshot(
            &self.device,
            &path(&volume, Some(&snapshot)),
            &name.parse().unwrap(),
        ));
        match made {
            Ok(_) => {
                self.flushed();
                let content = self.snapshots[&(volume, snapshot)].clone();
                self.volumes.insert(name, content);
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    fn rollback(&mut self) -> bool {
        let Some((volume, snapshot)) = self.pick_snapshot() else {
            return false;
        };
        match block_on(
            self.pool()
                .rollback(&self.device, &path(&volume, Some(&snapshot))),
        ) {
            Ok(()) => {
                self.flushed();
                let content = self.snapshots[&(volume.clone(), snapshot)].clone();
                self.volumes.insert(volume, content);
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    fn remove(&mut self) -> bool {
        let targets = if self.rng.bool() {
            self.pick_snapshot()
                .map(|(volume, snapshot)| (volume, Some(snapshot)))
        } else if self.volumes.len() > 1 {
            self.pick_volume().map(|volume| (volume, None))
        } else {
            None
        };
        match targets {
            Some((volume, snapshot)) => self.remove_one(volume, snapshot),
            None => false,
        }
    }

    /// Two volumes that share everything, and nobody else does: a snapshot, a clone of it, and the snapshot goes.
    fn fork(&mut self) -> bool {
        if self.volumes.len() > 8 {
            return false;
        }
        let Some(volume) = self.pick_volume() else {
            return false;
        };
        if self.snapshot_of(vec![volume.clone()]) {
            return true;
        }
        let name = format!("n{}", self.next_name);
        if !self.snapshots.contains_key(&(volume.clone(), name.clone())) {
            return false;
        }
        if self.clone_of(volume.clone(), name.clone())
            || self.remove_one(volume.clone(), Some(name))
        {
            return true;
        }
        self.forked = vec![volume, format!("n{}", self.next_name)];
        for _ in 0..100 {
            if self.pool().status().reclaiming == 0 {
                break;
            }
            if self.maintain() {
                return true;
            }
        }
        false
    }

    fn remove_one(&mut self, volume: String, snapshot: Option<String>) -> bool {
        if snapshot.is_none() {
            self.attached.remove(&volume);
        }
        let target = path(&volume, snapshot.as_deref());
        match block_on(self.pool().remove(&self.device, &[target], true, false)) {
            Ok(_) => {
                self.flushed();
                if let Some(snapshot) = snapshot {
                    self.snapshots.remove(&(volume, snapshot));
                } else {
                    self.snapshots.retain(|(of, _), _| *of != volume);
                    self.volumes.remove(&volume);
                }
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    fn resize(&mut self) -> bool {
        let Some(volume) = self.pick_volume() else {
            return false;
        };
        let blocks = 1 + self.rng.u64(..self.max_blocks);
        self.attached.remove(&volume);
        match block_on(self.pool().resize(
            &self.device,
            &volume.parse().unwrap(),
            blocks * 4096,
            true,
        )) {
            Ok(()) => {
                self.flushed();
                let content = self.volumes.get_mut(&volume).unwrap();
                content.blocks = blocks;
                content.now.retain(|lba, _| *lba < blocks);
                false
            }
            Err(error) if error.kind() == ErrorKind::OutOfSpace => {
                // What was to be cut off may be gone in part.
                self.adopt_all(&volume)
            }
            Err(error) => self.failed(&error),
        }
    }

    fn adopt_all(&mut self, volume: &str) -> bool {
        let held: Vec<u64> = self.volumes[volume].now.keys().copied().collect();
        for lba in held {
            let content = self.volumes.get_mut(volume).unwrap();
            let old = content.get(lba);
            content.set(lba, 0);
            content.now.insert(lba, old);
            self.adopt(volume, lba, 1);
        }
        false
    }

    fn flush(&mut self) -> bool {
        match block_on(self.pool().flush(&self.device)) {
            Ok(()) => {
                self.flushed();
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    fn maintain(&mut self) -> bool {
        self.clock.advance_ns(self.rng.u64(..3_000_000_000));
        match block_on(self.pool().maintain(&self.device)) {
            Ok(_) => false,
            Err(error) => self.failed(&error),
        }
    }

    /// The device below has become larger, and the pool takes that into use.
    fn grow(&mut self) -> bool {
        let blocks = self.device.blocks() + 1 + self.rng.u64(..1000);
        if blocks > 2 * self.first_blocks {
            return false;
        }
        self.device.grow(blocks);
        match block_on(self.pool().grow(&self.device, blocks)) {
            Ok(()) => {
                self.flushed();
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    fn checkpoint(&mut self) -> bool {
        match block_on(self.pool().checkpoint(&self.device)) {
            Ok(()) => {
                self.flushed();
                false
            }
            Err(error) => self.failed(&error),
        }
    }

    /// One random operation; true if the device failed under it.
    fn step(&mut self) -> bool {
        match self.rng.u8(..100) {
            0..57 => self.change_blocks(),
            57..58 => {
                self.check();
                self.flushed();
                false
            }
            58..60 => self.told("fork", Self::fork),
            60..66 => self.told("flush", Self::flush),
            66..67 => self.told("grow the pool", Self::grow),
            67..74 => self.told("snapshot", Self::snapshot),
            74..78 => self.told("clone", Self::clone_snapshot),
            78..81 => self.told("roll back", Self::rollback),
            81..85 => self.told("remove", Self::remove),
            85..87 => self.told("resize", Self::resize),
            87..95 => self.told("background work", Self::maintain),
            95..98 => self.told("checkpoint", Self::checkpoint),
            98 if self.volumes.len() < 6 => self.told("create", |pair| {
                pair.create();
                false
            }),
            _ => {
                self.compare_some();
                false
            }
        }
    }

    fn told(&mut self, what: &str, step: impl FnOnce(&mut Self) -> bool) -> bool {
        self.tell(&what);
        step(self)
    }

    fn tell(&self, what: &dyn std::fmt::Debug) {
        if self.history.is_told {
            eprintln!("step {}: {what:?}", self.steps - 1);
        }
    }

    /// Takes only these steps.
    #[must_use]
    pub fn with_history(mut self, history: History) -> Self {
        self.history = history;
        self
    }

    /// Begins a step; whether it is taken.
    fn begin(&mut self) -> bool {
        self.steps += 1;
        let number = u64::from(self.steps);
        self.rng = Rng::with_seed(self.seed ^ (number << 40));
        let kept = self.history.kept.as_ref();
        kept.is_none_or(|kept| kept.contains(&(self.steps - 1)))
    }

    /// Steps of [`Self::run`]: the operations, and the end of each round.
    pub fn count(rounds: u32, steps: u32) -> u32 {
        rounds * (steps + 1)
    }

    /// Runs `steps` operations, then closes or crashes, and compares everything. Repeats `rounds` times.
    pub fn run(&mut self, rounds: u32, steps: u32) {
        for _ in 0..rounds {
            for _ in 0..steps {
                if self.begin() {
                    self.step();
                }
            }
            if self.begin() {
                self.end_round();
            }
        }
        self.remove_everything();
    }

    fn end_round(&mut self) {
        let ending = self.rng.u8(..4);
        self.tell(&["close", "kill", "power cut, all lost", "power cut"][usize::from(ending)]);
        match ending {
            0 => self.reopen_clean(),
            1 => self.crash(Loss::None),
            2 => self.crash(Loss::All),
            _ => self.crash(Loss::Some),
        }
        self.compare_all();
        self.check();
    }

    fn reopen_clean(&mut self) {
        self.attached.clear();
        block_on(self.pool().close(&self.device)).unwrap();
        self.flushed();
        self.pool = None;
        let mut rng = self.rng.fork();
        self.device.restart(Loss::All, &mut rng);
        self.open();
    }

    /// The process dies somewhere in the next operations, with a power cut or without; or the device refuses one of
    /// them, the others go on, and the process dies then.
    fn crash(&mut self, loss: Loss) {
        if self.rng.bool() {
            self.fork();
        }
        // Nothing but the last operation may be under way when it happens.
        let mut with_power = loss == Loss::None && self.ring.is_some();
        self.is_refusing = self.rng.u8(..3) == 0;
        let most = if self.rng.bool() { 12 } else { 40 };
        let operations = self.rng.u64(..most);
        if self.is_refusing {
            let kinds = [
                FaultKind::Io,
                FaultKind::NoSpace,
                FaultKind::Short,
                FaultKind::Interrupted,
            ];
            self.device.fail(Fault {
                call: self.device.operations() + operations,
                kind: kinds[self.rng.usize(..4)],
                is_sticky: false,
            });
        } else {
            self.device.fail_after(operations);
        }
        for _ in 0..20 {
            // Only block changes, flushes and background work: what a failed command left is compared elsewhere.
            let failed = match self.rng.u8(..16) {
                0..3 => self.flush(),
                3..6 => self.maintain(),
                6 => self.grow(),
                _ => self.change_blocks(),
            };
            if failed && !self.is_refusing {
                break;
            }
        }
        self.is_refusing = false;
        self.lose(loss);
        // Now and then recovery does not come to its end either, or is all there is.
        while self.rng.u8(..3) == 0 {
            let again = if with_power || self.rng.bool() {
                Loss::None
            } else {
                loss
            };
            self.device.fail_after(self.rng.u64(..24));
            if let Err(error) = block_on(Pool::open(&self.device, self.options())) {
                assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            }
            with_power &= again == Loss::None;
            self.lose(again);
        }
        self.open();
        self.resolve(with_power);
        if let Some(request) = self.unanswered.take()
            && with_power
        {
            // The kernel sends again what nobody answered; others may have been quicker.
            if self.rng.bool() {
                self.snapshot_of(vec![request.volume.clone()]);
            }
            self.carry_out(request);
        }
    }

    /// What a kill or a power cut leaves.
    fn lose(&mut self, loss: Loss) {
        self.attached.clear();
        self.pool = None;
        let mut rng = self.rng.fork();
        self.device.restart(loss, &mut rng);
        if loss != Loss::None
            && let Some(ring) = &self.ring
        {
            // The tmpfs is gone with the power.
            let _gone = std::fs::remove_file(ring);
        }
    }

    /// Takes over what a crash left, each block within its window; with a ring and power, nothing may be lost.
    fn resolve(&mut self, nothing_lost: bool) {
        let names: Vec<String> = self.volumes.keys().cloned().collect();
        for volume in names {
            let attached = self.attached(&volume);
            let content = self.volumes.get_mut(&volume).unwrap();
            let unsure = std::mem::take(&mut content.unsure);
            let mut buffer = BlockBuf::zeroed(1);
            for (lba, window) in std::mem::take(&mut content.window) {
                if lba >= content.blocks {
                    continue;
                }
                block_on(short_way::read(
                    &attached,
                    &self.device,
                    lba * 4096,
                    &mut buffer,
                ))
                .unwrap();
                let stamp = stamp_of(&buffer);
                assert!(
                    window.contains(&stamp),
                    "{volume} block {lba}: {stamp} is not in {window:?}"
                );
                let expected = content.now.get(&lba).copied().unwrap_or(0);
                let is_failed_request = unsure.get(&lba) == Some(&stamp);
                assert!(
                    !nothing_lost || stamp == expected || is_failed_request,
                    "{volume} block {lba}: {stamp} instead of {expected}, though only the process died"
                );
                content.now.insert(lba, stamp);
            }
        }
    }

    fn compare_some(&mut self) {
        if let Some((volume, snapshot)) = self.pick_snapshot() {
            self.compare(&volume, Some(&snapshot));
        }
        if let Some(volume) = self.pick_volume() {
            self.compare(&volume, None);
        }
    }

    /// Compares every volume and snapshot with its model.
    pub fn compare_all(&mut self) {
        let volumes: Vec<String> = self.volumes.keys().cloned().collect();
        let snapshots: Vec<(String, String)> = self.snapshots.keys().cloned().collect();
        for volume in &volumes {
            self.compare(volume, None);
        }
        for (volume, snapshot) in &snapshots {
            self.compare(volume, Some(snapshot));
        }
        let listed = block_on(self.pool().list(&self.device)).unwrap();
        let fillers = usize::from(self.filler.is_some());
        assert_eq!(listed.len(), volumes.len() + snapshots.len() + fillers);
    }

    fn compare(&mut self, volume: &str, snapshot: Option<&str>) {
        let (attached, content) = match snapshot {
            None => (self.attached(volume), &self.volumes[volume]),
            Some(name) => {
                let attached = self.pool().attach(&path(volume, snapshot), true).unwrap();
                (
                    attached,
                    &self.snapshots[&(volume.to_owned(), name.to_owned())],
                )
            }
        };
        assert_eq!(attached.bytes(), content.blocks * 4096);
        // The neighbourhoods that operations use, and the blocks beyond that the model knows.
        let near = content.blocks.min(1200);
        let beyond = content.now.range(near..).map(|(lba, _)| *lba);
        let mut rng = Rng::with_seed(self.seed);
        let mut buffer = BlockBuf::zeroed(16);
        let mut blocks = (0..near).chain(beyond).peekable();
        while let Some(first) = blocks.next() {
            // Often one block, which the short way takes, and often a run, which may lie anywhere.
            let most = [1, 4, 16][rng.usize(..3)];
            let mut end = first + 1;
            while end - first < most && blocks.next_if_eq(&end).is_some() {
                end += 1;
            }
            let bytes = usize::try_from((end - first) * 4096).unwrap();
            let buffer = &mut buffer[..bytes];
            block_on(short_way::read(
                &attached,
                &self.device,
                first * 4096,
                buffer,
            ))
            .unwrap();
            for (lba, block) in (first..end).zip(buffer.chunks_exact(4096)) {
                let (stamp, expected) = (stamp_of(block), content.get(lba));
                assert_eq!(stamp, expected, "{} block {lba}", path(volume, snapshot));
            }
        }
    }

    fn check(&mut self) {
        let report = block_on(self.pool().check(&self.device, &mut |_, _| {})).unwrap();
        assert_eq!(report.damage, Vec::<String>::new());
        assert_eq!(report.leaked_blocks, 0);
    }

    fn remove_everything(&mut self) {
        self.attached.clear();
        let all: Vec<VolumePath> = self
            .volumes
            .keys()
            .chain(&self.filler)
            .map(|volume| path(volume, None))
            .collect();
        if !all.is_empty() {
            block_on(self.pool().remove(&self.device, &all, true, false)).unwrap();
        }
        while block_on(self.pool().maintain(&self.device)).unwrap() {}
        self.check();
        for _ in 0..2 {
            block_on(self.pool().checkpoint(&self.device)).unwrap();
        }
        let status = self.pool().status();
        assert_eq!(status.pending_bytes, 0, "{status:?}");
        let (used, blocks) = (status.used_bytes, status.size_bytes / 4096);
        self.pool = None;
        self.open();
        assert_eq!(
            used,
            self.pool().status().used_bytes,
            "used, against the same pool opened again"
        );
        let fresh = SimDevice::new(self.first_blocks);
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: self.first_blocks,
            created: Timestamp(1),
        };
        block_on(Pool::create(&fresh, options)).unwrap();
        fresh.grow(blocks);
        self.device = fresh;
        self.open();
        block_on(self.pool().grow(&self.device, blocks)).unwrap();
        assert_eq!(
            used,
            self.pool().status().used_bytes,
            "used, against an empty pool"
        );
        if let Some(ring) = &self.ring {
            let _gone = std::fs::remove_file(ring);
        }
    }
}
