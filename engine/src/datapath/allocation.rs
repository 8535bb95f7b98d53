//! What of a range is mapped: one lookup a leaf, or a piece of a leaf where it is fragmented.

use super::Io;
use crate::device::Device;
use crate::error::Result;
use crate::map::Resolved;
use crate::units::{BLOCK_BYTES, Lba};

/// The most lookups for one answer, so that a fragmented volume gives a shorter one instead of a late one.
const LOOKUPS_MAX: usize = 16_384;

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many; not zero.
    pub bytes: u64,
    /// Whether blocks of the pool are behind it. What has none reads as zeros.
    pub is_mapped: bool,
}

impl<D: Device> Io<'_, D> {
    /// Runs from byte `offset` on, alternating in kind: at least one, at most `runs_max`, together at most `bytes`.
    pub(crate) async fn allocation(
        &self,
        offset: u64,
        bytes: u64,
        runs_max: usize,
    ) -> Result<Vec<Run>> {
        let end = offset + bytes;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = offset;
        for _ in 0..LOOKUPS_MAX {
            if at >= end {
                break;
            }
            let lba = Lba(at / BLOCK_BYTES);
            let max = end.div_ceil(BLOCK_BYTES) - lba.0;
            let resolved = self
                .ledger
                .view(self.device, |metadata| {
                    let root = metadata.catalog.get(self.volume)?.entry.root;
                    metadata.map.resolve(root, lba, max)
                })
                .await
                .map_err(|error| self.name_volume(error))?;
            let (count, is_mapped) = match resolved {
                Resolved::Hole(count) => (count, false),
                Resolved::Mapped(extent) => (extent.count, true),
            };
            let next = (lba.plus(count).0 * BLOCK_BYTES).min(end);
            let bytes = next - at;
            match runs.last_mut() {
                Some(last) if last.is_mapped == is_mapped => last.bytes += bytes,
                _ => runs.push(Run { bytes, is_mapped }),
            }
            if runs.len() > runs_max {
                runs.pop();
                break;
            }
            at = next;
        }
        Ok(runs)
    }
}
