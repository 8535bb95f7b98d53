//! Flushing: everything acknowledged before is durable, on every queue, data and mapping.

use crate::checkpoint::{Checkpoints, Ending};
use crate::device::Device;
use crate::error::Result;
use crate::journal::{Committed, Ledger};

/// Makes everything acknowledged so far durable: by a commit, or by a checkpoint where the journal is full.
pub(crate) async fn flush<D: Device>(
    ledger: &Ledger,
    checkpoints: &Checkpoints,
    device: &D,
) -> Result<()> {
    match ledger.commit(device).await? {
        Committed::Done => Ok(()),
        Committed::JournalFull => {
            checkpoints
                .write(ledger, device, Ending::GoOn, |_| {})
                .await
        }
    }
}
