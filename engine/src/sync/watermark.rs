//! How far something has come.

use super::atomic::{AtomicU64, Ordering};

/// A number that only rises. Who sees it sees what was done before it was raised.
#[derive(Debug)]
pub(crate) struct Watermark(AtomicU64);

impl Watermark {
    pub(crate) fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }

    /// Raises it to `value`, unless it is higher.
    pub(crate) fn raise(&self, value: u64) {
        self.0.fetch_max(value, Ordering::AcqRel);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}
