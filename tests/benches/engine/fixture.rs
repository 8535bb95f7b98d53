//! A pool to measure on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockfork::clock::SystemClock;
use blockfork::device::{Access, BlockBuf, FileDevice, PoolFile};
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{BLOCK_BYTES, PoolId, Timestamp};
use futures_lite::future::block_on;

/// A volume of 1 GiB in a pool of 8.
pub(crate) const VOLUME_BLOCKS: u64 = 1 << 18;
const POOL_BLOCKS: u64 = 1 << 21;
/// Odd, so that multiples of it pass every block of a volume once.
const STRIDE: u64 = 0x9e37_79b1;

/// A pool's file and its ring; gone when dropped.
struct Place(PathBuf);

/// A pool of its own, and a volume in it.
pub(crate) struct Fixture {
    place: Place,
    pub(crate) file: FileDevice,
    pub(crate) pool: Arc<Pool>,
    pub(crate) volume: Arc<Attached>,
    next: AtomicU64,
    named: AtomicU64,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let folder = std::env::var_os("BENCH_DIR").unwrap_or_else(|| "/dev/shm".into());
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("blockfork-bench-{}-{number}", std::process::id());
        let place = Place(PathBuf::from(folder).join(name));
        let path = &place.0;
        let made = std::fs::File::create(path).unwrap();
        made.set_len(POOL_BLOCKS * BLOCK_BYTES).unwrap();
        let access = Access {
            write: true,
            lock_wait_ms: 0,
        };
        let file = FileDevice::new(Arc::new(PoolFile::open(path, access).unwrap()));
        let options = CreateOptions {
            name: "bench".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: POOL_BLOCKS,
            created: Timestamp(1),
        };
        block_on(Pool::create(&file, options)).unwrap();
        let pool = Arc::new(block_on(Pool::open(&file, open_options(path))).unwrap());
        let options = VolumeOptions {
            bytes: VOLUME_BLOCKS * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        block_on(pool.create_volume(&file, &"v".parse().unwrap(), options)).unwrap();
        let volume = pool.attach(&"v".parse().unwrap(), false).unwrap();
        Self {
            place,
            file,
            pool,
            volume,
            next: AtomicU64::new(0),
            named: AtomicU64::new(0),
        }
    }

    /// Writes all of the volume once.
    pub(crate) fn filled(self) -> Self {
        let piece = BlockBuf::zeroed(64);
        for first in (0..VOLUME_BLOCKS).step_by(64) {
            block_on(self.volume.write(&self.file, first * BLOCK_BYTES, &piece)).unwrap();
        }
        block_on(self.volume.flush(&self.file)).unwrap();
        self
    }

    /// The byte offset of a block, another one each time until all have had their turn.
    pub(crate) fn random_offset(&self) -> u64 {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        (turn.wrapping_mul(STRIDE) % VOLUME_BLOCKS) * BLOCK_BYTES
    }

    /// A number for a name, another one each time.
    pub(crate) fn number(&self) -> u64 {
        self.named.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn snapshot(&self) -> VolumePath {
        let path: VolumePath = format!("v@s{}", self.number()).parse().unwrap();
        block_on(self.pool.snapshot(&self.file, std::slice::from_ref(&path))).unwrap();
        path
    }

    pub(crate) fn write(&self, block: &BlockBuf) {
        block_on(self.volume.write(&self.file, self.random_offset(), block)).unwrap();
    }

    /// What is left when the process dies.
    pub(crate) fn killed(self) -> Killed {
        Killed {
            place: self.place,
            file: self.file,
        }
    }
}

/// A pool that nobody has open.
pub(crate) struct Killed {
    place: Place,
    file: FileDevice,
}

impl Killed {
    /// Opens it, with what there is to recover.
    pub(crate) fn open(self) -> (Self, Pool) {
        let pool = block_on(Pool::open(&self.file, open_options(&self.place.0))).unwrap();
        (self, pool)
    }
}

fn open_options(path: &Path) -> OpenOptions {
    OpenOptions {
        read_only: false,
        device_blocks: POOL_BLOCKS,
        ring: RingPlace::File {
            path: path.with_extension("ring"),
            boot_id: [1; 16],
        },
        clock: Arc::new(SystemClock::new()),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for path in [&self.0, &self.0.with_extension("ring")] {
            let removed = std::fs::remove_file(path);
            assert!(removed.is_ok() || !path.exists(), "{}", path.display());
        }
    }
}
