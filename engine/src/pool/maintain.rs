//! What runs in the background: a commit a second, checkpoints, the return of removed volumes' space, to the pool and to
//! the file or device below, and of memory.
//!
//! Each goes in small steps. Between those of the return of space it rests while somebody uses the pool, see `pace.rs`.

use super::Pool;
use super::own::Counting;
use super::pace::{Load, Watch, rest_ns};
use crate::checkpoint::Ending;
use crate::device::Device;
use crate::error::Result;
use crate::journal::Draft;
use crate::limits::METADATA_CACHE_BYTES_MIN;
use crate::metadata::Metadata;
use crate::sync::{Mutex, Signal};
use crate::units::{BLOCK_BYTES, VolumeId};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Acknowledged changes become durable at the latest after this, flush or not.
const COMMIT_NS: u64 = 1_000_000_000;
/// A checkpoint is written at the latest so long after the one before, if anything changed.
const CHECKPOINT_NS: u64 = 30_000_000_000;
/// How often a checkpoint is tried that waits for room of the file system below: each try writes all that there is room for.
const ROOM_NS: u64 = 1_000_000_000;
/// References that one call of [`Pool::maintain`] drops, before it rests: those of a leaf.
const RECLAIM_REFERENCES: u64 = 512;
/// A step that drops fewer counts as so many: it walks all the same.
const STEP_REFERENCES_MIN: u64 = 32;
/// Runs that one call of [`Pool::maintain`] gives back to the device below.
const TRIM_RUNS: usize = 64;
/// How often one call of [`Pool::maintain`] drops a little of what memory has too much of.
const EVICT_STEPS: u32 = 256;

/// When the background work was last done.
#[derive(Debug)]
pub(super) struct Maintenance {
    committed_ns: AtomicU64,
    checkpointed_ns: AtomicU64,
    wanted: Signal,
    reclaimed: AtomicU64,
    /// Removed trees that cannot be read: their space stays used, and nothing else suffers.
    parked: Mutex<BTreeSet<VolumeId>>,
    /// Reclaim changed something that no checkpoint has been begun for yet.
    has_reclaimed: AtomicBool,
    /// What is being counted, and the number from which on the next is looked for.
    pub(super) counting: Mutex<Option<Counting>>,
    pub(super) count_from: AtomicU64,
    /// The same, until that checkpoint is durable.
    is_unsettled: AtomicBool,
    requests: Watch,
    failed_writes: Watch,
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
            is_unsettled: AtomicBool::new(false),
            requests: Watch::of_requests(),
            failed_writes: Watch::of_failed_writes(),
        }
    }

    /// There is something to do now.
    pub(super) fn want(&self) {
        self.wanted.raise();
    }

    /// Whether all that reclaim has returned is free.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_unsettled.load(Ordering::Relaxed)
    }

    /// Whether a removed tree cannot be read.
    pub(super) fn is_parked(&self, id: VolumeId) -> bool {
        self.parked.lock().contains(&id)
    }

    /// Blocks and references returned since the pool was opened.
    pub(super) fn reclaimed(&self) -> u64 {
        self.reclaimed.load(Ordering::Relaxed)
    }
}

impl Pool {
    /// One step of what runs in the background (commit, checkpoint, reclaim): true while there is more to do at once. Rests
    /// after its work while somebody uses the pool.
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
        let is_busy = work.requests.has_changed(self.requests(), now);
        let cancelled = self.ledger.look(|metadata| metadata.space.cancelled());
        // Who gives blocks back under load gives back what is taken again at once. Where the file system below is full, it
        // cannot be taken elsewhere.
        let keeps_room = is_busy && !work.failed_writes.has_changed(cancelled, now);
        let mut has_more = self.reclaim(device).await;
        let worked_ns = self.ledger.clock.monotonic_ns().saturating_sub(now);
        self.evict();
        if self.wants_checkpoint(now, has_more, is_busy) {
            work.has_reclaimed.store(false, Ordering::Relaxed);
            work.checkpointed_ns.store(now, Ordering::Relaxed);
            let ending = match keeps_room {
                false => Ending::GoOn,
                true if self.load(is_busy).is_low() => Ending::Hasten,
                true => Ending::Yield,
            };
            let checkpoints = &self.checkpoints;
            checkpoints
                .write(&self.ledger, device, ending, |_| {})
                .await?;
            if !work.has_reclaimed.load(Ordering::Relaxed) {
                work.is_unsettled.store(false, Ordering::Relaxed);
            }
        }
        if has_more {
            self.rest(device, worked_ns, is_busy).await;
            return Ok(true);
        }
        self.recount(device).await?;
        if !keeps_room {
            has_more = self.trim(device).await;
        }
        Ok(has_more)
    }

    /// Bounds the memory that maps and counts take, in bytes.
    pub fn limit_metadata(&self, bytes: u64) {
        let bytes = bytes.max(METADATA_CACHE_BYTES_MIN);
        self.ledger.adjust(|metadata| metadata.limit(bytes));
    }

    /// Requests of those who are attached, since they were.
    fn requests(&self) -> u64 {
        let attached = self.attached.lock();
        attached.values().map(|volume| volume.requests()).sum()
    }

    fn load(&self, is_busy: bool) -> Load {
        self.ledger.look(|metadata| Load {
            is_busy,
            free: metadata.space.free_for_data(),
            blocks: metadata.space.blocks(),
        })
    }

    async fn rest<D: Device>(&self, device: &D, worked_ns: u64, is_busy: bool) {
        let rest_ns = rest_ns(worked_ns, self.load(is_busy));
        if rest_ns > 0 {
            device.pause(Duration::from_nanos(rest_ns)).await;
        }
    }

    fn evict(&self) {
        for _ in 0..EVICT_STEPS {
            if !self.ledger.look(Metadata::is_over) {
                break;
            }
            self.ledger.adjust(Metadata::evict);
        }
    }

    /// Gives some free blocks back to the device below; true while there are more.
    async fn trim<D: Device>(&self, device: &D) -> bool {
        let Some(region) = self
            .ledger
            .look(|metadata| metadata.space.first_untrimmed())
        else {
            return false;
        };
        let taken = self.ledger.adjust_reading(device, |draft| {
            let space = &mut draft.metadata().space;
            space.begin_trim(region, TRIM_RUNS)
        });
        let mut is_refused = false;
        match taken.await {
            Ok(extents) => {
                for extent in &extents {
                    let (offset, bytes) = (extent.start.offset(), extent.count * BLOCK_BYTES);
                    if let Err(error) = device.discard(offset, bytes).await {
                        // A discard is advice: the blocks are free all the same.
                        tracing::warn!(%error, "free space could not be given back");
                        is_refused = true;
                        break;
                    }
                }
                self.ledger
                    .adjust(|metadata| metadata.space.end_trim(&extents));
            }
            Err(error) => {
                tracing::warn!(%error, "free space is not given back");
                is_refused = true;
            }
        }
        if is_refused {
            self.ledger
                .adjust(|metadata| metadata.space.skip_trim(region));
        }
        self.ledger
            .look(|metadata| metadata.space.first_untrimmed().is_some())
    }

    /// Waits until [`Pool::maintain`] is wanted before its usual time (each 100 ms); for the background thread.
    pub async fn maintenance_wanted(&self) {
        self.maintenance.wanted.take().await;
    }

    fn wants_checkpoint(&self, now: u64, reclaim_goes_on: bool, is_busy: bool) -> bool {
        let work = &self.maintenance;
        let since = now.saturating_sub(work.checkpointed_ns.load(Ordering::Relaxed));
        if self.checkpoints.lacks_room() {
            return since >= ROOM_NS;
        }
        let is_journal_half_full = self
            .ledger
            .journal_usage()
            .is_some_and(|(used, all)| used * 2 > all);
        let (pending, free, blocks, is_mostly_dirty, is_vacated) = self.ledger.look(|metadata| {
            let space = &metadata.space;
            let is_trimmed = space.first_untrimmed().is_none();
            (
                space.pending_blocks(),
                space.free_for_data(),
                space.blocks(),
                metadata.is_mostly_dirty(),
                space.has_vacated() && is_trimmed && !is_busy && !reclaim_goes_on,
            )
        });
        let is_space_short = pending > 0 && (pending > blocks / 8 || free < pending);
        let reclaim_ended = !reclaim_goes_on && work.has_reclaimed.load(Ordering::Relaxed);
        let is_due = since >= CHECKPOINT_NS
            && self
                .ledger
                .journal_usage()
                .is_some_and(|(used, _)| used > 0);
        is_journal_half_full
            || is_space_short
            || reclaim_ended
            || is_due
            || is_mostly_dirty
            || is_vacated
    }

    /// Returns some of the space of what was removed, once the removal is durable; true while there is more.
    async fn reclaim<D: Device>(&self, device: &D) -> bool {
        let mut dropped = 0;
        while dropped < RECLAIM_REFERENCES {
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
            let reclaim = |draft: &mut Draft<'_>| draft.reclaim(id);
            match self.ledger.adjust_reading(device, reclaim).await {
                Ok(step) => {
                    let work = &self.maintenance;
                    work.reclaimed.fetch_add(step.released, Ordering::Relaxed);
                    work.has_reclaimed.store(true, Ordering::Relaxed);
                    work.is_unsettled.store(true, Ordering::Relaxed);
                    dropped += step.released.max(STEP_REFERENCES_MIN);
                }
                Err(error) => {
                    tracing::error!(%error, id = id.0, "the space of a removed volume cannot be returned");
                    self.maintenance.parked.lock().insert(id);
                    dropped += STEP_REFERENCES_MIN;
                }
            }
        }
        true
    }
}
