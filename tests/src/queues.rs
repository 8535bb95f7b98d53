//! Histories of four queues on one pool: writes with stamps of their own, reads, discards and flushes on a small set of
//! blocks of two volumes, with snapshots of both and background work beside. Once on real threads, where nobody
//! knows the order, once as tasks whose order a seed decides. What comes out must be linearizable.

use crate::image::Image;
use crate::scheduler::{self, Task};
use crate::short_way;
use crate::sim_device::SimDevice;
use blockfork::clock::ManualClock;
use blockfork::device::{BlockBuf, Device};
use blockfork::error::Result;
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use fastrand::Rng;
use futures_lite::future::{block_on, yield_now};
use history::{Action, History, Place, Span, ZEROS};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Queues, each with so many requests under way at once.
pub const QUEUES: u64 = 4;
const TAGS: u64 = 2;
const POOL_BLOCKS: u64 = 8192;
/// The blocks used of each volume; they cross a leaf's end.
const FIRST: u64 = 500;
const BLOCKS: u64 = 16;
const SNAPSHOTS: u32 = 8;
const NAMES: [&str; 2] = ["a", "b"];

/// A device in memory for several threads.
#[derive(Clone, Debug)]
struct SharedDevice(Arc<Mutex<Image>>);

impl SharedDevice {
    /// Others have their turn, on this thread and on others.
    async fn pause(&self) {
        thread::yield_now();
        yield_now().await;
    }

    fn with<T>(&self, step: impl FnOnce(&mut Image) -> T) -> T {
        step(&mut self.0.lock().unwrap())
    }
}

impl Device for SharedDevice {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.pause().await;
        self.with(|image| image.read(usize::try_from(offset).unwrap(), buffer));
        self.pause().await;
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.pause().await;
        self.with(|image| image.write(usize::try_from(offset).unwrap(), buffer));
        self.pause().await;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.pause().await;
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.pause().await;
        let foreign = vec![0xde; usize::try_from(bytes).unwrap()];
        self.with(|image| image.write(usize::try_from(offset).unwrap(), &foreign));
        Ok(())
    }
}

/// What all share.
struct Run {
    pool: Arc<Pool>,
    volumes: [Arc<Attached>; 2],
    history: History,
    next_stamp: AtomicU64,
    snapshots: Mutex<Vec<(String, Span)>>,
}

fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

impl Run {
    async fn new(device: &impl Device) -> Self {
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([7; 16]),
            blocks: POOL_BLOCKS,
            created: Timestamp(1),
        };
        Pool::create(device, options).await.unwrap();
        let options = OpenOptions {
            read_only: false,
            device_blocks: POOL_BLOCKS,
            ring: RingPlace::Nowhere,
            clock: Arc::new(ManualClock::default()),
        };
        let pool = Arc::new(Pool::open(device, options).await.unwrap());
        for name in NAMES {
            let options = VolumeOptions {
                bytes: 1024 * 4096,
                sector_bytes: 4096,
                redirect: Redirect::Shared,
            };
            let name = name.parse().unwrap();
            let made = pool.create_volume(device, &name, options);
            made.await.unwrap();
        }
        let volumes = NAMES.map(|name| pool.attach(&path(name), false).unwrap());
        Self {
            pool,
            volumes,
            history: History::default(),
            next_stamp: AtomicU64::new(1),
            snapshots: Mutex::default(),
        }
    }

    /// One tag's requests.
    async fn tag(&self, device: &impl Device, requests: u64, mut rng: Rng) {
        for _ in 0..requests {
            self.request(device, &mut rng).await;
        }
    }

    async fn request(&self, device: &impl Device, rng: &mut Rng) {
        let volume = rng.usize(..2);
        let attached = &self.volumes[volume];
        let first = rng.u64(..BLOCKS);
        let count = rng.u64(1..=3).min(BLOCKS - first);
        let at = |lba| Place {
            volume: u32::try_from(volume).unwrap(),
            lba,
        };
        let offset = (FIRST + first) * 4096;
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        match rng.u8(..100) {
            0..45 => {
                let stamp = self.next_stamp.fetch_add(count, Ordering::Relaxed);
                for (block, stamp) in buffer.chunks_exact_mut(4096).zip(stamp..) {
                    for word in block.chunks_exact_mut(8) {
                        word.copy_from_slice(&stamp.to_le_bytes());
                    }
                }
                let called = self.history.now();
                short_way::write(attached, device, offset, &buffer)
                    .await
                    .unwrap();
                let writes = (0..count).map(|n| (at(first + n), Action::Write(stamp + n)));
                self.history.note(called, writes);
            }
            45..90 => {
                let called = self.history.now();
                short_way::read(attached, device, offset, &mut buffer)
                    .await
                    .unwrap();
                let reads = (first..).zip(buffer.chunks_exact(4096));
                let reads = reads.map(|(lba, block)| (at(lba), Action::Read(stamp_of(block))));
                self.history.note(called, reads);
            }
            90..97 => {
                // Few blocks are ever discarded, so that most are checked the fast way.
                let lba = first - first % 4;
                let called = self.history.now();
                let done = attached.discard(device, (FIRST + lba) * 4096, 4096);
                done.await.unwrap();
                self.history.note(called, [(at(lba), Action::Write(ZEROS))]);
            }
            _ => attached.flush(device).await.unwrap(),
        }
    }

    async fn snapshots(&self, device: &impl Device, mut rng: Rng) {
        for number in 0..SNAPSHOTS {
            for _ in 0..rng.u32(..200) {
                yield_now().await;
            }
            let name = format!("s{number}");
            let paths = NAMES.map(|volume| path(&format!("{volume}@{name}")));
            let called = self.history.now();
            self.pool.snapshot(device, &paths).await.unwrap();
            let span = self.history.span(called);
            self.snapshots.lock().unwrap().push((name, span));
        }
    }

    async fn background(&self, device: &impl Device, mut rng: Rng) {
        for _ in 0..20 {
            for _ in 0..rng.u32(..200) {
                yield_now().await;
            }
            if rng.bool() {
                self.pool.checkpoint(device).await.unwrap();
            } else {
                self.pool.maintain(device).await.unwrap();
            }
        }
    }

    /// Reads the snapshots, and has the whole history checked.
    async fn end(self, device: &impl Device) -> History {
        let snapshots = std::mem::take(&mut *self.snapshots.lock().unwrap());
        for (name, span) in snapshots {
            let mut content = BTreeMap::new();
            for (volume, of) in (0..).zip(NAMES) {
                let path = path(&format!("{of}@{name}"));
                let attached = self.pool.attach(&path, true).unwrap();
                let mut buffer = BlockBuf::zeroed(usize::try_from(BLOCKS).unwrap());
                let read = attached.read(device, FIRST * 4096, &mut buffer);
                read.await.unwrap();
                for (lba, block) in (0..).zip(buffer.chunks_exact(4096)) {
                    content.insert(Place { volume, lba }, stamp_of(block));
                }
            }
            self.history.note_snapshot(span, content);
        }
        let report = self.pool.check(device, &mut |_, _| {}).await.unwrap();
        assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
        if let Err(fact) = self.history.check() {
            panic!("not linearizable: {fact}");
        }
        self.history
    }
}

fn stamp_of(block: &[u8]) -> u64 {
    let is_one = block.chunks_exact(8).all(|word| word == &block[..8]);
    assert!(is_one, "a block is a mix");
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

/// Requests that each tag makes for a history of at least `requests`.
fn share(requests: u64) -> u64 {
    requests.div_ceil(QUEUES * TAGS)
}

/// One history on real threads, each with an executor of its own; how many requests it had.
///
/// # Panics
///
/// When it is not linearizable.
pub fn on_threads(seed: u64, requests: u64) -> u64 {
    let device = SharedDevice(Arc::new(Mutex::new(Image::zeros(POOL_BLOCKS))));
    let run = block_on(Run::new(&device));
    thread::scope(|scope| {
        let (run, device) = (&run, &device);
        for queue in 0..QUEUES {
            scope.spawn(move || {
                let executor = smol::LocalExecutor::new();
                let mut rng = Rng::with_seed(seed << 8 | queue);
                let tags: Vec<_> = (0..TAGS)
                    .map(|_| executor.spawn(run.tag(device, share(requests), rng.fork())))
                    .collect();
                block_on(executor.run(async {
                    for tag in tags {
                        tag.await;
                    }
                }));
            });
        }
        scope.spawn(move || block_on(run.snapshots(device, Rng::with_seed(seed << 8 | 0x80))));
        scope.spawn(move || block_on(run.background(device, Rng::with_seed(seed << 8 | 0x81))));
    });
    block_on(run.end(&device));
    share(requests) * QUEUES * TAGS
}

/// One history of tasks in an order that the seed decides; how many requests it had.
///
/// # Panics
///
/// When it is not linearizable.
pub fn as_tasks(seed: u64, requests: u64) -> u64 {
    let device = SimDevice::new(POOL_BLOCKS);
    let run = block_on(Run::new(&device));
    let mut rng = Rng::with_seed(seed);
    let mut tasks: Vec<Task<'_>> = Vec::new();
    for _ in 0..QUEUES * TAGS {
        tasks.push(Box::pin(run.tag(&device, share(requests), rng.fork())));
    }
    tasks.push(Box::pin(run.snapshots(&device, rng.fork())));
    tasks.push(Box::pin(run.background(&device, rng.fork())));
    scheduler::run(tasks, &mut rng, || false);
    block_on(run.end(&device));
    share(requests) * QUEUES * TAGS
}
