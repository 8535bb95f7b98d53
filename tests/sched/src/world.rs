//! A small pool with two volumes, the queues that use it, and what must hold at the end.

use crate::device::{Image, Memory};
use blockfork::clock::ManualClock;
use blockfork::device::BlockBuf;
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use history::{Action, History, Place, Span, ZEROS};
use shuttle::future::block_on;
use shuttle::thread::{self, JoinHandle};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const POOL_BLOCKS: u64 = 4096;
/// Blocks of each volume; they stand around the end of a leaf.
const BLOCKS: u64 = 4;
const NAMES: [&str; 2] = ["a", "b"];

/// A pool in use.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) device: Memory,
    pub(crate) pool: Arc<Pool>,
    volumes: [Arc<Attached>; 2],
    history: History,
    snapshots: Mutex<BTreeMap<String, Span>>,
    /// A moment before a flush, a block, and the device after a power cut that followed the flush.
    cuts: Mutex<Vec<(u64, Place, Memory)>>,
    next_stamp: AtomicU64,
    /// Whether the last block of volume `b` was written sector by sector, and so is no register.
    has_sectors: AtomicBool,
}

/// `VOLUME` or `VOLUME@SNAPSHOT`.
pub(crate) fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

fn open(device: &Memory) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: POOL_BLOCKS,
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    };
    Arc::new(block_on(Pool::open(device, options)).unwrap())
}

/// The device with the pool that every schedule begins with. Of each volume, the first block is unmapped, the second
/// its own, and the third shared with a snapshot `old`.
pub(crate) fn image() -> Image {
    let device = Memory::new(Image::default());
    let options = CreateOptions {
        name: "p".parse().unwrap(),
        id: PoolId([7; 16]),
        blocks: POOL_BLOCKS,
        created: Timestamp(1),
    };
    block_on(Pool::create(&device, options)).unwrap();
    let pool = open(&device);
    for name in NAMES {
        let options = VolumeOptions {
            bytes: BLOCKS * 4096,
            sector_bytes: if name == "a" { 4096 } else { 512 },
            redirect: Redirect::Shared,
        };
        block_on(pool.create_volume(&device, &name.parse().unwrap(), options)).unwrap();
    }
    block_on(async {
        for (volume, name) in (0..).zip(NAMES) {
            let attached = pool.attach(&path(name), false).unwrap();
            let first = begun_with(volume);
            attached
                .write(&device, 2 * 4096, &filled(first + 2))
                .await
                .unwrap();
            let old = path(&format!("{name}@old"));
            pool.snapshot(&device, &[old]).await.unwrap();
            attached
                .write(&device, 4096, &filled(first + 1))
                .await
                .unwrap();
            attached
                .write(&device, 3 * 4096, &filled(first + 3))
                .await
                .unwrap();
        }
        pool.close(&device).await.unwrap();
    });
    device.image()
}

/// The stamp that volume number `volume` began with, before its blocks' own numbers.
fn begun_with(volume: u64) -> u64 {
    (volume + 1) << 32
}

fn filled(stamp: u64) -> BlockBuf {
    let mut buffer = BlockBuf::zeroed(1);
    fill(&mut buffer, stamp);
    buffer
}

fn fill(block: &mut [u8], stamp: u64) {
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
}

fn stamp_of(block: &[u8]) -> u64 {
    assert!(
        block.chunks_exact(8).all(|word| word == &block[..8]),
        "a block is a mix"
    );
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

fn place(volume: usize, lba: u64) -> Place {
    Place {
        volume: u32::try_from(volume).unwrap(),
        lba,
    }
}

impl World {
    /// The pool of `image`, opened, with both volumes attached.
    pub(crate) fn new(image: Image) -> Arc<Self> {
        let device = Memory::new(image);
        let pool = open(&device);
        let volumes = NAMES.map(|name| pool.attach(&path(name), false).unwrap());
        let history = History::default();
        let begun = |lba| {
            let called = history.now();
            let write = |volume| Action::Write(begun_with(volume as u64) + lba);
            let writes = (0..2).map(|volume| (place(volume, lba), write(volume)));
            history.note(called, writes);
        };
        begun(2);
        let old = history.span(history.now());
        begun(1);
        begun(3);
        Arc::new(Self {
            device,
            pool,
            volumes,
            history,
            snapshots: Mutex::new(BTreeMap::from([("old".to_owned(), old)])),
            cuts: Mutex::default(),
            next_stamp: AtomicU64::new(1),
            has_sectors: AtomicBool::new(false),
        })
    }

    /// Runs what a queue does on a thread of its own.
    pub(crate) fn queue<F: Future<Output = ()>>(
        self: &Arc<Self>,
        serve: impl FnOnce(Arc<Self>) -> F + Send + 'static,
    ) -> JoinHandle<()> {
        let world = Arc::clone(self);
        thread::spawn(move || block_on(serve(world)))
    }

    /// Writes `count` blocks with stamps of their own.
    pub(crate) async fn write(&self, volume: usize, lba: u64, count: u64) {
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        let first = self.next_stamp.fetch_add(count, Ordering::SeqCst);
        for (block, stamp) in buffer.chunks_exact_mut(4096).zip(first..) {
            fill(block, stamp);
        }
        let called = self.history.now();
        let done = self.volumes[volume].write(&self.device, lba * 4096, &buffer);
        done.await.unwrap();
        let writes = (0..count).map(|n| (place(volume, lba + n), Action::Write(first + n)));
        self.history.note(called, writes);
    }

    /// Reads `count` blocks.
    pub(crate) async fn read(&self, volume: usize, lba: u64, count: u64) {
        let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
        let called = self.history.now();
        let done = self.volumes[volume].read(&self.device, lba * 4096, &mut buffer);
        done.await.unwrap();
        let reads = (lba..)
            .zip(buffer.chunks_exact(4096))
            .map(|(lba, block)| (place(volume, lba), Action::Read(stamp_of(block))));
        self.history.note(called, reads);
    }

    /// Discards `count` blocks.
    pub(crate) async fn discard(&self, volume: usize, lba: u64, count: u64) {
        let called = self.history.now();
        let done = self.volumes[volume].discard(&self.device, lba * 4096, count * 4096);
        done.await.unwrap();
        let zeros = (lba..lba + count).map(|lba| (place(volume, lba), Action::Write(ZEROS)));
        self.history.note(called, zeros);
    }

    /// Writes 512 bytes into the last block of volume `b` at sector `sector`, all with the stamp `stamp`.
    pub(crate) async fn write_sector(&self, sector: u64, stamp: u64) {
        self.has_sectors.store(true, Ordering::SeqCst);
        let mut block = BlockBuf::zeroed(1);
        fill(&mut block[..512], stamp);
        let at = 3 * 4096 + sector * 512;
        let done = self.volumes[1].write(&self.device, at, &block[..512]);
        done.await.unwrap();
    }

    /// The stamps of the last block of volume `b`, sector by sector.
    pub(crate) async fn sectors(&self) -> Vec<u64> {
        let mut block = BlockBuf::zeroed(1);
        let done = self.volumes[1].read(&self.device, 3 * 4096, &mut block);
        done.await.unwrap();
        block.chunks_exact(512).map(stamp_of).collect()
    }

    pub(crate) async fn flush(&self) {
        self.volumes[0].flush(&self.device).await.unwrap();
    }

    /// Flushes; what a block held before is there after a power cut, or something later.
    pub(crate) async fn flush_covers(&self, volume: usize, lba: u64) {
        let before = self.history.now();
        self.flush().await;
        let image = self.device.after_power_cut();
        self.cuts
            .lock()
            .unwrap()
            .push((before, place(volume, lba), image));
    }

    /// Turns volume `a` back to `old`; its blocks are then what they were, or what was written since.
    pub(crate) async fn roll_back(&self) {
        let called = self.history.now();
        self.pool
            .rollback(&self.device, &path("a@old"))
            .await
            .unwrap();
        // Block 2 is as it was; the others were not mapped then.
        let writes = [0, 1, 3].map(|lba| (place(0, lba), Action::Write(ZEROS)));
        self.history.note(called, writes);
    }

    /// Gives volume `a` back and takes it again, as another daemon thread would.
    pub(crate) fn attach_again(&self) {
        self.volumes[0].detach();
        let again = self.pool.attach(&path("a"), false).unwrap();
        assert_eq!(again.id(), self.volumes[0].id());
        assert!(
            self.pool.attach(&path("a"), false).is_err(),
            "attached twice"
        );
    }

    /// One snapshot of both volumes: `a@NAME` and `b@NAME`.
    pub(crate) async fn snapshot(&self, name: &str) {
        let paths = NAMES.map(|volume| path(&format!("{volume}@{name}")));
        let called = self.history.now();
        self.pool.snapshot(&self.device, &paths).await.unwrap();
        let span = self.history.span(called);
        self.snapshots.lock().unwrap().insert(name.to_owned(), span);
    }

    /// Removes `a@NAME` and `b@NAME`.
    pub(crate) async fn remove(&self, name: &str) {
        let paths = NAMES.map(|volume| path(&format!("{volume}@{name}")));
        let removal = self.pool.remove(&self.device, &paths, false, false);
        removal.await.unwrap();
        self.snapshots.lock().unwrap().remove(name);
    }

    pub(crate) async fn checkpoint(&self) {
        self.pool.checkpoint(&self.device).await.unwrap();
    }

    /// Background work, until there is none.
    pub(crate) async fn maintain(&self) {
        while self.pool.maintain(&self.device).await.unwrap() {}
    }

    /// When everybody has ended: what happened is linearizable, the pool is whole, and after a power cut everything is
    /// as it was, since it was flushed.
    pub(crate) fn end(self: Arc<Self>) {
        block_on(async {
            let has_sectors = self.has_sectors.load(Ordering::SeqCst);
            self.read(0, 0, BLOCKS).await;
            self.read(1, 0, BLOCKS - u64::from(has_sectors)).await;
            self.flush().await;
            let snapshots = self.snapshots.lock().unwrap().clone();
            self.volumes.iter().for_each(|volume| volume.detach());
            let before = contents(&self.device, &self.pool, snapshots.keys()).await;
            for (name, span) in &snapshots {
                let content = (before.iter())
                    .filter(|((path, _), _)| path.ends_with(&format!("@{name}")))
                    .map(|((path, lba), stamp)| {
                        let volume = usize::from(path.starts_with('b'));
                        (place(volume, *lba), *stamp)
                    })
                    .filter(|(at, _)| !has_sectors || *at != place(1, BLOCKS - 1));
                self.history.note_snapshot(*span, content.collect());
            }
            if let Err(fact) = self.history.check() {
                panic!("{fact}\n{:#?}", self.history);
            }
            for (flushed, place, device) in self.cuts.lock().unwrap().iter() {
                let pool = open(device);
                let found = contents(device, &pool, [].iter()).await;
                let name = NAMES[usize::try_from(place.volume).unwrap()];
                let stamp = found[&(name.to_owned(), place.lba)];
                if let Err(fact) = self.history.check_survivor(*place, stamp, *flushed) {
                    panic!("after a flush and a power cut: {fact}");
                }
            }
            let restarted = self.device.after_power_cut();
            let pool = open(&restarted);
            let after = contents(&restarted, &pool, snapshots.keys()).await;
            assert_eq!(before, after, "a power cut changed what was flushed");
            for (device, pool) in [(&self.device, &self.pool), (&restarted, &pool)] {
                let report = pool.check(device, &mut |_, _| {}).await.unwrap();
                assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
            }
        });
    }
}

/// The stamp of every block of both volumes and of their snapshots.
async fn contents(
    device: &Memory,
    pool: &Arc<Pool>,
    snapshots: impl Iterator<Item = &String>,
) -> BTreeMap<(String, u64), u64> {
    let both = |name: &String| NAMES.map(|volume| format!("{volume}@{name}"));
    let paths = NAMES
        .map(str::to_owned)
        .into_iter()
        .chain(snapshots.flat_map(both));
    let mut found = BTreeMap::new();
    let mut buffer = BlockBuf::zeroed(usize::try_from(BLOCKS).unwrap());
    for name in paths {
        let attached = pool.attach(&path(&name), true).unwrap();
        attached.read(device, 0, &mut buffer).await.unwrap();
        for (lba, block) in (0..).zip(buffer.chunks_exact(4096)) {
            // Sectors of one block may differ, where they were written one by one.
            let stamp = block
                .chunks_exact(512)
                .map(stamp_of)
                .fold(0, u64::wrapping_add)
                / 8;
            found.insert((name.clone(), lba), stamp);
        }
    }
    found
}
