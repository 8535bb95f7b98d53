//! How many are inside each of two epochs, and waiting until all have left the old one.

use super::Event;
use super::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Set in a count while somebody waits for it to become zero. It stands in the same word, so the last to leave learns
/// of it by leaving: two words would need an order between them.
const AWAITED: usize = 1 << (usize::BITS - 1);

/// Two epochs: the open one, and the one before it.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    epoch: AtomicU64,
    inside: [AtomicUsize; 2],
    drained: Event,
}

impl Epochs {
    /// Ordered by the lock under which [`Epochs::enter`] and [`Epochs::flip`] are called.
    fn parity(&self) -> usize {
        usize::from(self.epoch.load(Ordering::Relaxed) % 2 == 1)
    }

    /// Enters the open epoch; which of the two that is. Called under a lock that excludes [`Epochs::flip`].
    pub(crate) fn enter(&self) -> usize {
        let parity = self.parity();
        self.inside[parity].fetch_add(1, Ordering::Relaxed);
        parity
    }

    /// Leaves the epoch that was entered. What was done inside happened before [`Epochs::drained`] ends.
    pub(crate) fn leave(&self, parity: usize) {
        if self.inside[parity].fetch_sub(1, Ordering::AcqRel) == AWAITED | 1 {
            self.drained.notify_all();
        }
    }

    /// Opens the next epoch. Called under a lock that excludes [`Epochs::enter`], and only when the epoch before has
    /// drained.
    pub(crate) fn flip(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until everybody has left the epoch before the last flip. One waits at a time.
    pub(crate) async fn drained(&self) {
        let old = &self.inside[1 - self.parity()];
        self.drained
            .wait_for(|| (old.fetch_or(AWAITED, Ordering::AcqRel) & !AWAITED == 0).then_some(()))
            .await;
        old.store(0, Ordering::Relaxed);
    }
}
