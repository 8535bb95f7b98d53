//! A fact that, once true, stays true.

use super::atomic::{AtomicBool, Ordering};

/// Set once, never cleared. Who sees it set sees what was done before.
#[derive(Debug, Default)]
pub(crate) struct Latch(AtomicBool);

impl Latch {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
