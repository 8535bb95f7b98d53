//! A whole pool whose metadata is changed under checksums that hold, then opened and used in every way there is.

use crate::fixture;
use crate::sim_device::{Loss, SimDevice};
use blockfork::clock::ManualClock;
use blockfork::device::{BlockBuf, Device};
use blockfork::error::Result;
use blockfork::name::VolumePath;
use blockfork::pool::{OpenOptions, Pool, RingPlace};
use futures_lite::future::block_on;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

const BLOCK: usize = 4096;
const POOL_BLOCKS: u64 = 4096;
const SUPERBLOCKS: [u64; 2] = [0, 8];
/// An edit: which block, where, what becomes of its checksum, and how many bytes follow.
const EDIT_BYTES: usize = 4;
/// How often a pool may say that there is more to maintain, and how many volumes are used.
const PATIENCE: usize = 256;
/// Operations of the device that any use of a pool this small ends within.
const OPERATIONS_MAX: u64 = 200_000;

type Blocks = BTreeMap<u64, [u8; BLOCK]>;

/// A device that shares its blocks with all others of the same pool, except for those that were written.
pub(super) struct Image {
    base: &'static Blocks,
    written: RefCell<Blocks>,
    operations: RefCell<u64>,
}

impl Image {
    fn new(base: &'static Blocks, written: Blocks) -> Self {
        Self {
            base,
            written: RefCell::new(written),
            operations: RefCell::new(0),
        }
    }

    /// An empty pool.
    pub(super) fn empty() -> Self {
        static BASE: OnceLock<Blocks> = OnceLock::new();
        let make = || {
            let (device, pool) = fixture::pool(POOL_BLOCKS);
            block_on(pool.close(&device)).unwrap();
            blocks_of(&device)
        };
        Self::new(BASE.get_or_init(make), Blocks::new())
    }

    fn block(&self, number: u64) -> [u8; BLOCK] {
        let written = self.written.borrow();
        let found = written.get(&number).or_else(|| self.base.get(&number));
        found.copied().unwrap_or([0; BLOCK])
    }

    fn begin(&self, offset: u64, bytes: usize) -> Result<()> {
        assert!(
            offset
                .checked_add(bytes as u64)
                .is_some_and(|end| end <= POOL_BLOCKS * BLOCK as u64),
            "{bytes} bytes at {offset} are beyond the device"
        );
        let mut operations = self.operations.borrow_mut();
        *operations += 1;
        assert!(*operations < OPERATIONS_MAX, "it goes on for ever");
        Ok(())
    }

    /// The parts of a range: block, offset in it, offset in the range, bytes.
    fn parts(offset: u64, bytes: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            (done < bytes).then(|| {
                let at = offset + done as u64;
                let inside = usize::try_from(at % BLOCK as u64).unwrap();
                let count = (BLOCK - inside).min(bytes - done);
                let part = (at / BLOCK as u64, inside, done, count);
                done += count;
                part
            })
        })
    }
}

impl Device for Image {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.begin(offset, buffer.len())?;
        for (number, inside, at, count) in Self::parts(offset, buffer.len()) {
            buffer[at..at + count].copy_from_slice(&self.block(number)[inside..inside + count]);
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.begin(offset, buffer.len())?;
        for (number, inside, at, count) in Self::parts(offset, buffer.len()) {
            let mut block = self.block(number);
            block[inside..inside + count].copy_from_slice(&buffer[at..at + count]);
            self.written.borrow_mut().insert(number, block);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.begin(0, 0)
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.begin(offset, usize::try_from(bytes).unwrap())
    }
}

/// A pool with everything that pools have, not closed: shared pages, a clone, a tree that is being reclaimed, and a
/// journal with records that no checkpoint covers.
fn make() -> SimDevice {
    let (device, pool) = fixture::pool(POOL_BLOCKS);
    let a = fixture::volume(&device, &pool, "a", 2048);
    fixture::put(&device, &a, 0, 8, 1).unwrap();
    fixture::put(&device, &a, 600, 3, 2).unwrap();
    let snapshot = |text: &str| {
        block_on(pool.snapshot(&device, &[fixture::path(text)])).unwrap();
    };
    snapshot("a@one");
    fixture::put(&device, &a, 2, 4, 3).unwrap();
    snapshot("a@two");
    block_on(pool.clone_snapshot(&device, &fixture::path("a@one"), &"b".parse().unwrap())).unwrap();
    let c = fixture::volume(&device, &pool, "c", 1 << 20);
    fixture::put(&device, &c, 0, 2, 4).unwrap();
    fixture::put(&device, &c, (1 << 20) - 1, 1, 5).unwrap();
    c.detach();
    block_on(pool.remove(&device, &[fixture::path("c")], false, false)).unwrap();
    block_on(pool.checkpoint(&device)).unwrap();
    fixture::put(&device, &a, 1030, 4, 6).unwrap();
    block_on(a.discard(&device, 0, 4096)).unwrap();
    block_on(a.flush(&device)).unwrap();
    drop(fixture::volume(&device, &pool, "d", 16));
    snapshot("a@three");
    block_on(pool.rename(&device, &fixture::path("b"), &fixture::path("e"))).unwrap();
    device.restart(Loss::None, &mut fastrand::Rng::with_seed(0));
    device
}

/// The blocks of a device that are not zeros.
fn blocks_of(device: &SimDevice) -> Blocks {
    device.with_bytes(|bytes| {
        let blocks = bytes.chunks_exact(BLOCK).zip(0..);
        blocks
            .filter(|(block, _)| block.iter().any(|byte| *byte != 0))
            .map(|(block, number)| (number, block.try_into().unwrap()))
            .collect()
    })
}

/// The pool's blocks, and the numbers of those that hold metadata.
fn base() -> &'static (Blocks, Vec<u64>) {
    static BASE: OnceLock<(Blocks, Vec<u64>)> = OnceLock::new();
    BASE.get_or_init(|| {
        let blocks = blocks_of(&make());
        let is_metadata = |(_, block): &(&u64, &[u8; BLOCK])| crc_at(*block).is_some();
        let metadata = blocks.iter().filter(is_metadata).map(|(number, _)| *number);
        let metadata = metadata.collect();
        (blocks, metadata)
    })
}

/// Where a metadata block has its checksum.
fn crc_at(block: &[u8]) -> Option<usize> {
    if block.starts_with(b"BLKFORK\0") {
        return Some(12);
    }
    (block.starts_with(b"BFpg") || block.starts_with(b"BFjb")).then_some(4)
}

fn seal(block: &mut [u8; BLOCK], at: usize) -> u32 {
    block[at..at + 4].fill(0);
    let crc = crc32fast::hash(block);
    block[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// The pool with the edits that the input names. Each is: a byte that chooses a block of metadata, 16 bits of place and
/// flags, a length, and bytes. Both superblocks are edited as one. The checksum is made right, and the chain of the
/// journal too, unless the flag in bit 15 says otherwise.
fn edited(mut input: &[u8]) -> Image {
    let (blocks, metadata) = base();
    let mut changed = Blocks::new();
    let mut has_journal = false;
    while let Some((head, rest)) = input.split_at_checked(EDIT_BYTES) {
        let number = metadata[usize::from(head[0]) % metadata.len()];
        let place = u16::from_le_bytes([head[1], head[2]]);
        let at = usize::from(place) % BLOCK;
        let length = usize::from(head[3]).min(rest.len()).min(BLOCK - at);
        let (bytes, rest) = rest.split_at(length);
        input = rest;
        let copies = if SUPERBLOCKS.contains(&number) {
            SUPERBLOCKS.to_vec()
        } else {
            vec![number]
        };
        for number in copies {
            let block = changed.entry(number).or_insert_with(|| blocks[&number]);
            let kind = blocks[&number];
            has_journal |= kind.starts_with(b"BFjb");
            // A superblock's own place is all in which the copies differ.
            let own = block[40..48].to_vec();
            block[at..at + length].copy_from_slice(bytes);
            if SUPERBLOCKS.contains(&number) {
                block[40..48].copy_from_slice(&own);
            }
            if place >> 15 == 0
                && let Some(crc) = crc_at(&kind)
            {
                seal(block, crc);
            }
        }
    }
    if has_journal {
        chain(blocks, metadata, &mut changed);
    }
    Image::new(blocks, changed)
}

/// Makes every journal block name the one before it again.
fn chain(blocks: &Blocks, metadata: &[u64], changed: &mut Blocks) {
    let journal = metadata
        .iter()
        .filter(|number| blocks[number].starts_with(b"BFjb"));
    let mut before = None;
    for number in journal {
        let mut block = *changed.get(number).unwrap_or(&blocks[number]);
        let crc = match before {
            None => u32::from_le_bytes(block[4..8].try_into().unwrap()),
            Some(before) => {
                block[40..44].copy_from_slice(&u32::to_le_bytes(before));
                seal(&mut block, 4)
            }
        };
        before = Some(crc);
        changed.insert(*number, block);
    }
}

pub(super) fn open(image: &Image, read_only: bool) -> Result<Arc<Pool>> {
    let options = OpenOptions {
        read_only,
        device_blocks: POOL_BLOCKS,
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    };
    block_on(Pool::open(image, options)).map(Arc::new)
}

/// Everything that can be read.
fn look(image: &Image, pool: &Arc<Pool>) -> Result<()> {
    let (_status, _stats) = (pool.status(), pool.stats());
    let paths: Vec<VolumePath> = block_on(pool.list(image))?
        .into_iter()
        .map(|entry| entry.path)
        .collect();
    let mut buffer = BlockBuf::zeroed(64);
    for path in paths.iter().take(PATIENCE) {
        let Ok(attached) = pool.attach(path, true) else {
            continue;
        };
        let bytes = attached.bytes();
        for offset in [0, 512 << 12, 600 << 12, 1024 << 12, bytes / 2, bytes] {
            let offset = offset.min(bytes.saturating_sub(buffer.len() as u64)) & !4095;
            let _read = block_on(attached.read(image, offset, &mut buffer));
        }
        attached.detach();
    }
    for pair in paths.windows(2).take(8) {
        let _differ = block_on(pool.diff(image, &pair[0], &pair[1]));
    }
    Ok(())
}

/// Everything that can be changed.
fn change(image: &Image, pool: &Arc<Pool>) -> Result<()> {
    for _ in 0..PATIENCE {
        if !block_on(pool.maintain(image))? {
            break;
        }
    }
    let buffer = BlockBuf::zeroed(2);
    if let Ok(attached) = pool.attach(&fixture::path("a"), false) {
        for offset in [0, 2 << 12, 600 << 12, 1500 << 12] {
            let _written = block_on(attached.write(image, offset, &buffer));
            let _gone = block_on(attached.discard(image, offset, 4096));
        }
        let _flushed = block_on(attached.flush(image));
        attached.detach();
    }
    let _taken = block_on(pool.snapshot(image, &[fixture::path("a@new")]));
    let _back = block_on(pool.rollback(image, &fixture::path("a@one")));
    let _smaller = block_on(pool.resize(image, &"a".parse()?, 4096, true));
    let _gone = block_on(pool.remove(image, &[fixture::path("a@two")], false, false));
    let _all = block_on(pool.remove(image, &[fixture::path("e")], true, false));
    block_on(pool.checkpoint(image))?;
    for _ in 0..PATIENCE {
        if !block_on(pool.maintain(image))? {
            break;
        }
    }
    block_on(pool.close(image))
}

/// What opened once, and was closed without an error, opens again.
pub(super) fn run(input: &[u8]) {
    let image = edited(input);
    if let Ok(pool) = open(&image, true) {
        let _seen = look(&image, &pool);
        let _checked = block_on(pool.check(&image, &mut |_, _| {}));
    }
    let Ok(pool) = open(&image, false) else {
        return;
    };
    let _seen = look(&image, &pool);
    let changed = change(&image, &pool);
    drop(pool);
    let again = open(&image, true);
    if changed.is_ok() {
        again.as_ref().expect("what was closed opens again");
    }
    if let Ok(pool) = again {
        let _checked = block_on(pool.check(&image, &mut |_, _| {}));
    }
}

/// The metadata of the pool, with the number of each block.
pub(super) fn metadata() -> Vec<(u64, &'static [u8])> {
    let (blocks, metadata) = base();
    let block = |number: &u64| (*number, blocks[number].as_slice());
    metadata.iter().map(block).collect()
}
