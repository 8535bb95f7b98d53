//! A sparse device in memory, whose every step is a point where another thread may go on.

use blockfork::device::Device;
use blockfork::error::Result;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

const BLOCK: usize = 4096;

type Blocks = BTreeMap<u64, Arc<[u8]>>;

/// What the device holds; clones share the blocks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    live: Blocks,
    durable: Blocks,
}

#[derive(Debug)]
struct Inner {
    image: Mutex<Image>,
    turn: AtomicU64,
}

/// The device; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Inner>);

impl Memory {
    pub(crate) fn new(image: Image) -> Self {
        Self(Arc::new(Inner {
            image: Mutex::new(image),
            turn: AtomicU64::new(0),
        }))
    }

    pub(crate) fn image(&self) -> Image {
        self.with(|image| image.clone())
    }

    /// What a power cut now would leave, with nothing lucky in it.
    pub(crate) fn after_power_cut(&self) -> Self {
        let durable = self.with(|image| image.durable.clone());
        Self::new(Image {
            live: durable.clone(),
            durable,
        })
    }

    /// No schedule point: one step of the device.
    fn with<T>(&self, step: impl FnOnce(&mut Image) -> T) -> T {
        let mut image = self.0.image.lock().unwrap_or_else(PoisonError::into_inner);
        step(&mut image)
    }

    /// Others may go on here.
    fn pause(&self) {
        self.0.turn.fetch_add(1, Ordering::SeqCst);
    }
}

impl Device for Memory {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        for (number, place) in (offset / BLOCK as u64..).zip(buffer.chunks_mut(BLOCK)) {
            self.pause();
            self.with(|image| match image.live.get(&number) {
                Some(block) => place.copy_from_slice(&block[..place.len()]),
                None => place.fill(0),
            });
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        assert!(offset.is_multiple_of(BLOCK as u64) && buffer.len().is_multiple_of(BLOCK));
        for (number, block) in (offset / BLOCK as u64..).zip(buffer.chunks_exact(BLOCK)) {
            self.pause();
            self.with(|image| image.live.insert(number, block.into()));
        }
        self.pause();
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.pause();
        self.with(|image| image.durable = image.live.clone());
        self.pause();
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        let first = offset / BLOCK as u64;
        for number in first..first + bytes / BLOCK as u64 {
            self.pause();
            // What a discarded block reads as is unspecified: something nobody wrote.
            self.with(|image| image.live.insert(number, vec![0xde; BLOCK].into()));
        }
        Ok(())
    }
}
