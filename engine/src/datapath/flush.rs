//! Flushing: everything acknowledged before is durable, on every queue, data and mapping.

use crate::checkpoint::Checkpoints;
use crate::device::Device;
use crate::error::Result;
use crate::journal::{Committed, Ledger};

/// Makes everything acknowledged so far durable: by a commit, or by a checkpoint where the journal is full.
pub(crate) async fn flush<D: Device>(
    ledger: &Ledger,
    checkpoints: &Checkpoints,
    device: &D,
) -> Result<()> {
    loop {
        let seen = checkpoints.progress().0;
        match ledger.commit(device).await? {
            Committed::Done => return Ok(()),
            // A checkpoint that began before this request does not cover it: so the commit is tried again.
            Committed::JournalFull => checkpoints.write_after(seen, ledger, device).await?,
        }
    }
}
