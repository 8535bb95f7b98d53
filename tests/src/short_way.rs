//! Reads and writes as the queue of a ublk device makes them: by the short way where there is one.

use blockfork::device::Device;
use blockfork::error::Result;
use blockfork::pool::{Attached, Transfer};

/// Every second block, so that both ways have their turn.
fn is_tried(offset: u64) -> bool {
    (offset / 4096).is_multiple_of(2)
}

/// Writes `buffer` at byte `offset`.
pub async fn write<D: Device>(
    attached: &Attached,
    device: &D,
    offset: u64,
    buffer: &[u8],
) -> Result<()> {
    if is_tried(offset)
        && let Some(direct) = attached.direct(Transfer::Write, offset, buffer.len())
    {
        if device.write(direct.offset(), buffer).await.is_err() {
            direct.give_up();
        } else if direct.done() {
            return Ok(());
        }
    }
    attached.write(device, offset, buffer).await
}

/// Fills `buffer` from byte `offset`.
pub async fn read<D: Device>(
    attached: &Attached,
    device: &D,
    offset: u64,
    buffer: &mut [u8],
) -> Result<()> {
    if is_tried(offset)
        && let Some(direct) = attached.direct(Transfer::Read, offset, buffer.len())
    {
        if device.read(direct.offset(), buffer).await.is_err() {
            direct.give_up();
        } else if direct.done() {
            return Ok(());
        }
    }
    attached.read(device, offset, buffer).await
}
