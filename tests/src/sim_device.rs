//! A device in memory: a volatile cache that a power cut takes, in whole, in part, or torn, and calls that fail.
//!
//! It offers single system calls, as a file does, so that what makes transfers whole is the engine's own.

use crate::image::{BLOCK, Image};
use crate::tape::{Action, Operation, Tape, Tick};
use blockfork::device::SystemCalls;
use fastrand::Rng;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::rc::Rc;

/// What became of the writes that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// All of them are gone.
    All,
    /// None is: the process died, not the power.
    None,
    /// Each sector of each is there or gone, as the seed has it.
    Some,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// `EIO`, and nothing was done.
    Io,
    /// `ENOSPC`, and nothing was done.
    NoSpace,
    /// A transfer ends after one sector, with success.
    Short,
    /// `EINTR`, and nothing was done.
    Interrupted,
}

/// When and how calls fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The first call that fails, counted from 0 over the device's life.
    pub call: u64,
    /// How.
    pub kind: FaultKind,
    /// Whether every later call fails too.
    pub is_sticky: bool,
}

#[derive(Debug, Default)]
struct State {
    live: Image,
    durable: Image,
    /// What it writes whole or not at all, in bytes: its physical sector.
    sector: usize,
    /// Sectors that no flush has covered: when each was first written since the last flush, and when last.
    dirty: BTreeMap<usize, (Tick, Tick)>,
    /// Sectors that a failed flush was to cover: the kernel drops what it could not write and calls it clean, so no
    /// later flush covers them.
    dropped: BTreeSet<usize>,
    /// When the last flush that ended began.
    flushed: Tick,
    calls: u64,
    fault: Option<Fault>,
    /// Calls that failed or were cut short.
    faults: u64,
    flushes: u64,
    clock: Tick,
    tape: Option<Tape>,
    room: Option<Room>,
}

/// The file system below, where it is smaller than the device.
#[derive(Debug, Default)]
struct Room {
    /// Blocks of the file that have their place in the file system.
    backed: BTreeSet<usize>,
    /// Blocks that it has free.
    free: usize,
    /// Blocks that it keeps for the device's ballast.
    ballast: usize,
}

impl Room {
    /// Gives these bytes their blocks; false where there are not enough.
    fn back(&mut self, at: usize, bytes: usize) -> bool {
        let blocks = at / BLOCK..(at + bytes).div_ceil(BLOCK);
        let new: Vec<usize> = blocks
            .filter(|block| !self.backed.contains(block))
            .collect();
        if new.len() > self.free {
            return false;
        }
        self.free -= new.len();
        self.backed.extend(new);
        true
    }

    fn punch(&mut self, at: usize, bytes: usize) {
        for block in at.div_ceil(BLOCK)..(at + bytes) / BLOCK {
            self.free += usize::from(self.backed.remove(&block));
        }
    }
}

/// The simulated device; clones share it.
#[derive(Clone, Debug, Default)]
pub struct SimDevice(Rc<RefCell<State>>);

impl SimDevice {
    /// A device of `blocks` blocks of zeros, which tears writes at 4096 bytes.
    pub fn new(blocks: u64) -> Self {
        Self::with_sector(blocks, BLOCK)
    }

    /// A device of `blocks` blocks of zeros, which tears writes at `sector` bytes.
    pub fn with_sector(blocks: u64, sector: usize) -> Self {
        Self::from_image(Image::zeros(blocks), sector)
    }

    /// A device that holds `image`, all of it durable.
    pub fn from_image(image: Image, sector: usize) -> Self {
        Self(Rc::new(RefCell::new(State {
            durable: image.clone(),
            live: image,
            sector,
            ..State::default()
        })))
    }

    /// Its size.
    pub fn blocks(&self) -> u64 {
        (self.0.borrow().live.bytes() / BLOCK) as u64
    }

    /// Its bytes as a read finds them.
    pub fn image(&self) -> Image {
        self.0.borrow().live.clone()
    }

    /// Makes it larger; a crash may undo that until the next flush.
    pub fn grow(&self, blocks: u64) {
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        state.live.grow(blocks);
        state.durable.grow(blocks);
        let (begun, ended) = (state.tick(), state.tick());
        if let Some(tape) = &mut state.tape {
            tape.operations.push(Operation {
                action: Action::Grow(blocks),
                begun,
                ended: Some(ended),
            });
        }
    }

    /// From now on the file system below has so many blocks free; what was written before has its place.
    pub fn set_room(&self, free: usize) {
        let mut state = self.0.borrow_mut();
        let blocks = state.live.bytes() / BLOCK;
        let mut block = vec![0; BLOCK];
        let mut is_written = |number: &usize| {
            state.live.read(number * BLOCK, &mut block);
            block.iter().any(|byte| *byte != 0)
        };
        let backed = (0..blocks).filter(&mut is_written).collect();
        state.room = Some(Room {
            backed,
            free,
            ballast: 0,
        });
    }

    /// Somebody else takes all that the file system has free; how many blocks.
    pub fn take_all_room(&self) -> usize {
        let mut state = self.0.borrow_mut();
        let room = state.room.as_mut().expect("a file system below");
        std::mem::take(&mut room.free)
    }

    /// Somebody else gives so many blocks back.
    pub fn give_room(&self, blocks: usize) {
        let mut state = self.0.borrow_mut();
        state.room.as_mut().expect("a file system below").free += blocks;
    }

    /// Calls so far.
    pub fn operations(&self) -> u64 {
        self.0.borrow().calls
    }

    /// Flushes so far.
    pub fn flushes(&self) -> u64 {
        self.0.borrow().flushes
    }

    /// Calls that failed or were cut short so far.
    pub fn faults(&self) -> u64 {
        self.0.borrow().faults
    }

    /// A new moment on the clock that also numbers what the tape holds.
    pub fn tick(&self) -> Tick {
        self.0.borrow_mut().tick()
    }

    /// Everything is durable, and what comes is recorded.
    pub fn record(&self) {
        let mut state = self.0.borrow_mut();
        state.settle();
        state.tape = Some(Tape {
            base: state.live.clone(),
            operations: Vec::new(),
        });
    }

    /// Ends the recording.
    pub fn take_tape(&self) -> Tape {
        let mut state = self.0.borrow_mut();
        state.tape.take().expect("a recording is under way")
    }

    /// Every operation after so many more fails, as if the power were gone.
    pub fn fail_after(&self, operations: u64) {
        let call = self.operations() + operations;
        self.fail(Fault {
            call,
            kind: FaultKind::Io,
            is_sticky: true,
        });
    }

    /// Calls fail as said.
    pub fn fail(&self, fault: Fault) {
        self.0.borrow_mut().fault = Some(fault);
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.0.borrow_mut().fault = None;
    }

    /// The power comes back: what is there is what the loss left.
    pub fn restart(&self, loss: Loss, rng: &mut Rng) {
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        state.fault = None;
        let dirty = std::mem::take(&mut state.dirty).into_keys();
        let dropped = std::mem::take(&mut state.dropped);
        for (sector, may_stay) in dirty
            .map(|sector| (sector, true))
            .chain(dropped.into_iter().map(|sector| (sector, false)))
        {
            let stays = match loss {
                Loss::All => false,
                Loss::None => true,
                Loss::Some => may_stay && rng.bool(),
            };
            let at = sector * state.sector;
            if stays {
                state.durable.copy_from(&state.live, at, state.sector);
            } else {
                state.live.copy_from(&state.durable, at, state.sector);
            }
        }
    }

    /// The bytes as they are, for a test that damages them.
    pub fn with_bytes<T>(&self, change: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut state = self.0.borrow_mut();
        let mut bytes = state.live.to_vec();
        let value = change(&mut bytes);
        state.live = Image::from(bytes.as_slice());
        state.settle();
        value
    }

    /// Begins a call: how it is to fail, if it is.
    fn begin(&self) -> Option<FaultKind> {
        let mut state = self.0.borrow_mut();
        let call = state.calls;
        state.calls += 1;
        let fault = state.fault?;
        let is_hit = call == fault.call || fault.is_sticky && call > fault.call;
        state.faults += u64::from(is_hit);
        is_hit.then_some(fault.kind)
    }

    /// Puts an operation on the tape; its place there.
    fn submit(&self, action: impl FnOnce() -> Action) -> Option<usize> {
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        let begun = state.tick();
        let tape = state.tape.as_mut()?;
        tape.operations.push(Operation {
            action: action(),
            begun,
            ended: None,
        });
        Some(tape.operations.len() - 1)
    }

    /// Gives these bytes their room in the file system below.
    fn back(&self, at: usize, bytes: usize) -> io::Result<()> {
        let room = &mut self.0.borrow_mut().room;
        if room.as_mut().is_none_or(|room| room.back(at, bytes)) {
            Ok(())
        } else {
            Err(error(ENOSPC))
        }
    }

    fn complete(&self, place: Option<usize>) {
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        let ended = state.tick();
        if let (Some(place), Some(tape)) = (place, state.tape.as_mut()) {
            tape.operations[place].ended = Some(ended);
        }
    }
}

impl State {
    fn tick(&mut self) -> Tick {
        self.clock += 1;
        self.clock
    }

    fn settle(&mut self) {
        self.dirty.clear();
        self.dropped.clear();
        self.durable = self.live.clone();
    }

    /// Ends a flush that began at `begun`, when the bytes were `snapshot`: what was written since may be left out.
    fn flush(&mut self, begun: Tick, snapshot: &Image) {
        self.flushes += 1;
        if begun < self.flushed {
            // One that began later covered all of it.
            return;
        }
        self.flushed = begun;
        let (durable, sector_bytes) = (&mut self.durable, self.sector);
        self.dirty.retain(|sector, (first, last)| {
            if *first < begun {
                durable.copy_from(snapshot, sector * sector_bytes, sector_bytes);
                *first = begun;
            }
            *last >= begun
        });
    }

    /// A flush failed: a device that is still there has dropped what the flush was to cover.
    fn drop_dirty(&mut self) {
        let dirty = std::mem::take(&mut self.dirty);
        self.dropped.extend(dirty.into_keys());
    }

    fn soil(&mut self, at: usize, bytes: usize) {
        let sectors = at / self.sector..(at + bytes).div_ceil(self.sector);
        let now = self.tick();
        for sector in sectors {
            self.dropped.remove(&sector);
            self.dirty.entry(sector).or_insert((now, now)).1 = now;
        }
    }
}

/// Gives other tasks a turn, as a real device's latency does.
async fn yield_now() {
    futures_lite::future::yield_now().await;
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// How many bytes of a transfer a fault lets through, or its error.
fn judge(fault: Option<FaultKind>, bytes: usize) -> io::Result<usize> {
    match fault {
        None => Ok(bytes),
        Some(FaultKind::Short) => Ok(bytes.min(512)),
        Some(FaultKind::Io) => Err(error(EIO)),
        Some(FaultKind::NoSpace) => Err(error(ENOSPC)),
        Some(FaultKind::Interrupted) => Err(error(EINTR)),
    }
}

/// Error numbers of `asm-generic/errno-base.h`.
const EINTR: i32 = 4;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl SystemCalls for SimDevice {
    fn path(&self) -> &Path {
        Path::new("simulated")
    }

    async fn read_once(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        yield_now().await;
        // A read never lacks room.
        let fault = self.begin().filter(|kind| *kind != FaultKind::NoSpace);
        let count = judge(fault, buffer.len())?;
        let at = usize::try_from(offset).unwrap();
        self.0.borrow().live.read(at, &mut buffer[..count]);
        Ok(count)
    }

    async fn write_once(&self, offset: u64, buffer: &[u8]) -> io::Result<usize> {
        let fault = self.begin();
        let count = judge(fault, buffer.len());
        let data = &buffer[..*count.as_ref().unwrap_or(&0)];
        let at = usize::try_from(offset).unwrap();
        self.back(at, data.len())?;
        let place = self.submit(|| Action::Write(at, data.into()));
        yield_now().await;
        let mut state = self.0.borrow_mut();
        state.live.write(at, data);
        state.soil(at, data.len());
        drop(state);
        self.complete(place);
        count
    }

    async fn sync_once(&self) -> io::Result<()> {
        let fault = self.begin().filter(|kind| *kind != FaultKind::Short);
        if let Err(error) = judge(fault, 0) {
            let mut state = self.0.borrow_mut();
            if fault != Some(FaultKind::Interrupted) && state.fault.is_some_and(|f| !f.is_sticky) {
                state.drop_dirty();
            }
            return Err(error);
        }
        let place = self.submit(|| Action::Flush);
        let begun = self.tick();
        let snapshot = self.image();
        yield_now().await;
        self.0.borrow_mut().flush(begun, &snapshot);
        self.complete(place);
        Ok(())
    }

    async fn punch_once(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let fault = self.begin().filter(|kind| *kind != FaultKind::Short);
        judge(fault, 0)?;
        let at = usize::try_from(offset).unwrap();
        let bytes = usize::try_from(bytes).unwrap();
        let place = self.submit(|| Action::Discard(at, bytes));
        yield_now().await;
        let mut state = self.0.borrow_mut();
        // What a discarded block reads as is unspecified: something nobody wrote.
        for start in (at..at + bytes).step_by(BLOCK) {
            state.live.write(start, &[0xde; BLOCK]);
        }
        state.soil(at, bytes);
        if let Some(room) = &mut state.room {
            room.punch(at, bytes);
        }
        drop(state);
        self.complete(place);
        Ok(())
    }

    fn allocate_once(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.back(
            usize::try_from(offset).unwrap(),
            usize::try_from(bytes).unwrap(),
        )
    }

    fn hold_once(&self, bytes: u64) -> io::Result<bool> {
        let mut state = self.0.borrow_mut();
        let Some(room) = &mut state.room else {
            return Ok(false);
        };
        let blocks = usize::try_from(bytes).unwrap() / BLOCK;
        let more = blocks.saturating_sub(room.ballast);
        if more > room.free {
            return Err(error(ENOSPC));
        }
        room.free -= more;
        room.ballast += more;
        Ok(true)
    }

    fn release_once(&self) -> io::Result<()> {
        if let Some(room) = &mut self.0.borrow_mut().room {
            room.free += std::mem::take(&mut room.ballast);
        }
        Ok(())
    }
}
