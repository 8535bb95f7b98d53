//! What must not grow with the number of snapshots, with depth or with time, in requests to the device, which repeat
//! exactly. `cargo x scale` measures the times, at full size.

use blockfork::clock::ManualClock;
use blockfork::device::{BlockBuf, Device};
use blockfork::error::Result;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{BLOCK_BYTES, PoolId, Timestamp};
use blockfork_tests::fixture::{attach, path};
use blockfork_tests::sim_device::SimDevice;
use fastrand::Rng;
use futures_lite::future::block_on;
use std::cell::Cell;
use std::sync::Arc;

const POOL_BLOCKS: u64 = 32_768;
const VOLUME_BLOCKS: u64 = 2_048;

/// A device that counts what it is asked for.
struct Counting {
    device: SimDevice,
    reads: Cell<u64>,
    written_bytes: Cell<usize>,
    flushes: Cell<u64>,
}

impl Device for Counting {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.reads.set(self.reads.get() + 1);
        self.device.read(offset, buffer).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.written_bytes
            .set(self.written_bytes.get() + buffer.len());
        self.device.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        self.flushes.set(self.flushes.get() + 1);
        self.device.flush().await
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.device.discard(offset, bytes).await
    }
}

struct Fixture {
    device: Counting,
    pool: Arc<Pool>,
}

fn open(device: &Counting) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: POOL_BLOCKS,
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    };
    Arc::new(block_on(Pool::open(device, options)).unwrap())
}

impl Fixture {
    fn new() -> Self {
        let device = Counting {
            device: SimDevice::new(POOL_BLOCKS),
            reads: Cell::new(0),
            written_bytes: Cell::new(0),
            flushes: Cell::new(0),
        };
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: POOL_BLOCKS,
            created: Timestamp(1),
        };
        block_on(Pool::create(&device, options)).unwrap();
        let pool = open(&device);
        Self { device, pool }
    }

    /// A volume with every block mapped.
    fn volume(&self, name: &str) -> Arc<Attached> {
        let options = VolumeOptions {
            bytes: VOLUME_BLOCKS * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        let name_of = name.parse().unwrap();
        let made = self.pool.create_volume(&self.device, &name_of, options);
        block_on(made).unwrap();
        let volume = attach(&self.pool, name);
        let all = BlockBuf::zeroed(usize::try_from(VOLUME_BLOCKS).unwrap());
        block_on(volume.write(&self.device, 0, &all)).unwrap();
        volume
    }

    fn write(&self, volume: &Attached, lba: u64) {
        let block = BlockBuf::zeroed(1);
        block_on(volume.write(&self.device, lba * BLOCK_BYTES, &block)).unwrap();
    }

    fn snapshot(&self, text: &str) {
        block_on(self.pool.snapshot(&self.device, &[path(text)])).unwrap();
    }

    fn remove(&self, text: &str) {
        let target = [path(text)];
        let removed = self.pool.remove(&self.device, &target, true, false);
        block_on(removed).unwrap();
    }

    /// Does all background work, and frees what that released.
    fn settle(&self) {
        while block_on(self.pool.maintain(&self.device)).unwrap() {}
        for _ in 0..3 {
            block_on(self.pool.checkpoint(&self.device)).unwrap();
        }
    }

    /// Device reads that reading one block of `volume` takes, in a pool just opened.
    fn cold_reads(&mut self, volume: &str) -> u64 {
        block_on(self.pool.close(&self.device)).unwrap();
        self.pool = open(&self.device);
        let attached = attach(&self.pool, volume);
        let before = self.device.reads.get();
        let mut block = BlockBuf::zeroed(1);
        block_on(attached.read(&self.device, 5 * BLOCK_BYTES, &mut block)).unwrap();
        attached.detach();
        self.device.reads.get() - before
    }
}

#[test]
fn the_thousandth_snapshot_asks_as_much_of_the_device_as_the_first() {
    let fixture = Fixture::new();
    let volume = fixture.volume("v");
    fixture.settle();
    let mut rng = Rng::with_seed(1);
    let mut asked = Vec::new();
    for number in 0..1_000 {
        fixture.write(&volume, rng.u64(..VOLUME_BLOCKS));
        // The commit of the write is not the snapshot's.
        block_on(volume.flush(&fixture.device)).unwrap();
        let device = &fixture.device;
        let counters = || {
            (
                device.reads.get(),
                device.written_bytes.get(),
                device.flushes.get(),
            )
        };
        let before = counters();
        fixture.snapshot(&format!("v@s{number}"));
        let after = counters();
        asked.push((after.0 - before.0, after.1 - before.1, after.2 - before.2));
        if number % 100 == 99 {
            fixture.settle();
        }
    }
    assert_eq!(asked.first(), asked.last());
    assert!(asked.iter().all(|one| *one == asked[0]), "{asked:?}");
}

#[test]
fn a_clone_two_hundred_deep_is_read_through_as_many_pages_as_the_first() {
    let mut fixture = Fixture::new();
    fixture.volume("v0").detach();
    let mut rng = Rng::with_seed(1);
    for level in 1..=200 {
        let snapshot = format!("v{}@s", level - 1);
        fixture.snapshot(&snapshot);
        let snapshot = path(&snapshot);
        let name = format!("v{level}").parse().unwrap();
        let cloned = fixture
            .pool
            .clone_snapshot(&fixture.device, &snapshot, &name);
        block_on(cloned).unwrap();
        let volume = attach(&fixture.pool, &format!("v{level}"));
        fixture.write(&volume, rng.u64(..VOLUME_BLOCKS));
        volume.detach();
    }
    let first = fixture.cold_reads("v1");
    assert_eq!(fixture.cold_reads("v200"), first);
    // A root, a leaf, the block.
    assert_eq!(first, 3);
}

#[test]
fn a_day_of_snapshots_and_removals_leaves_nothing_behind() {
    let fixture = Fixture::new();
    fixture.settle();
    let used = || fixture.pool.status().used_bytes / BLOCK_BYTES;
    let empty = used();
    let volume = fixture.volume("v");
    let mut rng = Rng::with_seed(1);
    for number in 0_u64..500 {
        for _ in 0..40 {
            fixture.write(&volume, rng.u64(..VOLUME_BLOCKS));
        }
        fixture.snapshot(&format!("v@s{number}"));
        if let Some(oldest) = number.checked_sub(10) {
            fixture.remove(&format!("v@s{oldest}"));
        }
        while block_on(fixture.pool.maintain(&fixture.device)).unwrap() {}
    }
    fixture.settle();
    // Ten snapshots of 40 changes each, and a page or two for each four hundred blocks.
    let most = VOLUME_BLOCKS + 10 * (40 + 6) + 20;
    assert!(
        used() - empty <= most,
        "{} blocks in use, {most} expected",
        used() - empty
    );
    let report = block_on(fixture.pool.check(&fixture.device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
    volume.detach();
    fixture.remove("v");
    fixture.settle();
    assert_eq!(used(), empty);
}
