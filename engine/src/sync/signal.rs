//! "There is something to do": many raise it, one takes it.

use super::Event;
use super::atomic::{AtomicBool, Ordering};

/// A signal that is raised or not; raising it twice is raising it once.
#[derive(Debug)]
pub(crate) struct Signal {
    is_raised: AtomicBool,
    raised: Event,
}

impl Signal {
    pub(crate) fn new(is_raised: bool) -> Self {
        Self {
            is_raised: AtomicBool::new(is_raised),
            raised: Event::default(),
        }
    }

    /// Whoever takes it sees what was done before.
    pub(crate) fn raise(&self) {
        // A swap, not a store: two who raise it one after the other are both seen by the one who takes it.
        self.is_raised.swap(true, Ordering::AcqRel);
        self.raised.notify_all();
    }

    /// Waits until it is raised, and lowers it.
    pub(crate) async fn take(&self) {
        self.raised
            .wait_for(|| self.is_raised.swap(false, Ordering::AcqRel).then_some(()))
            .await;
    }
}
