//! Runs a script on a pool, and tells the oracle what was asked for and what was acknowledged.

use crate::oracle::{Block, Found, FoundContent, Oracle, Span, Stamp};
use crate::scheduler;
use crate::script::{Phase, Script, Step};
use crate::short_way;
use crate::sim_device::SimDevice;
use crate::tape::Tick;
use blockfork::clock::ManualClock;
use blockfork::device::{BlockBuf, Device};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, EntryKind, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use fastrand::Rng;
use futures_lite::future::block_on;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const BLOCK_BYTES: u64 = 4096;

/// A pool, what was asked of it, and what it said.
#[derive(Debug)]
pub struct Witness {
    device: SimDevice,
    pool: Arc<Pool>,
    oracle: RefCell<Oracle>,
    attached: RefCell<BTreeMap<String, Arc<Attached>>>,
    /// Volumes of which a command failed: what they are is not known any more, so they are left alone.
    unsure: RefCell<BTreeSet<String>>,
    next_stamp: Cell<Stamp>,
    errors: RefCell<Vec<ErrorKind>>,
}

fn path(volume: &str, snapshot: Option<&str>) -> VolumePath {
    VolumePath {
        volume: volume.parse().unwrap(),
        snapshot: snapshot.map(|name| name.parse().unwrap()),
    }
}

/// Opens the pool of a device for writing.
pub fn open(device: &SimDevice, ring: RingPlace) -> Result<Arc<Pool>> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: device.blocks(),
        ring,
        clock: Arc::new(ManualClock::default()),
    };
    block_on(Pool::open(device, options)).map(Arc::new)
}

/// The stamps of a block's sectors. Each sector is one stamp throughout.
fn stamps_of(block: &[u8]) -> Block {
    let mut stamps = [0; 8];
    for (stamp, sector) in stamps.iter_mut().zip(block.chunks_exact(512)) {
        *stamp = Stamp::from_le_bytes(sector[..8].try_into().unwrap());
        assert!(
            sector[8..] == sector[..504],
            "a sector holds a mix of stamps, the first {stamp}"
        );
    }
    stamps
}

fn fill(block: &mut [u8], stamp: Stamp) {
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
}

/// Reads the blocks `lbas` (ascending) of a volume or snapshot.
fn read<D: Device>(device: &D, attached: &Attached, lbas: &[u64]) -> Result<FoundContent> {
    let blocks = attached.bytes() / BLOCK_BYTES;
    let mut content = BTreeMap::new();
    let within = lbas.partition_point(|lba| *lba < blocks);
    for run in lbas[..within].chunk_by(|one, next| one + 1 == *next) {
        let mut buffer = BlockBuf::zeroed(run.len());
        block_on(attached.read(device, run[0] * BLOCK_BYTES, &mut buffer))?;
        for (lba, block) in run.iter().zip(buffer.chunks_exact(4096)) {
            let stamps = stamps_of(block);
            if stamps != [0; 8] {
                content.insert(*lba, stamps);
            }
        }
    }
    Ok(FoundContent { blocks, content })
}

/// Everything that a pool holds at the blocks `lbas`.
pub fn find(device: &SimDevice, pool: &Arc<Pool>, lbas: &[u64]) -> Result<Found> {
    let mut found = Found::default();
    for entry in block_on(pool.list(device))? {
        let attached = pool.attach(&entry.path, true)?;
        let content = read(device, &attached, lbas)?;
        let volume = entry.path.volume.to_string();
        match (entry.kind, &entry.path.snapshot) {
            (EntryKind::Snapshot, Some(name)) => {
                found.snapshots.insert((volume, name.to_string()), content);
            }
            _ => {
                found.volumes.insert(volume, content);
            }
        }
    }
    Ok(found)
}

impl Witness {
    /// A new pool for the script, its prologue done and durable.
    pub fn new(script: &Script, ring: RingPlace) -> Self {
        let device = SimDevice::with_sector(script.device_blocks, 512);
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: script.device_blocks,
            created: Timestamp(1),
        };
        block_on(Pool::create(&device, options)).unwrap();
        let pool = open(&device, ring).unwrap();
        let witness = Self::on(device, pool);
        block_on(witness.client(&script.prologue));
        block_on(witness.pool.checkpoint(&witness.device)).unwrap();
        let now = witness.begin();
        witness.oracle.borrow_mut().flushed(witness.end(now, true));
        witness
    }

    /// A witness of an open pool, who knows none of its volumes.
    pub fn on(device: SimDevice, pool: Arc<Pool>) -> Self {
        Self {
            device,
            pool,
            oracle: RefCell::default(),
            attached: RefCell::default(),
            unsure: RefCell::default(),
            next_stamp: Cell::new(1),
            errors: RefCell::default(),
        }
    }

    /// The device below.
    pub fn device(&self) -> &SimDevice {
        &self.device
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The kinds of the errors that clients got.
    pub fn errors(&self) -> Vec<ErrorKind> {
        self.errors.borrow().clone()
    }

    /// What was asked for, for a judgement after the pool is gone.
    pub fn into_oracle(self) -> Oracle {
        self.oracle.into_inner()
    }

    /// Runs the phases, the clients of each interleaved by `rng`, until all is done or `stop` says so.
    pub fn run(&self, phases: &[Phase], rng: &mut Rng, mut stop: impl FnMut() -> bool) {
        for phase in phases {
            let mut tasks: Vec<scheduler::Task<'_>> = Vec::new();
            for steps in phase {
                tasks.push(Box::pin(self.client(steps)));
            }
            scheduler::run(tasks, rng, &mut stop);
            if stop() {
                return;
            }
        }
    }

    async fn client(&self, steps: &[Step]) {
        for step in steps {
            self.step(step).await;
        }
    }

    fn begin(&self) -> Tick {
        self.device.tick()
    }

    fn end(&self, begun: Tick, is_certain: bool) -> Span {
        Span {
            begun,
            ended: self.device.tick(),
            is_certain,
        }
    }

    /// The span of a request that ended; an error is noted.
    fn ended<T>(&self, begun: Tick, result: &Result<T>) -> Span {
        if let Err(error) = result {
            self.note(error);
        }
        self.end(begun, result.is_ok())
    }

    fn note(&self, error: &Error) {
        self.errors.borrow_mut().push(error.kind());
    }

    fn is_sure(&self, volume: &str) -> bool {
        !self.unsure.borrow().contains(volume)
    }

    fn give_up_unless(&self, is_done: bool, volume: &str) {
        if !is_done {
            self.unsure.borrow_mut().insert(volume.to_owned());
        }
    }

    fn attached(&self, volume: &str) -> Option<Arc<Attached>> {
        if !self.is_sure(volume) {
            return None;
        }
        let mut attached = self.attached.borrow_mut();
        if let Some(attached) = attached.get(volume) {
            return Some(Arc::clone(attached));
        }
        match self.pool.attach(&path(volume, None), false) {
            Ok(new) => {
                attached.insert(volume.to_owned(), Arc::clone(&new));
                Some(new)
            }
            Err(error) => {
                self.note(&error);
                None
            }
        }
    }

    async fn step(&self, step: &Step) {
        match step {
            Step::Create(name, blocks, redirects) => self.create(name, *blocks, *redirects).await,
            Step::Write(volume, lba, count) => self.write(volume, *lba, *count).await,
            Step::Discard(volume, lba, count) => self.clear(volume, *lba, *count, true).await,
            Step::Zero(volume, lba, count) => self.clear(volume, *lba, *count, false).await,
            Step::Flush(volume) => self.flush(volume).await,
            Step::Snapshot(volumes, name) => self.snapshot(volumes, name).await,
            Step::Clone(volume, snapshot, to) => self.clone_snapshot(volume, snapshot, to).await,
            Step::Rollback(volume, snapshot) => self.rollback(volume, snapshot).await,
            Step::Remove(volume, snapshot) => self.remove(volume, snapshot.as_deref()).await,
            Step::Resize(volume, blocks) => self.resize(volume, *blocks).await,
            Step::Rename(from, to) => self.rename(from, to).await,
            Step::Grow(blocks) => self.grow(*blocks).await,
            Step::Maintain => {
                let done = self.pool.maintain(&self.device).await;
                let _span = self.ended(0, &done);
            }
            Step::Checkpoint => {
                let begun = self.begin();
                let done = self.pool.checkpoint(&self.device).await;
                let span = self.ended(begun, &done);
                self.oracle.borrow_mut().flushed(span);
            }
        }
    }

    async fn create(&self, name: &str, blocks: u64, redirects: bool) {
        let options = VolumeOptions {
            bytes: blocks * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect: if redirects {
                Redirect::Always
            } else {
                Redirect::Shared
            },
        };
        let begun = self.begin();
        let done = self
            .pool
            .create_volume(&self.device, &name.parse().unwrap(), options)
            .await;
        let span = self.ended(begun, &done);
        let mut oracle = self.oracle.borrow_mut();
        oracle.created(name, blocks, BTreeMap::new(), !redirects, span);
        self.give_up_unless(done.is_ok(), name);
    }

    async fn write(&self, volume: &str, lba: u64, count: u64) {
        let Some(attached) = self.attached(volume) else {
            return;
        };
        let first = self.next_stamp.get();
        self.next_stamp.set(first + count);
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        for (stamp, block) in (first..).zip(buffer.chunks_exact_mut(4096)) {
            fill(block, stamp);
        }
        let begun = self.begin();
        for (lba, stamp) in (lba..lba + count).zip(first..) {
            self.oracle.borrow_mut().writes(volume, lba, stamp, begun);
        }
        let offset = lba * BLOCK_BYTES;
        let done = short_way::write(&attached, &self.device, offset, &buffer).await;
        let span = self.ended(begun, &done);
        for lba in lba..lba + count {
            self.oracle.borrow_mut().wrote(volume, lba, span);
        }
    }

    async fn clear(&self, volume: &str, lba: u64, count: u64, may_free: bool) {
        let Some(attached) = self.attached(volume) else {
            return;
        };
        let (offset, bytes) = (lba * BLOCK_BYTES, count * BLOCK_BYTES);
        let begun = self.begin();
        for lba in lba..lba + count {
            self.oracle.borrow_mut().writes(volume, lba, 0, begun);
        }
        let done = if may_free {
            attached.discard(&self.device, offset, bytes).await
        } else {
            attached
                .write_zeroes(&self.device, offset, bytes, true)
                .await
        };
        let span = self.ended(begun, &done);
        for lba in lba..lba + count {
            self.oracle.borrow_mut().wrote(volume, lba, span);
        }
    }

    async fn flush(&self, volume: &str) {
        let Some(attached) = self.attached(volume) else {
            return;
        };
        let begun = self.begin();
        let done = attached.flush(&self.device).await;
        let span = self.ended(begun, &done);
        self.oracle.borrow_mut().flushed(span);
    }

    async fn snapshot(&self, volumes: &[String], name: &str) {
        if !volumes.iter().all(|volume| self.is_sure(volume)) {
            return;
        }
        let targets: Vec<_> = volumes
            .iter()
            .map(|volume| path(volume, Some(name)))
            .collect();
        let begun = self.begin();
        let done = self.pool.snapshot(&self.device, &targets).await;
        let span = self.ended(begun, &done);
        for volume in volumes {
            let content = done.is_ok().then(|| self.content(volume, name)).flatten();
            let mut oracle = self.oracle.borrow_mut();
            oracle.snapshotted(volume, name, content, span);
        }
    }

    /// What a snapshot holds, read while a fault may be there.
    fn content(&self, volume: &str, name: &str) -> Option<BTreeMap<u64, Stamp>> {
        let lbas = self.oracle.borrow().touched();
        let attached = self.pool.attach(&path(volume, Some(name)), true);
        let found = attached.and_then(|attached| {
            // A copy of the device: reading must not change the order of the calls.
            let device = SimDevice::from_image(self.device.image(), 512);
            read(&device, &attached, &lbas)
        });
        match found {
            Ok(found) => Some(
                found
                    .content
                    .into_iter()
                    .map(|(lba, block)| {
                        assert_eq!(block, [block[0]; 8], "a snapshot's block {lba} is torn");
                        (lba, block[0])
                    })
                    .collect(),
            ),
            Err(error) => {
                self.note(&error);
                None
            }
        }
    }

    async fn clone_snapshot(&self, volume: &str, snapshot: &str, to: &str) {
        let content = self
            .is_sure(volume)
            .then(|| self.oracle.borrow().snapshot_content(volume, snapshot))
            .flatten();
        let Some(content) = content else {
            self.unsure.borrow_mut().insert(to.to_owned());
            return;
        };
        let blocks = self.oracle.borrow().blocks(volume);
        let begun = self.begin();
        let done = self
            .pool
            .clone_snapshot(
                &self.device,
                &path(volume, Some(snapshot)),
                &to.parse().unwrap(),
            )
            .await;
        let span = self.ended(begun, &done);
        let mut oracle = self.oracle.borrow_mut();
        oracle.created(to, blocks, content, true, span);
        self.give_up_unless(done.is_ok(), to);
    }

    async fn rollback(&self, volume: &str, snapshot: &str) {
        if !self.is_sure(volume) {
            return;
        }
        let Some(content) = self.oracle.borrow().snapshot_content(volume, snapshot) else {
            return;
        };
        let begun = self.begin();
        let done = self
            .pool
            .rollback(&self.device, &path(volume, Some(snapshot)))
            .await;
        let span = self.ended(begun, &done);
        let mut oracle = self.oracle.borrow_mut();
        let blocks = oracle.snapshot_blocks(volume, snapshot);
        oracle.became(volume, volume, blocks, Some(content), span);
        self.give_up_unless(done.is_ok(), volume);
    }

    async fn remove(&self, volume: &str, snapshot: Option<&str>) {
        if !self.is_sure(volume) {
            return;
        }
        if let Some(name) = snapshot
            && !self.oracle.borrow().has_snapshot(volume, name)
        {
            return;
        }
        if snapshot.is_none() {
            self.attached.borrow_mut().remove(volume);
        }
        let begun = self.begin();
        let target = path(volume, snapshot);
        let done = self.pool.remove(&self.device, &[target], true, false).await;
        let span = self.ended(begun, &done);
        self.oracle.borrow_mut().removed(volume, snapshot, span);
        self.give_up_unless(done.is_ok() || snapshot.is_some(), volume);
    }

    async fn resize(&self, volume: &str, blocks: u64) {
        if !self.is_sure(volume) {
            return;
        }
        self.attached.borrow_mut().remove(volume);
        let begun = self.begin();
        let name = volume.parse().unwrap();
        let done = self
            .pool
            .resize(&self.device, &name, blocks * BLOCK_BYTES, true)
            .await;
        let span = self.ended(begun, &done);
        let mut oracle = self.oracle.borrow_mut();
        oracle.became(volume, volume, blocks, None, span);
        self.give_up_unless(done.is_ok(), volume);
    }

    async fn rename(&self, from: &str, to: &str) {
        if !self.is_sure(from) {
            self.unsure.borrow_mut().insert(to.to_owned());
            return;
        }
        self.attached.borrow_mut().remove(from);
        let begun = self.begin();
        let done = self
            .pool
            .rename(&self.device, &path(from, None), &path(to, None))
            .await;
        let span = self.ended(begun, &done);
        let mut oracle = self.oracle.borrow_mut();
        let blocks = oracle.blocks(from);
        oracle.became(from, to, blocks, None, span);
        self.give_up_unless(done.is_ok(), to);
    }

    async fn grow(&self, blocks: u64) {
        self.device.grow(blocks);
        let begun = self.begin();
        let done = self.pool.grow(&self.device, blocks).await;
        let span = self.ended(begun, &done);
        self.oracle.borrow_mut().flushed(span);
    }
}
