//! Numbers of those who ask for work that covers all who asked before it began.

use super::atomic::{AtomicU64, Ordering};

/// Counts requests: who does the work serves all that [`Tickets::taken`] shows it.
#[derive(Debug, Default)]
pub(crate) struct Tickets(AtomicU64);

impl Tickets {
    /// A request's number, from 1. What its maker did before is seen by whoever finds it taken.
    pub(crate) fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The last number taken.
    pub(crate) fn taken(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}
