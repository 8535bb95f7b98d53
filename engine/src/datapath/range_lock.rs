//! Ordering of overlapping requests on a volume whose sectors are smaller than a block: a partial write reads the
//! block, merges and writes it, and nobody else may write the block meanwhile.

use crate::sync::{Event, Mutex};
use std::ops::Range;

/// The byte ranges being changed.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    held: Mutex<Vec<Range<u64>>>,
    released: Event,
}

/// A range held; free again when dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits until no overlapping range is held, and holds this one.
    pub(crate) async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.released
            .wait_for(|| {
                let mut held = self.held.lock();
                let is_free = !held
                    .iter()
                    .any(|other| other.start < range.end && range.start < other.end);
                is_free.then(|| held.push(range.clone()))
            })
            .await;
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        if let Some(index) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(index);
        }
        drop(held);
        self.locks.released.notify_all();
    }
}
