//! A pool to measure on, a thread that does its background work, and numbers of many numbers.

use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{BlockBuf, Device};
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{BLOCK_BYTES, PoolId, Timestamp};
use fastrand::Rng;
use futures_lite::future::block_on;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What is measured at a time: shorter than the time that the scheduler gives, so that the median of many is undisturbed.
pub(super) const PIECE: u64 = 256;
/// How long the background thread rests where there is nothing more to do; a daemon's is woken by a removal too.
const INTERVAL: Duration = Duration::from_millis(10);

/// An open pool and its device.
#[derive(Debug)]
pub(super) struct Bench<D> {
    pub(super) device: D,
    pub(super) pool: Arc<Pool>,
}

/// `VOLUME` or `VOLUME@SNAPSHOT`.
pub(super) fn path(text: &str) -> VolumePath {
    text.parse().expect("a path")
}

/// What `work` returns, and the nanoseconds that it took.
pub(super) fn timed<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let clock = SystemClock::new();
    let value = work();
    (value, clock.monotonic_ns())
}

/// Seconds of nanoseconds.
pub(super) fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

impl<D: Device> Bench<D> {
    /// A new pool of so many blocks.
    pub(super) fn create(device: D, blocks: u64) -> Self {
        let options = CreateOptions {
            name: "scale".parse().expect("a name"),
            id: PoolId([1; 16]),
            blocks,
            created: Timestamp(1),
        };
        block_on(Pool::create(&device, options)).expect("the pool is made");
        Self::open(device, blocks)
    }

    /// A pool that nobody has open.
    pub(super) fn open(device: D, blocks: u64) -> Self {
        Self::open_with(device, blocks, None)
    }

    /// The same, with so many bytes of memory for metadata; by default as many as the engine thinks fit.
    pub(super) fn open_with(device: D, blocks: u64, metadata_cache: Option<u64>) -> Self {
        let options = OpenOptions {
            read_only: false,
            device_blocks: blocks,
            ring: RingPlace::Nowhere,
            clock: Arc::new(SystemClock::new()),
        };
        let pool = block_on(Pool::open(&device, options)).expect("the pool opens");
        if let Some(bytes) = metadata_cache {
            pool.limit_metadata(bytes);
        }
        Self {
            device,
            pool: Arc::new(pool),
        }
    }

    /// Closes the pool; what is left of it.
    pub(super) fn close(self) -> D {
        block_on(self.pool.close(&self.device)).expect("the pool closes");
        self.device
    }

    /// Makes a volume.
    pub(super) fn create_volume(&self, name: &str, blocks: u64, redirect: Redirect) {
        let options = VolumeOptions {
            bytes: blocks * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect,
        };
        let name = name.parse().expect("a name");
        block_on(self.pool.create_volume(&self.device, &name, options)).expect("a volume");
    }

    /// Makes and attaches a volume.
    pub(super) fn volume(&self, name: &str, blocks: u64, redirect: Redirect) -> Arc<Attached> {
        self.create_volume(name, blocks, redirect);
        self.attach(name)
    }

    pub(super) fn attach(&self, text: &str) -> Arc<Attached> {
        let attached = self.pool.attach(&path(text), false);
        attached.expect("the volume attaches")
    }

    pub(super) fn snapshot(&self, text: &str) {
        block_on(self.pool.snapshot(&self.device, &[path(text)])).expect("a snapshot");
    }

    pub(super) fn clone_snapshot(&self, snapshot: &str, name: &str) {
        let name = name.parse().expect("a name");
        let snapshot = path(snapshot);
        let cloned = self.pool.clone_snapshot(&self.device, &snapshot, &name);
        block_on(cloned).expect("a clone");
    }

    /// Removes something; with `recursive` its snapshots too.
    pub(super) fn remove(&self, text: &str, recursive: bool) {
        let target = [path(text)];
        let removed = self.pool.remove(&self.device, &target, recursive, false);
        block_on(removed).expect("a removal");
    }

    /// Blocks that would come back if all these went together.
    pub(super) fn blocks_of(&self, targets: &[VolumePath]) -> u64 {
        let removal = block_on(self.pool.remove(&self.device, targets, false, true));
        removal
            .expect("a dry run")
            .freed_bytes
            .expect("a dry run tells")
            / BLOCK_BYTES
    }

    /// Writes one block of zeros, which is as good as any other to the engine.
    pub(super) fn write(&self, volume: &Attached, lba: u64, block: &BlockBuf) {
        block_on(volume.write(&self.device, lba * BLOCK_BYTES, block)).expect("a write");
    }

    /// Maps all of a volume, in order.
    pub(super) fn fill(&self, volume: &Attached) {
        let piece = BlockBuf::zeroed(64);
        for offset in (0..volume.bytes()).step_by(piece.len()) {
            let rest = usize::try_from(volume.bytes() - offset).unwrap_or(usize::MAX);
            let part = &piece[..piece.len().min(rest)];
            block_on(volume.write(&self.device, offset, part)).expect("a write");
            if offset.is_multiple_of(1 << 30) {
                self.step();
            }
        }
    }

    /// Maps all of a volume block by block, in an order drawn by `rng`: at random within so many blocks, and then within
    /// as many more.
    pub(super) fn fill_at_random(&self, volume: &Attached, window: u64, rng: &mut Rng) {
        let block = BlockBuf::zeroed(1);
        let blocks = volume.bytes() / BLOCK_BYTES;
        for first in (0..blocks).step_by(usize::try_from(window).unwrap_or(usize::MAX)) {
            let mut order: Vec<u64> = (first..blocks.min(first + window)).collect();
            rng.shuffle(&mut order);
            for (index, lba) in order.into_iter().enumerate() {
                self.write(volume, lba, &block);
                if index % 4096 == 0 {
                    self.step();
                }
            }
        }
    }

    /// One step of the background work; whether there is more.
    pub(super) fn step(&self) -> bool {
        block_on(self.pool.maintain(&self.device)).expect("the background work")
    }

    /// Does all that there is to do in the background, and leaves nothing to be freed.
    pub(super) fn settle(&self) {
        while self.step() || self.pool.status().reclaiming > 0 {}
        // What a checkpoint itself releases is free after the next.
        for _ in 0..3 {
            block_on(self.pool.checkpoint(&self.device)).expect("a checkpoint");
        }
    }

    /// Reads so many blocks, at random.
    pub(super) fn read(&self, volume: &Attached, count: u64, rng: &mut Rng) {
        let blocks = volume.bytes() / BLOCK_BYTES;
        let mut block = BlockBuf::zeroed(1);
        for _ in 0..count {
            let offset = rng.u64(..blocks) * BLOCK_BYTES;
            block_on(volume.read(&self.device, offset, &mut block)).expect("a read");
        }
    }

    /// Writes so many blocks, at random.
    pub(super) fn write_some(&self, volume: &Attached, count: u64, rng: &mut Rng) {
        let blocks = volume.bytes() / BLOCK_BYTES;
        let block = BlockBuf::zeroed(1);
        for _ in 0..count {
            self.write(volume, rng.u64(..blocks), &block);
        }
    }

    /// Nanoseconds of each write of one block, at random, until `is_over`.
    pub(super) fn write_times(
        &self,
        volume: &Attached,
        rng: &mut Rng,
        mut is_over: impl FnMut() -> bool,
    ) -> Vec<u64> {
        let blocks = volume.bytes() / BLOCK_BYTES;
        let block = BlockBuf::zeroed(1);
        let mut times = Vec::new();
        while !is_over() {
            let lba = rng.u64(..blocks);
            times.push(timed(|| self.write(volume, lba, &block)).1);
        }
        times
    }

    /// What the checker finds, as its exit code.
    pub(super) fn complaints(&self) -> u64 {
        let report = block_on(self.pool.check(&self.device, &mut |_, _| {})).expect("the check");
        for line in &report.damage {
            eprintln!("prove: {line}");
        }
        u64::from(report.exit_code())
    }
}

impl<D: Device + Sync> Bench<D> {
    /// Does `work` while a thread does the background work, as a daemon's does.
    pub(super) fn beside<T>(&self, work: impl FnOnce() -> T) -> T {
        let over = Over::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.is() {
                    if !self.step() {
                        thread::sleep(INTERVAL);
                    }
                }
            });
            let _end = over.at_the_end();
            work()
        })
    }
}

/// Whether something has ended.
#[derive(Debug, Default)]
pub(super) struct Over(AtomicBool);

/// Says so when it is dropped, also by a panic.
#[derive(Debug)]
pub(super) struct End<'a>(&'a Over);

impl Over {
    pub(super) fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn at_the_end(&self) -> End<'_> {
        End(self)
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// So many in so many nanoseconds, in a second.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
pub(super) fn rate(count: u64, ns: u64) -> f64 {
    count as f64 / seconds(ns.max(1))
}

/// One number as a part of another.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
pub(super) fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// The value below which so many thousandths of them lie.
pub(super) fn permille(values: &[u64], permille: usize) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(0)
}

/// The one in the middle.
pub(super) fn median(values: &[u64]) -> u64 {
    permille(values, 500)
}

/// The medians of the first hundred and of the last hundred.
pub(super) fn first_and_last(times: &[u64]) -> (u64, u64) {
    let some = times.len().min(100);
    let (first, last) = (&times[..some], &times[times.len() - some..]);
    (median(first), median(last))
}

/// The median of the last hundred as a multiple of that of the first hundred.
pub(super) fn last_to_first(times: &[u64]) -> f64 {
    let (first, last) = first_and_last(times);
    ratio(last, first)
}
