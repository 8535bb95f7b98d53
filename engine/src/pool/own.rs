//! Counting what volumes and snapshots own alone, where no change told.

use super::Pool;
use crate::device::Device;
use crate::error::{ErrorKind, Result};
use crate::format::catalog::Own;
use crate::units::{Lba, VolumeId};
use std::sync::atomic::Ordering;

/// Leaves that one call of [`Pool::maintain`] looks at.
const STEPS_MAX: usize = 256;
/// Entries of which one call of [`Pool::maintain`] finds out whether they can be counted.
const LOOKS_MAX: usize = 64;

/// A count under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counting {
    id: VolumeId,
    round: u64,
    /// Where it goes on.
    at: Lba,
    own: Own,
}

impl Pool {
    pub(super) fn begin_counting(&self, ids: &[VolumeId]) -> u64 {
        self.ledger
            .adjust(|metadata| metadata.catalog.begin_counting(ids))
    }

    /// What an entry owns alone, by a walk over the pages that it owns alone.
    pub(super) async fn count_own<D: Device>(
        &self,
        device: &D,
        id: VolumeId,
        round: u64,
    ) -> Result<Own> {
        let mut counting = Counting::of(id, round);
        while !self.count_step(device, &mut counting).await? {}
        Ok(counting.own)
    }

    /// One step of a count; whether it was the last.
    async fn count_step<D: Device>(&self, device: &D, counting: &mut Counting) -> Result<bool> {
        let (id, at) = (counting.id, counting.at);
        let step = self
            .ledger
            .view(device, |metadata| {
                let blocks = metadata.space.blocks();
                let (next, own) = match metadata.catalog.get(id) {
                    Ok(found) => metadata.map.own(&metadata.space, found.entry.root, at)?,
                    Err(_) => (Lba(u64::MAX), Own::default()),
                };
                Ok((next, own, blocks))
            })
            .await;
        let (next, found, blocks) = match step {
            Ok(step) => step,
            // A map that cannot be read ends its count there, not the list of all others.
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(true),
            Err(error) => return Err(error),
        };
        let own = &mut counting.own;
        own.data += found.data;
        own.pages += found.pages;
        // A damaged map may name a page as often as it has room; nobody owns more than there is.
        if own.data + own.pages > blocks {
            own.data = own.data.min(blocks);
            own.pages = own.pages.min(blocks - own.data);
            return Ok(true);
        }
        if next.0 != u64::MAX && next > at {
            counting.at = next;
            return Ok(false);
        }
        if !self.is_read_only {
            let (round, own) = (counting.round, *own);
            self.ledger
                .adjust(|metadata| metadata.catalog.counted(id, round, own));
        }
        Ok(true)
    }

    /// Counts some of those that have to be counted, in the background: not while removed space comes back, and not
    /// where somebody writes, which would begin it again and again.
    pub(super) async fn recount<D: Device>(&self, device: &D) -> Result<()> {
        let mut under_way = self.maintenance.counting.lock().take();
        for _ in 0..STEPS_MAX {
            let Some(mut counting) = under_way.take().or_else(|| self.next_count()) else {
                return Ok(());
            };
            if !self.count_step(device, &mut counting).await? {
                under_way = Some(counting);
            }
        }
        *self.maintenance.counting.lock() = under_way;
        Ok(())
    }

    fn next_count(&self) -> Option<Counting> {
        let from = VolumeId(self.maintenance.count_from.load(Ordering::Relaxed));
        let attached = self.attached.lock();
        let is_written = |id: &VolumeId| {
            let volume = attached.get(id);
            volume.is_some_and(|volume| !volume.is_read_only())
        };
        let (candidate, next) = self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            if !catalog.reclaiming().is_empty() {
                return (None, from.0);
            }
            let looked_at = catalog.uncounted(from, LOOKS_MAX);
            let is_quiet =
                |id: &&VolumeId| !is_written(id) && !catalog.adjacent(**id).iter().any(is_written);
            let candidate = looked_at.iter().find(is_quiet).copied();
            let next = match candidate.or(looked_at.last().copied()) {
                Some(last) if candidate.is_some() || looked_at.len() == LOOKS_MAX => last.0 + 1,
                _ => 0,
            };
            (candidate, next)
        });
        drop(attached);
        self.maintenance.count_from.store(next, Ordering::Relaxed);
        let id = candidate?;
        Some(Counting::of(id, self.begin_counting(&[id])))
    }
}

impl Counting {
    fn of(id: VolumeId, round: u64) -> Self {
        Self {
            id,
            round,
            at: Lba(0),
            own: Own::default(),
        }
    }
}
