//! A device in memory with a volatile cache that a power cut takes, in whole, in part, or torn.

use blockfork::device::Device;
use blockfork::error::{Error, ErrorKind, Result};
use fastrand::Rng;
use std::cell::RefCell;
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

#[derive(Debug, Default)]
struct State {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// What it writes whole or not at all, in bytes: its physical sector.
    sector: usize,
    /// Sectors written since the last flush.
    dirty: std::collections::BTreeSet<usize>,
    operations: u64,
    fails_after: Option<u64>,
    flushes: u64,
}

/// The simulated device; clones share it.
#[derive(Clone, Debug, Default)]
pub struct SimDevice(Rc<RefCell<State>>);

impl SimDevice {
    /// A device of `blocks` blocks of zeros, which tears writes at 4096 bytes.
    pub fn new(blocks: u64) -> Self {
        Self::with_sector(blocks, 4096)
    }

    /// A device of `blocks` blocks of zeros, which tears writes at `sector` bytes.
    pub fn with_sector(blocks: u64, sector: usize) -> Self {
        let bytes = usize::try_from(blocks).unwrap() * 4096;
        Self(Rc::new(RefCell::new(State {
            live: vec![0; bytes],
            durable: vec![0; bytes],
            sector,
            ..State::default()
        })))
    }

    /// Its size.
    pub fn blocks(&self) -> u64 {
        self.0.borrow().live.len() as u64 / 4096
    }

    /// Makes it larger.
    pub fn grow(&self, blocks: u64) {
        let mut state = self.0.borrow_mut();
        let bytes = usize::try_from(blocks).unwrap() * 4096;
        state.live.resize(bytes, 0);
        state.durable.resize(bytes, 0);
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.0.borrow().operations
    }

    /// Flushes so far.
    pub fn flushes(&self) -> u64 {
        self.0.borrow().flushes
    }

    /// Every operation after so many more fails, as if the power were gone.
    pub fn fail_after(&self, operations: u64) {
        let mut state = self.0.borrow_mut();
        state.fails_after = Some(state.operations + operations);
    }

    /// The power comes back: what is there is what the loss left.
    pub fn restart(&self, loss: Loss, rng: &mut Rng) {
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        state.fails_after = None;
        for sector in std::mem::take(&mut state.dirty) {
            let range = sector * state.sector..(sector + 1) * state.sector;
            let stays = match loss {
                Loss::All => false,
                Loss::None => true,
                Loss::Some => rng.bool(),
            };
            if stays {
                state.durable[range.clone()].copy_from_slice(&state.live[range]);
            } else {
                state.live[range.clone()].copy_from_slice(&state.durable[range]);
            }
        }
    }

    /// The bytes as they are, for a test that damages them.
    pub fn with_bytes<T>(&self, change: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut state = self.0.borrow_mut();
        let value = change(&mut state.live);
        state.durable = state.live.clone();
        value
    }

    fn begin(&self) -> Result<()> {
        let mut state = self.0.borrow_mut();
        if state
            .fails_after
            .is_some_and(|limit| state.operations >= limit)
        {
            return Err(Error::with(ErrorKind::Io, "the simulated power is gone"));
        }
        state.operations += 1;
        Ok(())
    }
}

/// Gives other tasks a turn, as a real device's latency does.
async fn yield_now() {
    futures_lite::future::yield_now().await;
}

impl Device for SimDevice {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        yield_now().await;
        self.begin()?;
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0.borrow().live[at..at + buffer.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        yield_now().await;
        self.begin()?;
        let mut state = self.0.borrow_mut();
        let at = usize::try_from(offset).unwrap();
        state.live[at..at + buffer.len()].copy_from_slice(buffer);
        let sectors = at / state.sector..(at + buffer.len()).div_ceil(state.sector);
        state.dirty.extend(sectors);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        yield_now().await;
        self.begin()?;
        let mut guard = self.0.borrow_mut();
        let state = &mut *guard;
        state.flushes += 1;
        for sector in std::mem::take(&mut state.dirty) {
            let range = sector * state.sector..(sector + 1) * state.sector;
            state.durable[range.clone()].copy_from_slice(&state.live[range]);
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        yield_now().await;
        self.begin()?;
        let mut state = self.0.borrow_mut();
        let at = usize::try_from(offset).unwrap();
        let end = at + usize::try_from(bytes).unwrap();
        // What a discarded block reads as is unspecified: something nobody wrote.
        state.live[at..end].fill(0xde);
        let sectors = at / state.sector..end.div_ceil(state.sector);
        state.dirty.extend(sectors);
        Ok(())
    }
}
