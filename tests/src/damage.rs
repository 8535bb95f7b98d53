//! Small pools whose every live block of metadata is damaged in every way that a medium can think of, and what may
//! come of it: the same data as ever, or an error that names the damage. Never other data, a panic or a hang.
//!
//! Data blocks carry no checksum: what decays in them is read as it is, and they are not damaged here.

use crate::fixture::path;
use crate::sim_device::SimDevice;
use blockfork::clock::ManualClock;
use blockfork::device::{BlockBuf, Device};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::pool::{
    Attached, CheckReport, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use futures_lite::future::block_on;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

const BLOCK: usize = 4096;
/// Bits of a block.
pub const BLOCK_BITS: u64 = 8 * BLOCK as u64;
/// Bytes that a torn write leaves whole.
const SECTOR: usize = 512;
/// More operations than any opening, reading and checking of such a pool takes: a hang.
const OPERATIONS_MAX: u64 = 100_000;
/// A read of a volume has so many blocks.
const CHUNK: usize = 32;

/// What each block of each volume and snapshot holds; 0 is zeros.
type Contents = BTreeMap<String, Vec<u64>>;

/// A pool on a device that never changes, what it holds, and what the device held earlier.
#[derive(Debug)]
pub struct Scene {
    /// What it is called.
    pub name: &'static str,
    image: Vec<u8>,
    /// Earlier states of the device, oldest first.
    earlier: Vec<Vec<u8>>,
    contents: Contents,
    /// The same without the last commit, where a journal has one.
    before_last: Option<Contents>,
    /// Every block of metadata that opening, reading and checking look at.
    live: Vec<u64>,
    /// Of those, the journal blocks of the last commit.
    last_commit: BTreeSet<u64>,
}

/// One way to damage a pool. Blocks are numbers of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit is another.
    Flip { block: u64, bit: u64 },
    /// Zeros.
    Zero { block: u64 },
    /// What it held in an earlier state: its last write was lost.
    Stale { block: u64, state: usize },
    /// The first sectors of what it holds now, the others of an earlier state, or the other way round.
    Torn {
        block: u64,
        state: usize,
        sectors: usize,
        old_first: bool,
    },
    /// Two blocks changed places.
    Swap { a: u64, b: u64 },
    /// What was written to one stands in another too.
    Misdirected { from: u64, to: u64 },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What came of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All data is there, and nothing is reported.
    Harmless,
    /// All data is there, and the damage is reported.
    Reported,
    /// Some data cannot be read, and the report names it.
    Refused,
    /// The last commit is gone with its journal block, as if the power had failed before it.
    CutCommit,
}

/// A pool's device with some blocks damaged; what is written to it stays in memory.
struct Overlay<'a> {
    image: &'a [u8],
    over: RefCell<BTreeMap<u64, Box<[u8; BLOCK]>>>,
    operations: Cell<u64>,
    seen: RefCell<Option<BTreeSet<u64>>>,
}

impl<'a> Overlay<'a> {
    fn new(image: &'a [u8]) -> Self {
        Self {
            image,
            over: RefCell::default(),
            operations: Cell::new(0),
            seen: RefCell::default(),
        }
    }

    fn block(&self, block: u64) -> [u8; BLOCK] {
        let over = self.over.borrow();
        match over.get(&block) {
            Some(bytes) => **bytes,
            None => at(self.image, block).try_into().unwrap(),
        }
    }

    fn set(&self, block: u64, bytes: [u8; BLOCK]) {
        self.over.borrow_mut().insert(block, Box::new(bytes));
    }

    fn count(&self) -> Result<()> {
        self.operations.set(self.operations.get() + 1);
        if self.operations.get() > OPERATIONS_MAX {
            return Err(Error::with(ErrorKind::Io, "too many operations: a hang"));
        }
        Ok(())
    }
}

impl Device for Overlay<'_> {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.count()?;
        let first = offset / BLOCK as u64;
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.image[start..start + buffer.len()]);
        let blocks = (buffer.len() / BLOCK) as u64;
        for (block, bytes) in self.over.borrow().range(first..first + blocks) {
            let at = usize::try_from(block - first).unwrap() * BLOCK;
            buffer[at..at + BLOCK].copy_from_slice(&bytes[..]);
        }
        if let Some(seen) = &mut *self.seen.borrow_mut() {
            seen.extend(first..first + blocks);
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.count()?;
        for (block, bytes) in (offset / BLOCK as u64..).zip(buffer.chunks_exact(BLOCK)) {
            self.set(block, bytes.try_into().unwrap());
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.count()
    }

    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<()> {
        self.count()
    }
}

fn at(image: &[u8], block: u64) -> &[u8] {
    let start = usize::try_from(block).unwrap() * BLOCK;
    &image[start..start + BLOCK]
}

/// What kind of metadata a block holds: two of one kind can be mistaken for each other.
fn kind(bytes: &[u8]) -> Option<(u8, u8)> {
    match &bytes[..4] {
        b"BLKF" => Some((100, 0)),
        b"BFjb" => Some((101, 0)),
        b"BFpg" => Some((bytes[40], bytes[41])),
        _ => None,
    }
}

/// Builds a pool step by step, beside what it should hold.
struct Builder {
    device: SimDevice,
    pool: Arc<Pool>,
    contents: Contents,
    earlier: Vec<Vec<u8>>,
    stamp: u64,
}

impl Builder {
    fn new() -> Self {
        let device = SimDevice::new(4096);
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([7; 16]),
            blocks: 4096,
            created: Timestamp(1),
        };
        block_on(Pool::create(&device, options)).unwrap();
        let pool = crate::fixture::open(&device).unwrap();
        Self {
            device,
            pool,
            contents: Contents::new(),
            earlier: Vec::new(),
            stamp: 0,
        }
    }

    fn image(&self) -> Vec<u8> {
        self.device.with_bytes(|bytes| bytes.to_vec())
    }

    fn remember(&mut self) {
        self.earlier.push(self.image());
    }

    fn volume(&mut self, name: &str, blocks: usize) {
        let options = VolumeOptions {
            bytes: (blocks * BLOCK) as u64,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        block_on(
            self.pool
                .create_volume(&self.device, &name.parse().unwrap(), options),
        )
        .unwrap();
        self.contents.insert(name.to_owned(), vec![0; blocks]);
    }

    /// Writes runs of three blocks, each block unlike any other.
    fn put(&mut self, name: &str, places: &[usize]) {
        let attached = self.pool.attach(&path(name), false).unwrap();
        for place in places {
            let mut buffer = BlockBuf::zeroed(3);
            for (index, block) in buffer.chunks_exact_mut(BLOCK).enumerate() {
                self.stamp += 1;
                let word = self.stamp.to_le_bytes();
                block
                    .chunks_exact_mut(8)
                    .for_each(|at| at.copy_from_slice(&word));
                self.contents.get_mut(name).unwrap()[place + index] = self.stamp;
            }
            block_on(attached.write(&self.device, (place * BLOCK) as u64, &buffer)).unwrap();
        }
    }

    fn flush(&mut self) {
        block_on(self.pool.flush(&self.device)).unwrap();
        self.remember();
    }

    fn checkpoint(&mut self) {
        block_on(self.pool.checkpoint(&self.device)).unwrap();
        self.remember();
    }

    fn snapshot(&mut self, text: &str) {
        block_on(self.pool.snapshot(&self.device, &[path(text)])).unwrap();
        let (volume, _) = text.split_once('@').unwrap();
        let content = self.contents[volume].clone();
        self.contents.insert(text.to_owned(), content);
    }

    fn clone_of(&mut self, snapshot: &str, name: &str) {
        let (from, to) = (path(snapshot), name.parse().unwrap());
        block_on(self.pool.clone_snapshot(&self.device, &from, &to)).unwrap();
        let content = self.contents[snapshot].clone();
        self.contents.insert(name.to_owned(), content);
    }

    fn end(mut self, name: &'static str, before_last: Option<Contents>) -> Scene {
        let image = self.image();
        self.earlier.retain(|earlier| *earlier != image);
        let mut scene = Scene {
            name,
            image,
            earlier: self.earlier,
            contents: self.contents,
            before_last,
            live: Vec::new(),
            last_commit: BTreeSet::new(),
        };
        scene.find_live();
        scene
    }
}

/// A pool of three volumes, two snapshots and a clone that share pages, after some checkpoints.
fn build() -> Builder {
    let mut builder = Builder::new();
    builder.volume("a", 544);
    builder.volume("b", 32);
    builder.put("a", &[0, 500, 510, 530]);
    builder.put("b", &[5]);
    builder.checkpoint();
    builder.snapshot("a@1");
    builder.clone_of("a@1", "c");
    builder.put("a", &[1, 30]);
    builder.checkpoint();
    builder.put("c", &[531]);
    builder.snapshot("b@1");
    builder.put("b", &[7, 20]);
    builder.checkpoint();
    builder
}

impl Scene {
    /// The pool was closed: everything is in a checkpoint.
    pub fn closed() -> Self {
        let mut builder = build();
        block_on(builder.pool.close(&builder.device)).unwrap();
        builder.remember();
        builder.end("closed", None)
    }

    /// The power failed: the journal holds commits of several kinds, the last of one block.
    pub fn crashed() -> Self {
        let mut builder = build();
        builder.put("a", &[40, 505]);
        builder.flush();
        builder.snapshot("a@2");
        builder.put("a", &[41, 532]);
        builder.put("b", &[5, 9]);
        builder.flush();
        builder.volume("d", 16);
        builder.put("d", &[2]);
        builder.put("c", &[0]);
        builder.flush();
        let before_last = builder.contents.clone();
        // Only where nothing is mapped: a write in place needs no journal.
        builder.put("a", &[50]);
        builder.put("d", &[8]);
        builder.flush();
        builder.end("crashed", Some(before_last))
    }

    fn find_live(&mut self) {
        let overlay = Overlay::new(&self.image);
        *overlay.seen.borrow_mut() = Some(BTreeSet::new());
        for read_only in [true, false] {
            let seen = self
                .look(&overlay, false, read_only, &self.contents)
                .unwrap();
            assert!(!seen.is_damaged && seen.unread.is_empty(), "{seen:?}");
        }
        let seen = overlay.seen.take().unwrap();
        let is_written = |block: &u64| overlay.over.borrow().contains_key(block);
        let superblocks = [0, 8];
        let journal = |block: &u64| at(&self.image, *block).starts_with(b"BFjb");
        self.live = seen
            .iter()
            .filter(|block| kind(at(&self.image, **block)).is_some())
            .filter(|block| superblocks.contains(*block) || journal(block) || !is_written(block))
            .copied()
            .collect();
        // Old journal blocks, which a checkpoint made worthless, are not live.
        let number = |block: u64| {
            let bytes = at(&self.image, block)[24..32].try_into().unwrap();
            u64::from_le_bytes(bytes)
        };
        let first = u64::from_le_bytes(at(&self.image, 0)[128..136].try_into().unwrap());
        self.live
            .retain(|block| !journal(block) || number(*block) >= first);
        if self.before_last.is_some() {
            let last = self
                .live
                .iter()
                .copied()
                .filter(journal)
                .max_by_key(|block| number(*block));
            self.last_commit.extend(last);
        }
    }

    /// What each block of a volume or snapshot holds, in each of its words; 0 is zeros.
    pub fn content(&self, path: &str) -> &[u64] {
        &self.contents[path]
    }

    /// The live blocks.
    pub fn live(&self) -> &[u64] {
        &self.live
    }

    /// Blocks that nothing looks at.
    pub fn unused(&self) -> Vec<u64> {
        let overlay = Overlay::new(&self.image);
        *overlay.seen.borrow_mut() = Some(BTreeSet::new());
        self.look(&overlay, false, true, &self.contents).unwrap();
        let seen = overlay.seen.take().unwrap();
        let blocks = (self.image.len() / BLOCK) as u64;
        (0..blocks).filter(|block| !seen.contains(block)).collect()
    }

    /// All damage but flipped bits.
    pub fn damages(&self) -> Vec<Damage> {
        let mut all = Vec::new();
        for &block in &self.live {
            all.push(Damage::Zero { block });
            let mut known: Vec<&[u8]> = vec![at(&self.image, block)];
            for (state, earlier) in self.earlier.iter().enumerate() {
                if known.contains(&at(earlier, block)) {
                    continue;
                }
                known.push(at(earlier, block));
                all.push(Damage::Stale { block, state });
                for (sectors, old_first) in
                    (1..BLOCK / SECTOR).flat_map(|n| [(n, false), (n, true)])
                {
                    all.push(Damage::Torn {
                        block,
                        state,
                        sectors,
                        old_first,
                    });
                }
            }
            for &other in &self.live {
                if other == block {
                    continue;
                }
                all.push(Damage::Misdirected {
                    from: other,
                    to: block,
                });
                let same_kind = kind(at(&self.image, block)) == kind(at(&self.image, other));
                if same_kind && block < other {
                    all.push(Damage::Swap { a: block, b: other });
                }
            }
        }
        all
    }

    fn inflict(&self, overlay: &Overlay<'_>, damage: Damage) {
        match damage {
            Damage::Flip { block, bit } => {
                let mut bytes = overlay.block(block);
                bytes[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
                overlay.set(block, bytes);
            }
            Damage::Zero { block } => overlay.set(block, [0; BLOCK]),
            Damage::Stale { block, state } => {
                overlay.set(block, at(&self.earlier[state], block).try_into().unwrap());
            }
            Damage::Torn {
                block,
                state,
                sectors,
                old_first,
            } => {
                let (mut bytes, old) = (overlay.block(block), at(&self.earlier[state], block));
                let cut = sectors * SECTOR;
                let range = if old_first { 0..cut } else { cut..BLOCK };
                bytes[range.clone()].copy_from_slice(&old[range]);
                overlay.set(block, bytes);
            }
            Damage::Swap { a, b } => {
                let (was_a, was_b) = (overlay.block(a), overlay.block(b));
                overlay.set(a, was_b);
                overlay.set(b, was_a);
            }
            Damage::Misdirected { from, to } => overlay.set(to, overlay.block(from)),
        }
    }

    fn hits_last_commit(&self, damage: Damage) -> bool {
        let hit = |block| self.last_commit.contains(&block);
        match damage {
            // Told from a torn block by its CRC.
            Damage::Flip { .. } => false,
            Damage::Zero { block } | Damage::Stale { block, .. } | Damage::Torn { block, .. } => {
                hit(block)
            }
            Damage::Swap { a, b } => hit(a) || hit(b),
            Damage::Misdirected { to, .. } => hit(to),
        }
    }

    /// A device that holds the damaged pool.
    pub fn damaged(&self, damages: &[Damage]) -> SimDevice {
        let overlay = Overlay::new(&self.image);
        for damage in damages {
            self.inflict(&overlay, *damage);
        }
        let device = SimDevice::new((self.image.len() / BLOCK) as u64);
        device.with_bytes(|bytes| {
            bytes.copy_from_slice(&self.image);
            for (block, damaged) in &*overlay.over.borrow() {
                let start = usize::try_from(*block).unwrap() * BLOCK;
                bytes[start..start + BLOCK].copy_from_slice(&damaged[..]);
            }
        });
        device
    }

    /// Opens a pool that was damaged and mended, for writing; whether all data is there and a check finds nothing, or
    /// what is wrong.
    pub fn is_whole(&self, device: &SimDevice) -> std::result::Result<bool, String> {
        let seen = self.look(device, false, false, &self.contents)?;
        Ok(seen.unread.is_empty() && !seen.is_damaged)
    }

    /// The live blocks of a kind of page, as the format numbers them; 100 is a superblock, 101 a journal block.
    pub fn live_of(&self, wanted: u8) -> Vec<u64> {
        let is_wanted =
            |block: &u64| kind(at(&self.image, *block)).is_some_and(|(kind, _)| kind == wanted);
        self.live.iter().copied().filter(is_wanted).collect()
    }

    /// Opens the damaged pool for reading and for writing, reads everything and checks; what came of it, or what is
    /// wrong with that.
    pub fn judge(&self, damage: Damage) -> std::result::Result<Outcome, String> {
        let mut worst = Outcome::Harmless;
        for read_only in [true, false] {
            let overlay = Overlay::new(&self.image);
            self.inflict(&overlay, damage);
            let outcome = self.judge_opening(&overlay, read_only, damage)?;
            if outcome as u8 > worst as u8 {
                worst = outcome;
            }
        }
        Ok(worst)
    }

    fn judge_opening(
        &self,
        overlay: &Overlay<'_>,
        read_only: bool,
        damage: Damage,
    ) -> std::result::Result<Outcome, String> {
        let how = if read_only { "reading" } else { "writing" };
        let told = |error: String| format!("{} opened for {how}, {damage}: {error}", self.name);
        let is_headless = self.is_headless(overlay);
        match self.look(overlay, is_headless, read_only, &self.contents) {
            Ok(seen) if !seen.unread.is_empty() => Ok(Outcome::Refused),
            Ok(seen) if seen.is_damaged => Ok(Outcome::Reported),
            Ok(_) => Ok(Outcome::Harmless),
            Err(wrong) if self.hits_last_commit(damage) => {
                let before = self
                    .before_last
                    .as_ref()
                    .ok_or_else(|| told(wrong.clone()))?;
                let again = Overlay::new(&self.image);
                self.inflict(&again, damage);
                let seen = self.look(&again, false, read_only, before).map_err(told)?;
                if seen.unread.is_empty() {
                    Ok(Outcome::CutCommit)
                } else {
                    Err(told(wrong))
                }
            }
            Err(wrong) => Err(told(wrong)),
        }
    }

    /// Whether neither superblock copy is what it was.
    fn is_headless(&self, overlay: &Overlay<'_>) -> bool {
        let mut copies = [0, 8].into_iter();
        copies.all(|copy| overlay.block(copy) != at(&self.image, copy))
    }

    /// Opens, reads everything and checks. An error says what must not be.
    fn look<D: Device>(
        &self,
        device: &D,
        is_headless: bool,
        read_only: bool,
        contents: &Contents,
    ) -> std::result::Result<Seen, String> {
        let options = OpenOptions {
            read_only,
            device_blocks: (self.image.len() / BLOCK) as u64,
            ring: RingPlace::Nowhere,
            clock: Arc::new(ManualClock::default()),
        };
        let mut seen = Seen::default();
        let pool = match block_on(Pool::open(device, options)) {
            Ok(pool) => Arc::new(pool),
            Err(error) if error.kind() == ErrorKind::Corrupt && !read_only => {
                seen.is_damaged = true;
                seen.unread.extend(contents.keys().cloned());
                return Ok(seen);
            }
            // Without a superblock nothing is found; with one of them everything else may be damaged.
            Err(error) if error.kind() == ErrorKind::Corrupt && is_headless => {
                seen.is_damaged = true;
                seen.unread.extend(contents.keys().cloned());
                return Ok(seen);
            }
            Err(error) => return Err(format!("does not open: {error}")),
        };
        seen.is_damaged = !pool.warnings().is_empty();
        let mut failed = Vec::new();
        let mut whole = BlockBuf::zeroed(CHUNK);
        for (name, expected) in contents {
            let attached = match pool.attach(&path(name), true) {
                Ok(attached) => attached,
                Err(error) if error.kind() == ErrorKind::Corrupt || seen.is_damaged => {
                    seen.unread.insert(name.clone());
                    continue;
                }
                Err(error) => return Err(format!("{name} cannot be attached: {error}")),
            };
            if attached.bytes() != (expected.len() * BLOCK) as u64 {
                return Err(format!("{name} is of another size"));
            }
            let holes = holes(&attached, device);
            for (index, chunk) in expected.chunks(CHUNK).enumerate() {
                let offset = (index * CHUNK * BLOCK) as u64;
                let end = offset + (chunk.len() * BLOCK) as u64;
                let is_hole = (holes.iter()).any(|hole| hole.start <= offset && end <= hole.end);
                if is_hole && chunk.iter().all(|stamp| *stamp == 0) {
                    continue;
                }
                let buffer = &mut whole[..chunk.len() * BLOCK];
                // What a read leaves as it was does not look like data.
                buffer
                    .chunks_exact_mut(8)
                    .step_by(256)
                    .for_each(|word| word.fill(0xee));
                match block_on(attached.read(device, offset, buffer)) {
                    Ok(()) => compare(name, index * CHUNK, chunk, buffer)?,
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        seen.unread.insert(name.clone());
                        failed.push((name, offset));
                    }
                    Err(error) => return Err(format!("{name} cannot be read: {error}")),
                }
            }
        }
        let report = match block_on(pool.check(device, &mut |_, _| {})) {
            Ok(report) => report,
            Err(error) => return Err(format!("cannot be checked: {error}")),
        };
        for (name, offset) in failed {
            if !names(&report, name, offset) {
                return Err(format!("{name} at {offset} is unreadable and not reported"));
            }
        }
        seen.is_damaged |= report.exit_code() != 0;
        if !seen.unread.is_empty() && report.damage.is_empty() {
            return Err(format!(
                "{:?} cannot be read, and nothing is reported",
                seen.unread
            ));
        }
        Ok(seen)
    }
}

/// What is not mapped and so reads as zeros: the lookup says so that a read makes too. Nothing where a page of the map
/// cannot be read: then reads have to show which ranges that concerns.
fn holes<D: Device>(attached: &Attached, device: &D) -> Vec<Range<u64>> {
    let runs = block_on(attached.allocation(device, 0, attached.bytes(), usize::MAX));
    let mut at = 0;
    let mut holes = Vec::new();
    for run in runs.unwrap_or_default() {
        let end = at + run.bytes;
        if !run.is_mapped {
            holes.push(at..end);
        }
        at = end;
    }
    holes
}

/// What one opening showed.
#[derive(Debug, Default)]
struct Seen {
    is_damaged: bool,
    unread: BTreeSet<String>,
}

/// Whether the report says that a volume cannot be read there.
fn names(report: &CheckReport, name: &str, offset: u64) -> bool {
    report.unreadable.iter().any(|unreadable| {
        let is_it = unreadable
            .path
            .as_ref()
            .is_some_and(|path| path.to_string() == name);
        let mut ranges = unreadable.ranges.iter();
        // The chunk that failed may begin before the range.
        let end = offset + (CHUNK * BLOCK) as u64;
        is_it && ranges.any(|range| range.offset < end && offset < range.offset + range.length)
    })
}

fn compare(
    name: &str,
    first: usize,
    expected: &[u64],
    buffer: &[u8],
) -> std::result::Result<(), String> {
    for (index, (stamp, block)) in expected.iter().zip(buffer.chunks_exact(BLOCK)).enumerate() {
        // Its first word is the stamp, and each is the next one.
        if block[..8] != stamp.to_le_bytes() || block[8..] != block[..BLOCK - 8] {
            let found = u64::from_le_bytes(block[..8].try_into().unwrap());
            let lba = first + index;
            return Err(format!("{name} block {lba}: holds {found}, not {stamp}"));
        }
    }
    Ok(())
}
