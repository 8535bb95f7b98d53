//! What runs in the background: a commit a second, checkpoints, the return of removed volumes' space.

use super::Pool;
use super::own::Counting;
use crate::device::Device;
use crate::error::Result;
use crate::limits::MAP_PAGES_MAX;
use crate::sync::{Mutex, Signal};
use crate::units::VolumeId;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Acknowledged changes become durable at the latest after this, flush or not.
const COMMIT_NS: u64 = 1_000_000_000;
/// A checkpoint is written at the latest so long after the one before, if anything changed.
const CHECKPOINT_NS: u64 = 30_000_000_000;
/// How often a checkpoint is tried that waits for room of the file system below: each try writes all that there is room for.
const ROOM_NS: u64 = 1_000_000_000;
/// Leaves that one call of [`Pool::maintain`] returns.
const RECLAIM_STEPS: u32 = 64;

/// When the background work was last done.
#[derive(Debug)]
pub(super) struct Maintenance {
    committed_ns: AtomicU64,
    checkpointed_ns: AtomicU64,
    wanted: Signal,
    reclaimed: AtomicU64,
    /// Removed trees that cannot be read: their space stays used, and nothing else suffers.
    parked: Mutex<BTreeSet<VolumeId>>,
    /// Reclaim changed something that no checkpoint covers yet.
    has_reclaimed: AtomicBool,
    /// What is being counted, and the number from which on the next is looked for.
    pub(super) counting: Mutex<Option<Counting>>,
    pub(super) count_from: AtomicU64,
}

impl Maintenance {
    pub(super) fn new(now_ns: u64) -> Self {
        Self {
            committed_ns: AtomicU64::new(now_ns),
            checkpointed_ns: AtomicU64::new(now_ns),
            wanted: Signal::new(true),
            reclaimed: AtomicU64::new(0),
            parked: Mutex::default(),
            has_reclaimed: AtomicBool::new(false),
            counting: Mutex::default(),
            count_from: AtomicU64::new(0),
        }
    }

    /// There is something to do now.
    pub(super) fn want(&self) {
        self.wanted.raise();
    }

    /// Blocks and references returned since the pool was opened.
    pub(super) fn reclaimed(&self) -> u64 {
        self.reclaimed.load(Ordering::Relaxed)
    }
}

impl Pool {
    /// One step of what runs in the background (commit, checkpoint, reclaim): true while there is more to do at once.
    pub async fn maintain<D: Device>(&self, device: &D) -> Result<bool> {
        self.check_writable()?;
        let work = &self.maintenance;
        let now = self.ledger.clock.monotonic_ns();
        if now.saturating_sub(work.committed_ns.load(Ordering::Relaxed)) >= COMMIT_NS {
            work.committed_ns.store(now, Ordering::Relaxed);
            if self.ledger.has_pending() {
                self.flush(device).await?;
            }
        }
        let has_more = self.reclaim(device).await;
        if !has_more {
            self.recount(device).await?;
        }
        let durable = self.checkpoints.progress().0;
        if self
            .ledger
            .look(|metadata| metadata.map.is_over(MAP_PAGES_MAX))
        {
            self.ledger
                .adjust(|metadata| metadata.map.evict(durable, MAP_PAGES_MAX));
        }
        if self.wants_checkpoint(now, has_more) {
            work.has_reclaimed.store(false, Ordering::Relaxed);
            work.checkpointed_ns.store(now, Ordering::Relaxed);
            self.checkpoint(device).await?;
        }
        Ok(has_more)
    }

    /// Waits until [`Pool::maintain`] is wanted before its usual time (each 100 ms); for the background thread.
    pub async fn maintenance_wanted(&self) {
        self.maintenance.wanted.take().await;
    }

    fn wants_checkpoint(&self, now: u64, reclaim_goes_on: bool) -> bool {
        let work = &self.maintenance;
        let since = now.saturating_sub(work.checkpointed_ns.load(Ordering::Relaxed));
        if self.checkpoints.lacks_room() {
            return since >= ROOM_NS;
        }
        let is_journal_half_full = self
            .ledger
            .journal_usage()
            .is_some_and(|(used, all)| used * 2 > all);
        let (pending, free, blocks) = self.ledger.look(|metadata| {
            let space = &metadata.space;
            (
                space.pending_blocks(),
                space.free_for_data(),
                space.blocks(),
            )
        });
        let is_space_short = pending > 0 && (pending > blocks / 8 || free < pending);
        let reclaim_ended = !reclaim_goes_on && work.has_reclaimed.load(Ordering::Relaxed);
        let is_due = since >= CHECKPOINT_NS
            && self
                .ledger
                .journal_usage()
                .is_some_and(|(used, _)| used > 0);
        is_journal_half_full || is_space_short || reclaim_ended || is_due
    }

    /// Returns some of the space of what was removed, once the removal is durable; true while there is more.
    async fn reclaim<D: Device>(&self, device: &D) -> bool {
        for _ in 0..RECLAIM_STEPS {
            let durable = self.ledger.durable();
            let next: Option<VolumeId> = self.ledger.look(|metadata| {
                let catalog = &metadata.catalog;
                let parked = self.maintenance.parked.lock();
                let is_ready = |id: &&VolumeId| {
                    !parked.contains(id)
                        && catalog
                            .get(**id)
                            .is_ok_and(|found| found.removed_at <= durable)
                };
                catalog.reclaiming().iter().find(is_ready).copied()
            });
            let Some(id) = next else {
                return false;
            };
            match self.ledger.change(device, |draft| draft.reclaim(id)).await {
                Ok(step) => {
                    let work = &self.maintenance;
                    work.reclaimed.fetch_add(step.released, Ordering::Relaxed);
                    work.has_reclaimed.store(true, Ordering::Relaxed);
                }
                Err(error) => {
                    tracing::error!(%error, id = id.0, "the space of a removed volume cannot be returned");
                    self.maintenance.parked.lock().insert(id);
                }
            }
        }
        true
    }
}
