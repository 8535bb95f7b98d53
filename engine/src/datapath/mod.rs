//! What a request does: read, write, discard, write zeroes, flush; one file each, each one straight `async fn`.
//!
//! No lock is held across I/O. A request that uses blocks which a lookup gave it holds a ticket of the gate meanwhile.

mod allocation;
mod counters;
mod direct;
mod discard;
mod flush;
mod range_lock;
mod read;
mod reserved;
mod write;

pub use allocation::Run;
pub(crate) use counters::{Counters, RequestCounters};
pub(crate) use direct::Direct;
pub(crate) use flush::flush;
pub(crate) use range_lock::{RangeGuard, RangeLocks};
pub(crate) use reserved::Reserved;

use crate::checkpoint::Checkpoints;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::{Draft, Ledger};
use crate::space::Fault;
use crate::units::{BLOCK_LEN, VolumeId};

/// A request's surroundings: the volume, and the device as the calling thread reaches it.
#[derive(Debug)]
pub(crate) struct Io<'a, D> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) checkpoints: &'a Checkpoints,
    pub(crate) device: &'a D,
    pub(crate) volume: VolumeId,
    pub(crate) redirects_always: bool,
    pub(crate) counters: &'a Counters,
}

impl<D: Device> Io<'_, D> {
    /// Changes the metadata. Where space has run out but released blocks wait for a checkpoint, writes one and tries
    /// again.
    async fn change<T>(
        &self,
        mut change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<T> {
        loop {
            let before = self.checkpoints.progress().0;
            match self.ledger.change(self.device, 0, &mut change).await {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => flush(self.ledger, self.checkpoints, self.device).await?,
                Err(error) if error.kind() == ErrorKind::OutOfSpace => {
                    // What is pending comes first. A reader of an earlier checkpoint gives way after that.
                    let may_gain = self.ledger.adjust(|metadata| {
                        metadata.space.pending_blocks() > 0 || metadata.space.stop_keeping()
                    });
                    if !may_gain {
                        return Err(error);
                    }
                    self.checkpoints
                        .write_after(before, self.ledger, self.device)
                        .await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn name_volume(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Corrupt {
            return error;
        }
        let path = self
            .ledger
            .look(|metadata| metadata.catalog.path(self.volume));
        match path {
            Some(path) => Error::corrupt(format!("{path}: {error}")),
            None => error,
        }
    }
}

/// The bytes of so many blocks.
fn len(blocks: u64) -> usize {
    usize::try_from(blocks)
        .unwrap_or(usize::MAX)
        .saturating_mul(BLOCK_LEN)
}
