//! R14, its first half: how long a large pool takes to open after a crash, from a real file, with all there is to
//! recover: a journal as full as it gets, and with a ring the records that no commit had covered.

use crate::Common;
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, BlockBuf, Device, FileDevice, PoolFile};
use blockfork::error::Result;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use fastrand::Rng;
use futures_lite::future::block_on;
use score::{Card, Target};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const VOLUMES: u64 = 10;
/// One block of two is mapped, so no two mapped blocks that follow each other are one run.
const BLOCKS_PER_EXTENT: u64 = 2;
const POOL_BYTES: u64 = 32 << 30;
const SECONDS_MAX: f64 = 2.0;
const BOOT_ID: [u8; 16] = [7; 16];

/// What is built.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Mapped extents of one block
    #[arg(long)]
    extents: Option<u64>,
    /// Snapshots
    #[arg(long)]
    snapshots: Option<u64>,
    /// Where the pool's file is made; it takes up to 8 GiB
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(crate) fn run(common: Common, options: &Options) -> Card {
    let (extents, snapshots) = if common.quick {
        (100_000, 100)
    } else {
        (1_000_000, 1_000)
    };
    let extents = options.extents.unwrap_or(extents);
    let snapshots = options.snapshots.unwrap_or(snapshots);
    let base = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let place = Place::new(&base);
    let mut card = common.card("R14");
    place.build(common.seed, extents, snapshots);
    let (mapped, found) = place.count();
    card.at_least("extents", mapped, extents);
    card.at_least("snapshots", found, snapshots);
    for (metric, ring) in [
        ("seconds to open without a ring", RingPlace::Nowhere),
        ("seconds to open with a ring", place.ring()),
    ] {
        place.wear(common.seed, extents, &ring);
        let (_, seconds) = place.open(ring);
        card.add(metric, seconds, Target::AtMost(SECONDS_MAX));
    }
    card.none("leaks and damage", place.complaints());
    card
}

/// The pool's file and its ring, removed when dropped.
#[derive(Debug)]
struct Place {
    folder: PathBuf,
    ring: PathBuf,
    clock: Arc<SystemClock>,
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.folder));
        drop(std::fs::remove_file(&self.ring));
    }
}

impl Place {
    fn new(base: &Path) -> Self {
        let folder = base.join(format!("blockfork-prove-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the pool");
        // The ring's place is a tmpfs, where there is one.
        let memory = Path::new("/dev/shm");
        let memory = if memory.is_dir() { memory } else { &folder };
        Self {
            ring: memory.join(format!("blockfork-prove-{}.ring", std::process::id())),
            folder,
            clock: Arc::new(SystemClock::new()),
        }
    }

    fn ring(&self) -> RingPlace {
        RingPlace::File {
            path: self.ring.clone(),
            boot_id: BOOT_ID,
        }
    }

    fn device(&self) -> FileDevice {
        let access = Access {
            write: true,
            lock_wait_ms: 0,
        };
        let file = PoolFile::open(&self.folder.join("pool"), access).expect("the file opens");
        FileDevice::new(Arc::new(file))
    }

    /// Opens the pool for writing; how long that took, in seconds.
    fn open(&self, ring: RingPlace) -> ((Hurried, Arc<Pool>), f64) {
        let began = self.clock.monotonic_ns();
        let device = self.device();
        let options = OpenOptions {
            read_only: false,
            device_blocks: device.file().blocks(),
            ring,
            clock: self.clock.clone(),
        };
        let pool = block_on(Pool::open(&device, options)).expect("the pool opens");
        let elapsed = self.clock.monotonic_ns() - began;
        let opened = (Hurried(device), Arc::new(pool));
        (
            opened,
            std::time::Duration::from_nanos(elapsed).as_secs_f64(),
        )
    }

    /// A pool with so many extents, and snapshots taken all the while that these were written.
    fn build(&self, seed: u64, extents: u64, snapshots: u64) {
        let file = std::fs::File::create(self.folder.join("pool")).expect("a file for the pool");
        file.set_len(POOL_BYTES).expect("a sparse file");
        drop(file);
        let device = self.device();
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: device.file().blocks(),
            created: Timestamp(1),
        };
        block_on(Pool::create(&device, options)).expect("the pool is made");
        drop(device);
        let ((device, pool), _) = self.open(RingPlace::Nowhere);
        let each = extents / VOLUMES;
        let volumes: Vec<_> = (0..VOLUMES)
            .map(|number| {
                let name = format!("v{number}").parse().unwrap();
                let options = VolumeOptions {
                    bytes: each * BLOCKS_PER_EXTENT * 4096,
                    sector_bytes: 4096,
                    // Every write is a record of the journal.
                    redirect: Redirect::Always,
                };
                block_on(pool.create_volume(&device, &name, options)).expect("a volume");
                attach(&pool, number)
            })
            .collect();
        let mut order: Vec<_> = (0..each).map(|extent| extent * BLOCKS_PER_EXTENT).collect();
        Rng::with_seed(seed).shuffle(&mut order);
        let mut taken = 0;
        for (written, lba) in order.into_iter().enumerate() {
            for volume in &volumes {
                write(&device, volume, lba);
            }
            let due = (written as u64 + 1) * snapshots / each;
            while taken < due {
                let target = format!("v{}@s{taken}", taken % VOLUMES).parse().unwrap();
                block_on(pool.snapshot(&device, &[target])).expect("a snapshot");
                taken += 1;
            }
            if written % 256 == 0 {
                block_on(pool.maintain(&device)).expect("the background work");
            }
        }
        volumes.iter().for_each(|volume| volume.detach());
        block_on(pool.close(&device)).expect("the pool closes");
    }

    /// Writes without a checkpoint until the journal has no room for a commit more, then as much as waits uncommitted,
    /// and leaves the pool as a crash does.
    fn wear(&self, seed: u64, extents: u64, ring: &RingPlace) {
        let ((device, pool), _) = self.open(ring.clone());
        let volumes: Vec<_> = (0..VOLUMES).map(|number| attach(&pool, number)).collect();
        let mut rng = Rng::with_seed(seed);
        let mut some = |count: u64| {
            for _ in 0..count {
                let volume = &volumes[rng.usize(..volumes.len())];
                let lba = rng.u64(..extents / VOLUMES) * BLOCKS_PER_EXTENT;
                write(&device, volume, lba);
            }
        };
        let checkpoints = pool.stats().checkpoints;
        loop {
            let before = pool.stats().journal_used_bytes;
            some(10_000);
            block_on(pool.flush(&device)).expect("a flush");
            let stats = pool.stats();
            let gained = stats.journal_used_bytes.saturating_sub(before);
            if stats.journal_used_bytes + 2 * gained > stats.journal_bytes || gained == 0 {
                break;
            }
        }
        some(10_000);
        let stats = pool.stats();
        assert_eq!(stats.checkpoints, checkpoints, "a checkpoint came between");
        eprintln!(
            "prove: crash with {} of {} MiB of journal in use",
            stats.journal_used_bytes >> 20,
            stats.journal_bytes >> 20
        );
    }

    /// Blocks that the volumes map, and snapshots.
    fn count(&self) -> (u64, u64) {
        let ((device, pool), _) = self.open(RingPlace::Nowhere);
        let entries = block_on(pool.list(&device)).expect("the list");
        let volumes = entries.iter().filter(|entry| entry.path.snapshot.is_none());
        let mapped = volumes.map(|entry| entry.used_bytes / 4096).sum();
        let status = pool.status();
        block_on(pool.close(&device)).expect("the pool closes");
        (mapped, status.snapshots)
    }

    /// What the checker finds.
    fn complaints(&self) -> u64 {
        let ((device, pool), _) = self.open(self.ring());
        let report = block_on(pool.check(&device, &mut |_, _| {})).expect("the check");
        u64::from(report.exit_code())
    }
}

/// The pool's file without what takes long and opening never looks at: the data, which is all zeros, and the waits for
/// the disk. Only what is built is written through this; what is measured has the file itself.
#[derive(Debug)]
struct Hurried(FileDevice);

impl Device for Hurried {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read(offset, buffer).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        // Whatever the engine writes of its own begins with a magic number.
        if buffer.starts_with(&[0; 64]) {
            return Ok(());
        }
        self.0.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

fn attach(pool: &Arc<Pool>, number: u64) -> Arc<Attached> {
    let path = format!("v{number}").parse().unwrap();
    pool.attach(&path, false).expect("the volume attaches")
}

fn write(device: &Hurried, volume: &Attached, lba: u64) {
    let buffer = BlockBuf::zeroed(1);
    block_on(volume.write(device, lba * 4096, &buffer)).expect("a write");
}
