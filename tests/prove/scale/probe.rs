//! The other half of the scene `huge`, in a process of its own: opens the pool that was built, and prints what it measures
//! as lines `@ NAME VALUE`.

use super::kit::{Bench, Over, seconds, timed};
use super::sparse::{self, Hurried};
use blockfork::device::{Access, BlockBuf, Device, FileDevice, PoolFile};
use blockfork::error::Result;
use blockfork::pool::Attached;
use blockfork::units::{BLOCK_BYTES, BLOCK_LEN};
use fastrand::Rng;
use futures_lite::future::block_on;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Blocks that a leaf of a map covers.
const LEAF_BLOCKS: u64 = 512;
/// So that nearly every leaf is met.
const TOUCHES_PER_LEAF: u64 = 3;
const READERS: u64 = 4;
const READ_TIME: Duration = Duration::from_secs(10);
/// What a mapped tebibyte has of map pages, with what they take beyond their bytes.
const MAP_BYTES_PER_BLOCK: u64 = 9;
const STAND_IN_BLOCKS: u64 = 1 << 18;

pub(super) fn run(folder: &Path, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let file = sparse::open(folder);
    let pool_blocks = file.file().blocks();
    let before = resident_bytes();
    let (bench, ns) = timed(|| Bench::open(file, pool_blocks));
    println!("@ open_s {}", seconds(ns));
    println!(
        "@ open_mib {}",
        mib(resident_bytes().saturating_sub(before))
    );
    // Writes reach nothing: their data would take room, and nothing of it is looked at.
    let bench = Bench {
        device: Hurried(bench.device),
        pool: bench.pool,
    };
    let volume = bench.attach("v");
    let blocks = volume.bytes() / BLOCK_BYTES;
    touch(&bench, &volume, &mut rng);
    let grown = mib(resident_bytes().saturating_sub(before)) / 1024.0;
    let tebibytes = mib(volume.bytes()) / f64::from(1 << 20);
    eprintln!("prove: {grown:.2} GiB of memory under random I/O");
    println!("@ io_gib_per_tib {}", grown / tebibytes);
    volume.detach();
    drop(volume);
    drop(bench.close());
    let whole = blocks * MAP_BYTES_PER_BLOCK;
    let all = read_rate(folder, whole, &mut rng);
    let quarter = read_rate(folder, whole / 4, &mut rng);
    println!("@ reads_kept {}", quarter / all);
}

/// Reads and writes at random, until nearly every leaf and every region's counts were needed.
fn touch(bench: &Bench<Hurried>, volume: &Attached, rng: &mut Rng) {
    let blocks = volume.bytes() / BLOCK_BYTES;
    let mut block = BlockBuf::zeroed(1);
    for index in 0..blocks / LEAF_BLOCKS * TOUCHES_PER_LEAF {
        let lba = rng.u64(..blocks);
        if rng.bool() {
            bench.write(volume, lba, &block);
        } else {
            let read = volume.read(&bench.device, lba * BLOCK_BYTES, &mut block);
            block_on(read).expect("a read");
        }
        if index % 1024 == 0 {
            bench.step();
        }
    }
}

/// Reads a second by several threads, with so much memory for metadata, once that is full.
fn read_rate(folder: &Path, metadata_cache: u64, rng: &mut Rng) -> f64 {
    let file = sparse::open(folder);
    let pool_blocks = file.file().blocks();
    let device = Weighty {
        stand_in: stand_in(folder),
        file,
    };
    let bench = Bench::open_with(device, pool_blocks, Some(metadata_cache));
    let volume = bench.attach("v");
    let blocks = volume.bytes() / BLOCK_BYTES;
    let warm = blocks / LEAF_BLOCKS * TOUCHES_PER_LEAF;
    bench.read(&volume, warm, rng);
    let over = Over::default();
    let read = thread::scope(|scope| {
        let (bench, volume, over) = (&bench, &volume, &over);
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                let mut rng = rng.fork();
                scope.spawn(move || {
                    let mut read = 0.0;
                    while !over.is() {
                        read += 64.0;
                        bench.read(volume, 64, &mut rng);
                    }
                    read
                })
            })
            .collect();
        thread::sleep(READ_TIME);
        drop(over.at_the_end());
        readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader"))
            .sum::<f64>()
    });
    let rate = read / READ_TIME.as_secs_f64();
    eprintln!(
        "prove: {rate:.0} reads a second with {} MiB for metadata",
        metadata_cache >> 20
    );
    volume.detach();
    drop(volume);
    drop(bench.close());
    rate
}

/// The pool's file, where reading data costs what reading a page costs: the data was never written, and a hole is read for
/// nothing, so a block elsewhere on the disk is read for it.
struct Weighty {
    file: FileDevice,
    stand_in: FileDevice,
}

impl Device for Weighty {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read(offset, buffer).await?;
        if buffer.starts_with(&[0; 8]) {
            let block = (offset / BLOCK_BYTES).wrapping_mul(0x9e37_79b1) % STAND_IN_BLOCKS;
            self.stand_in.read(block * BLOCK_BYTES, buffer).await?;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.file.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.file.discard(offset, bytes).await
    }
}

/// A file whose blocks are all written.
fn stand_in(folder: &Path) -> FileDevice {
    let path = folder.join("stand-in");
    if !path.exists() {
        let mut file = std::fs::File::create(&path).expect("the stand-in");
        let piece = vec![0x5a; BLOCK_LEN << 8];
        for _ in 0..STAND_IN_BLOCKS >> 8 {
            file.write_all(&piece).expect("room for the stand-in");
        }
        file.sync_all().expect("the stand-in is on disk");
    }
    let access = Access {
        write: false,
        lock_wait_ms: 0,
    };
    let file = PoolFile::open(&path, access).expect("the stand-in opens");
    FileDevice::new(Arc::new(file))
}

/// Memory of this process that is in RAM.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.expect("Linux tells what a process takes") * 1024
}

#[expect(clippy::cast_precision_loss, reason = "sizes stay far below 2^53")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
