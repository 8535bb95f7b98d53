//! Reading and writing the two superblock copies.

use crate::device::{BlockBuf, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::SUPERBLOCKS;
use crate::format::superblock::Superblock;
use crate::journal::read_page;

/// The superblock that counts, and what was wrong with the other copy.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) superblock: Superblock,
    pub(crate) warnings: Vec<String>,
}

/// Reads both copies and takes the younger whole one.
pub(crate) async fn read_superblocks<D: Device>(device: &D, device_blocks: u64) -> Result<Found> {
    let mut whole: Option<Superblock> = None;
    let mut faults: Vec<Error> = Vec::new();
    let mut buffer = BlockBuf::zeroed(1);
    for place in SUPERBLOCKS {
        if place.0 >= device_blocks {
            faults.push(Error::with(ErrorKind::NotFound, "no pool here"));
            continue;
        }
        let block = read_page(device, place, &mut buffer).await?;
        match Superblock::decode(&block, place, device_blocks) {
            Ok(found) => {
                let age = |superblock: &Superblock| (superblock.generation, superblock.session);
                let is_younger = whole.as_ref().is_none_or(|other| age(&found) > age(other));
                if is_younger {
                    whole = Some(found);
                }
            }
            Err(fault) => faults.push(fault),
        }
    }
    // A copy that a newer program wrote decides, whatever the other says.
    if let Some(index) = faults
        .iter()
        .position(|fault| fault.kind() == ErrorKind::Unsupported)
    {
        return Err(faults.swap_remove(index));
    }
    let Some(superblock) = whole else {
        let worst = faults
            .iter()
            .position(|fault| fault.kind() == ErrorKind::Corrupt)
            .unwrap_or(0);
        return Err(faults.swap_remove(worst));
    };
    let warnings = faults
        .into_iter()
        .map(|fault| {
            if fault.kind() == ErrorKind::NotFound {
                "one superblock copy is gone; the other is used".to_owned()
            } else {
                format!("{fault}; the other copy is used")
            }
        })
        .collect();
    Ok(Found {
        superblock,
        warnings,
    })
}

/// Writes both copies, one after the other, each made durable by `flush` before the next step.
pub(crate) async fn write_superblocks<D: Device>(
    device: &D,
    superblock: &Superblock,
    flush: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(1);
    for place in SUPERBLOCKS {
        buffer.copy_from_slice(&superblock.encode(place));
        device.write(place.offset(), &buffer).await?;
        flush().await?;
    }
    Ok(())
}
