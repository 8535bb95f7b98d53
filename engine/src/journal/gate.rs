//! Who uses blocks that a lookup gave out.
//!
//! A request takes a ticket in the same moment in which it looks up, and keeps it while it reads or writes in place.
//! Closing an epoch waits for the tickets of the time before: after that no request still uses a block that was
//! shared, released or forked before. New requests go on meanwhile; they see the new state and count in the next epoch.

use async_lock::{Mutex, MutexGuard};
use event_listener::{Event, listener};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The gate that requests pass. Two epochs exist at a time: the open one, and one being waited for.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    epoch: AtomicU64,
    inside: [AtomicUsize; 2],
    drained: Event,
    closing: Mutex<()>,
}

/// The right to use what was looked up; gone when dropped.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    gate: &'a Gate,
    parity: usize,
}

/// An epoch about to be closed: nobody else closes one.
#[derive(Debug)]
pub(crate) struct Closing<'a> {
    gate: &'a Gate,
    _alone: MutexGuard<'a, ()>,
}

impl Gate {
    fn parity(&self) -> usize {
        usize::from(self.epoch.load(Ordering::SeqCst) % 2 == 1)
    }

    /// Enters the open epoch. Called under the lock under which [`Closing::flip`] is called.
    pub(crate) fn enter(&self) -> Ticket<'_> {
        let parity = self.parity();
        self.inside[parity].fetch_add(1, Ordering::SeqCst);
        Ticket { gate: self, parity }
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
        self.gate.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until everybody has left the epoch before the flip.
    pub(crate) async fn drained(self) {
        let old = 1 - self.gate.parity();
        loop {
            listener!(self.gate.drained => left);
            if self.gate.inside[old].load(Ordering::SeqCst) == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if self.gate.inside[self.parity].fetch_sub(1, Ordering::SeqCst) == 1
            && self.parity != self.gate.parity()
        {
            self.gate.drained.notify(usize::MAX);
        }
    }
}
