//! The engine's own speed, without a kernel device: `cargo bench -p blockfork-tests`.
//!
//! The pool lies in a file of `$BENCH_DIR`: by default on a tmpfs, where what is measured is the engine and one system call
//! for each piece of data; elsewhere with `O_DIRECT`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockfork::clock::SystemClock;
use blockfork::device::{Access, BlockBuf, FileDevice, PoolFile};
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, Transfer, VolumeOptions,
};
use blockfork::units::{BLOCK_BYTES, PoolId, Timestamp};
use divan::Bencher;
use futures_lite::future::block_on;

/// A volume of 1 GiB in a pool of 8.
const VOLUME_BLOCKS: u64 = 1 << 18;
const POOL_BLOCKS: u64 = 1 << 21;
/// Odd, so that multiples of it pass every block of a volume once.
const STRIDE: u64 = 0x9e37_79b1;

fn main() {
    divan::main();
}

/// A pool of its own, and a volume in it; gone when dropped.
struct Fixture {
    path: PathBuf,
    file: FileDevice,
    pool: Arc<Pool>,
    volume: Arc<Attached>,
    next: AtomicU64,
    named: AtomicU64,
}

impl Fixture {
    fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let folder = std::env::var_os("BENCH_DIR").unwrap_or_else(|| "/dev/shm".into());
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("blockfork-bench-{}-{number}", std::process::id());
        let path = PathBuf::from(folder).join(name);
        let made = std::fs::File::create(&path).unwrap();
        made.set_len(POOL_BLOCKS * BLOCK_BYTES).unwrap();
        let access = Access {
            write: true,
            lock_wait_ms: 0,
        };
        let file = FileDevice::new(Arc::new(PoolFile::open(&path, access).unwrap()));
        let options = CreateOptions {
            name: "bench".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: POOL_BLOCKS,
            created: Timestamp(1),
        };
        block_on(Pool::create(&file, options)).unwrap();
        let options = OpenOptions {
            read_only: false,
            device_blocks: POOL_BLOCKS,
            ring: RingPlace::File {
                path: path.with_extension("ring"),
                boot_id: [1; 16],
            },
            clock: Arc::new(SystemClock::new()),
        };
        let pool = Arc::new(block_on(Pool::open(&file, options)).unwrap());
        let options = VolumeOptions {
            bytes: VOLUME_BLOCKS * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        block_on(pool.create_volume(&file, &"v".parse().unwrap(), options)).unwrap();
        let volume = pool.attach(&"v".parse().unwrap(), false).unwrap();
        Self {
            path,
            file,
            pool,
            volume,
            next: AtomicU64::new(0),
            named: AtomicU64::new(0),
        }
    }

    /// Writes all of the volume once.
    fn filled(self) -> Self {
        let piece = BlockBuf::zeroed(64);
        for first in (0..VOLUME_BLOCKS).step_by(64) {
            block_on(self.volume.write(&self.file, first * BLOCK_BYTES, &piece)).unwrap();
        }
        block_on(self.volume.flush(&self.file)).unwrap();
        self
    }

    /// The byte offset of a block, another one each time until all have had their turn.
    fn random_offset(&self) -> u64 {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        (turn.wrapping_mul(STRIDE) % VOLUME_BLOCKS) * BLOCK_BYTES
    }

    fn snapshot(&self) -> VolumePath {
        let number = self.named.fetch_add(1, Ordering::Relaxed);
        let path: VolumePath = format!("v@s{number}").parse().unwrap();
        block_on(self.pool.snapshot(&self.file, std::slice::from_ref(&path))).unwrap();
        path
    }

    fn write(&self, block: &BlockBuf) {
        block_on(self.volume.write(&self.file, self.random_offset(), block)).unwrap();
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for path in [&self.path, &self.path.with_extension("ring")] {
            let removed = std::fs::remove_file(path);
            assert!(removed.is_ok() || !path.exists(), "{}", path.display());
        }
    }
}

/// Where a random block is to be read.
#[divan::bench(threads = [1, 2])]
fn lookup_for_read(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| {
        let direct = fixture
            .volume
            .direct(Transfer::Read, fixture.random_offset(), 4096);
        assert!(direct.unwrap().done());
    });
}

/// Where a random block is to be written in place.
#[divan::bench(threads = [1, 2])]
fn lookup_for_write(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| {
        let direct = fixture
            .volume
            .direct(Transfer::Write, fixture.random_offset(), 4096);
        assert!(direct.unwrap().done());
    });
}

/// Where 256 KiB are to be written in place.
#[divan::bench]
fn lookup_for_write_of_64_blocks(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let bytes = 64 * BLOCK_BYTES;
    bencher.bench(|| {
        let offset = fixture.random_offset() / bytes * bytes;
        let direct = fixture.volume.direct(Transfer::Write, offset, 64 << 12);
        assert!(direct.unwrap().done());
    });
}

/// A write of a block that nothing is mapped to.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 500)]
fn first_write(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| fixture.write(&block));
}

/// A write of a block that a snapshot shares, each leaf copied at its first.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 500)]
fn first_write_after_snapshot(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    fixture.snapshot();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| fixture.write(&block));
}

/// A snapshot that is durable when the call returns.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn snapshot_idle(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| fixture.snapshot());
}

/// The same with 100 redirected writes before it, which the figure contains.
#[divan::bench(sample_count = 50, sample_size = 10)]
fn snapshot_after_100_writes(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| {
        for _ in 0..100 {
            fixture.write(&block);
        }
        fixture.snapshot()
    });
}

/// A clone of a snapshot.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn clone(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let snapshot = fixture.snapshot();
    bencher.bench(|| {
        let number = fixture.named.fetch_add(1, Ordering::Relaxed);
        let name = format!("c{number}").parse().unwrap();
        block_on(fixture.pool.clone_snapshot(&fixture.file, &snapshot, &name)).unwrap();
    });
}

/// A redirected write and a flush that makes it durable.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn commit(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| {
        fixture.write(&block);
        block_on(fixture.volume.flush(&fixture.file)).unwrap();
    });
}
