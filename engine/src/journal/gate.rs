//! Who uses blocks that a lookup gave out.
//!
//! A request takes a ticket in the same moment in which it looks up, and keeps it while it reads or writes in place.
//! Closing an epoch waits for the tickets of the time before: after that no request still uses a block that was
//! shared, released or forked before. New requests go on meanwhile; they see the new state and count in the next epoch.

use crate::sync::{AsyncMutex, AsyncMutexGuard, Epochs};

/// The gate that requests pass. Two epochs exist at a time: the open one, and one being waited for.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    epochs: Epochs,
    closing: AsyncMutex<()>,
}

/// The right to use what was looked up; gone when dropped.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    gate: &'a Gate,
    epoch: usize,
}

/// An epoch about to be closed: nobody else closes one.
#[derive(Debug)]
pub(crate) struct Closing<'a> {
    gate: &'a Gate,
    _alone: AsyncMutexGuard<'a, ()>,
}

impl Gate {
    /// Enters the open epoch. Called under the lock under which [`Closing::flip`] is called.
    pub(crate) fn enter(&self) -> Ticket<'_> {
        Ticket {
            gate: self,
            epoch: self.epochs.enter(),
        }
    }

    /// Waits until nobody else closes an epoch.
    pub(crate) async fn closing(&self) -> Closing<'_> {
        Closing {
            gate: self,
            _alone: self.closing.lock().await,
        }
    }
}

impl Closing<'_> {
    /// Opens the next epoch. Called under the lock that excludes lookups.
    pub(crate) fn flip(&self) {
        self.gate.epochs.flip();
    }

    /// Waits until everybody has left the epoch before the flip.
    pub(crate) async fn drained(self) {
        self.gate.epochs.drained().await;
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.gate.epochs.leave(self.epoch);
    }
}
