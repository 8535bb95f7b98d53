//! Whether a thread sleeps, so that others wake it only then.
//!
//! The thread says that it sleeps and then looks for work once more; whoever brings work brings it and then looks
//! whether the thread sleeps. So one of the two sees the other. Every step is a read-modify-write of one word: they
//! have one order, whatever the work's own queue does, and each sees what came before the step it follows.

use super::atomic::{AtomicBool, Ordering};

/// A thread that may be asleep.
#[derive(Debug, Default)]
pub(crate) struct Sleeper(AtomicBool);

impl Sleeper {
    /// The thread is about to sleep; it looks for work once more after this.
    pub(crate) fn lie_down(&self) {
        self.0.swap(true, Ordering::AcqRel);
    }

    /// The thread is awake, and looks for work before it sleeps again.
    pub(crate) fn get_up(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }

    /// Whether the caller, who has brought work, must wake the thread; nobody else must then.
    pub(crate) fn must_be_woken(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}
