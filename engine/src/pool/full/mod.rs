//! A request that finds no space: it fails, or it waits for space where its volume was attached so.
//!
//! Who waits looks again, ten times a second, rather than being woken: space comes in many ways (a discard, a removed
//! volume, a checkpoint, a larger pool, another quota), and looking costs nothing where nobody waits. A wait ends by the
//! clock, by so many looks where a pause takes no time, and at once when whoever it is for goes away.

#[cfg(test)]
mod tests;

use super::Attached;
use super::report::OnFull;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use std::time::Duration;

/// The time between two looks.
pub(crate) const LOOK_NS: u64 = 100_000_000;
const LOOKS_PER_SECOND: u64 = 1_000_000_000 / LOOK_NS;

/// How much longer a request waits that found no space.
#[derive(Debug)]
pub(crate) struct Patience {
    until_ns: u64,
    looks: u64,
}

impl Patience {
    /// It waits no longer.
    pub(crate) fn end(self) -> Self {
        Self { looks: 0, ..self }
    }
}

impl Attached {
    /// What a write does from now on that finds no space.
    pub fn set_on_full(&self, on_full: OnFull) {
        let seconds = match on_full {
            OnFull::Error => 0,
            OnFull::Queue { seconds } => u64::from(seconds),
        };
        self.volume.queue_seconds.set(seconds);
    }

    /// Nobody waits for space any more, from now on: whoever it is for is about to go.
    pub fn stop_waiting(&self) {
        self.volume.is_going.set();
    }

    /// Whether a request that failed with `error` is one that waits.
    pub(super) fn may_wait(&self, error: &Error) -> bool {
        let is_full = matches!(error.kind(), ErrorKind::OutOfSpace | ErrorKind::OverQuota);
        is_full && self.volume.queue_seconds.get() > 0 && !self.volume.is_going.is_set()
    }

    /// Whether a request that failed with `error` shall be tried again after [`LOOK_NS`].
    pub(crate) fn waits(&self, error: &Error, patience: &mut Option<Patience>) -> bool {
        if !self.may_wait(error) {
            return false;
        }
        let seconds = self.volume.queue_seconds.get();
        let now = self.pool.ledger.clock.monotonic_ns();
        let patience = patience.get_or_insert_with(|| {
            // What was released comes back with the next checkpoint.
            self.pool.maintenance.want();
            Patience {
                until_ns: now.saturating_add(seconds * 1_000_000_000),
                looks: seconds * LOOKS_PER_SECOND,
            }
        });
        let Some(left) = patience.looks.checked_sub(1) else {
            return false;
        };
        patience.looks = left;
        now < patience.until_ns
    }

    /// Carries a request out, again and again as long as it finds no space and may wait.
    pub(super) async fn patiently<D: Device>(
        &self,
        device: &D,
        mut request: impl AsyncFnMut() -> Result<()>,
    ) -> Result<()> {
        let mut patience = None;
        loop {
            match request().await {
                Err(error) if self.waits(&error, &mut patience) => {
                    device.pause(Duration::from_nanos(LOOK_NS)).await;
                }
                done => return done,
            }
        }
    }
}
