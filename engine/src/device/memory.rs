//! A device in memory for unit tests. It notes its calls, can refuse one of them, and forgets at a power cut what no
//! flush covered.

use super::{BlockBuf, Device};
use crate::clock::ManualClock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK_LEN, Pba};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

type Block = [u8; BLOCK_LEN];

/// What the device was asked for: the first block, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    Read(u64, u64),
    Write(u64, u64),
    Flush,
    Discard(u64, u64),
    Pause(Duration),
}

/// The device. A block that was never written reads as zeros.
#[derive(Default)]
pub(crate) struct Memory {
    blocks: RefCell<BTreeMap<u64, Box<Block>>>,
    /// What stood in each block that was written since the last flush, oldest last.
    before: RefCell<Vec<(u64, Option<Box<Block>>)>>,
    calls: RefCell<Vec<Call>>,
    refused: Cell<Option<Call>>,
    /// Nanoseconds that a flush takes, by this clock.
    slow: RefCell<Option<(u64, Arc<ManualClock>)>>,
}

/// Drives a future that waits for this device only, which never makes it wait.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for something else than the device"),
    }
}

fn place(offset: u64, bytes: usize) -> (u64, u64) {
    let length = BLOCK_LEN as u64;
    assert!(offset.is_multiple_of(length) && bytes.is_multiple_of(BLOCK_LEN));
    (offset / length, bytes as u64 / length)
}

impl Memory {
    /// What was called since the last time.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        self.calls.take()
    }

    /// Refuses this call from now on.
    pub(crate) fn refuse(&self, call: Option<Call>) {
        self.refused.set(call);
    }

    /// Lets every flush take so many nanoseconds of a clock.
    pub(crate) fn make_flushes_take(&self, ns: u64, clock: Arc<ManualClock>) {
        self.slow.replace(Some((ns, clock)));
    }

    /// Takes away what no flush covered.
    pub(crate) fn cut_power(&self) {
        let mut blocks = self.blocks.borrow_mut();
        for (pba, before) in self.before.take().into_iter().rev() {
            match before {
                Some(before) => blocks.insert(pba, before),
                None => blocks.remove(&pba),
            };
        }
    }

    /// A block as it stands there.
    pub(crate) fn block(&self, pba: Pba) -> Block {
        let blocks = self.blocks.borrow();
        blocks.get(&pba.0).map_or([0; BLOCK_LEN], |block| **block)
    }

    /// Puts a block there, durably and past all that is noted.
    pub(crate) fn set_block(&self, pba: Pba, block: &[u8]) {
        let mut copy = Box::new([0; BLOCK_LEN]);
        copy.copy_from_slice(block);
        self.blocks.borrow_mut().insert(pba.0, copy);
    }

    /// Flips one bit.
    pub(crate) fn flip(&self, pba: Pba, bit: usize) {
        let mut block = self.block(pba);
        block[bit / 8] ^= 1 << (bit % 8);
        self.set_block(pba, &block);
    }

    fn note(&self, call: Call) -> Result<()> {
        self.calls.borrow_mut().push(call);
        if self.refused.get() == Some(call) {
            return Err(Error::new(ErrorKind::Io));
        }
        Ok(())
    }
}

impl Device for Memory {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (first, count) = place(offset, buffer.len());
        self.note(Call::Read(first, count))?;
        for (pba, to) in (first..).zip(buffer.chunks_exact_mut(BLOCK_LEN)) {
            to.copy_from_slice(&self.block(Pba(pba)));
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        let (first, count) = place(offset, buffer.len());
        self.note(Call::Write(first, count))?;
        for (pba, from) in (first..).zip(buffer.chunks_exact(BLOCK_LEN)) {
            let before = self.blocks.borrow_mut().remove(&pba);
            self.before.borrow_mut().push((pba, before));
            self.set_block(Pba(pba), from);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.note(Call::Flush)?;
        if let Some((ns, clock)) = &*self.slow.borrow() {
            clock.advance_ns(*ns);
        }
        self.before.borrow_mut().clear();
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let (first, count) = place(offset, bytes);
        self.note(Call::Discard(first, count))
    }

    async fn pause(&self, duration: Duration) {
        let noted = self.note(Call::Pause(duration));
        assert!(noted.is_ok(), "a pause cannot be refused");
    }
}

#[test]
fn a_power_cut_takes_what_no_flush_covered() {
    let device = Memory::default();
    let write = |pba: u64, byte| {
        let mut buffer = BlockBuf::zeroed(1);
        buffer.fill(byte);
        now(device.write(pba * 4096, &buffer)).unwrap();
    };
    write(1, 1);
    now(device.flush()).unwrap();
    write(1, 2);
    write(1, 3);
    write(2, 4);
    device.cut_power();
    assert_eq!(device.block(Pba(1)), [1; BLOCK_LEN]);
    assert_eq!(device.block(Pba(2)), [0; BLOCK_LEN]);
}
