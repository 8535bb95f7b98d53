//! Looking: the list of volumes, the pool's state, its counters.

use super::Pool;
use super::report::{
    Backlog, Entry, EntryKind, Limits, OutlineEntry, PoolStats, PoolStatus, Redirect,
};
use crate::device::Device;
use crate::error::Result;
use crate::format::catalog::{Own, Role};
use crate::metadata::{Catalog, Metadata};
use crate::name::{Name, VolumePath};
use crate::units::{BLOCK_BYTES, VolumeId};

/// Entries that are described under one hold of the lock.
const LIST_BATCH: usize = 512;

impl Pool {
    /// All volumes and snapshots, by name, snapshots by age after their volume. What somebody owns alone is known, but
    /// for those around a change that went on since it was counted.
    pub async fn list<D: Device>(&self, device: &D) -> Result<Vec<Entry>> {
        let ids: Vec<VolumeId> = self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let with_snapshots = |id| std::iter::once(id).chain(catalog.snapshot_ids(id));
            catalog.volume_ids().flat_map(with_snapshots).collect()
        });
        let mut entries = Vec::with_capacity(ids.len());
        for batch in ids.chunks(LIST_BATCH) {
            let mut unknown: Vec<(usize, VolumeId)> = Vec::new();
            self.ledger.look(|metadata| {
                for id in batch {
                    // Something removed meanwhile is not in the list.
                    let Some((entry, is_counted)) = describe(metadata, *id) else {
                        continue;
                    };
                    if !is_counted {
                        unknown.push((entries.len(), *id));
                    }
                    entries.push(entry);
                }
            });
            if unknown.is_empty() {
                continue;
            }
            let ids: Vec<VolumeId> = unknown.iter().map(|(_, id)| *id).collect();
            let round = self.begin_counting(&ids);
            for (index, id) in unknown {
                let own = self.count_own(device, id, round).await?;
                if let Some(entry) = entries.get_mut(index) {
                    tell_own(entry, own);
                }
            }
        }
        Ok(entries)
    }

    /// The same in the same order, as far as the catalog alone knows it: no map is read.
    pub fn outline(&self) -> Vec<OutlineEntry> {
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let with_snapshots = |id| std::iter::once(id).chain(catalog.snapshot_ids(id));
            let ids = catalog.volume_ids().flat_map(with_snapshots);
            ids.filter_map(|id| outline_entry(catalog, id)).collect()
        })
    }

    /// Whether a volume began as a clone, as far as its origin still says so: a clone that was rolled back to a snapshot of
    /// its own does not.
    pub fn is_clone(&self, path: &VolumePath) -> Result<bool> {
        self.ledger.look(|metadata| {
            let entry = &metadata.catalog.find(path)?.entry;
            Ok(match entry.role {
                // Numbers grow: the snapshot that a volume was cloned from is older than the volume, those that the
                // volume can be rolled back to are younger.
                Role::Volume { origin, .. } => origin.is_some_and(|origin| origin < entry.id),
                Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => false,
            })
        })
    }

    /// The snapshots of a volume, oldest first, as [`Pool::outline`] has them.
    pub fn snapshots_of(&self, volume: &Name) -> Result<Vec<OutlineEntry>> {
        let path = VolumePath {
            volume: volume.clone(),
            snapshot: None,
        };
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let ids = catalog.snapshot_ids(catalog.find(&path)?.entry.id);
            let entries = ids.into_iter().filter_map(|id| outline_entry(catalog, id));
            Ok(entries.collect())
        })
    }

    /// The state.
    pub fn status(&self) -> PoolStatus {
        let (generation, ..) = self.checkpoints.progress();
        let is_poisoned = self.ledger.is_poisoned();
        self.ledger.look(|metadata| {
            let (space, catalog) = (&metadata.space, &metadata.catalog);
            let mut warnings = self.warnings.clone();
            if space.underflows() > 0 {
                warnings
                    .push("block counts were found too low; run `ublkctl pool check`".to_owned());
            }
            PoolStatus {
                name: self.name.clone(),
                id: metadata.id.to_string(),
                size_bytes: space.blocks() * BLOCK_BYTES,
                free_bytes: space.free_for_data() * BLOCK_BYTES,
                used_bytes: space.used_blocks() * BLOCK_BYTES,
                pending_bytes: (space.pending_blocks() + space.kept_blocks()) * BLOCK_BYTES,
                reserve_bytes: space.reserve_blocks() * BLOCK_BYTES,
                set_aside_bytes: catalog.owed_blocks().saturating_mul(BLOCK_BYTES),
                overcommit: !self.forbids_overcommit,
                volumes: catalog.volume_count() as u64,
                snapshots: catalog.snapshot_count() as u64,
                reclaiming: catalog.reclaiming().len() as u64,
                backlog_bytes: catalog.backlog_blocks() * BLOCK_BYTES,
                generation: generation.0,
                created: self.created,
                poisoned: is_poisoned,
                warnings,
            }
        })
    }

    /// What of these is still to be returned; they are numbers that [`super::Removal::ids`] gave.
    pub fn backlog(&self, ids: &[VolumeId]) -> Result<Backlog> {
        // Of a pool that takes no more writes nothing comes back.
        self.ledger.check_poison()?;
        let work = &self.maintenance;
        let mut backlog = Backlog {
            is_settled: work.is_settled(),
            ..Backlog::default()
        };
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            for id in ids.iter().filter(|id| catalog.reclaiming().contains(id)) {
                backlog.trees += 1;
                backlog.unreadable += u64::from(work.is_parked(*id));
                backlog.bytes += catalog.backlog_of(*id) * BLOCK_BYTES;
            }
        });
        Ok(backlog)
    }

    /// The counters.
    pub fn stats(&self) -> PoolStats {
        let (_, checkpoints, checkpoint_ns) = self.checkpoints.progress();
        let (journal_used, journal_blocks) = self.ledger.journal_usage().unwrap_or_default();
        let now = self.ledger.clock.monotonic_ns();
        let attached: Vec<_> = self.attached.lock().values().cloned().collect();
        let volumes = attached
            .iter()
            .filter_map(|volume| Some(volume.stats(self.path_of(volume.id).ok()?, now)))
            .collect();
        let status = self.status();
        PoolStats {
            free_bytes: status.free_bytes,
            journal_used_bytes: journal_used * BLOCK_BYTES,
            journal_bytes: journal_blocks * BLOCK_BYTES,
            commits: self.ledger.commits(),
            checkpoints,
            checkpoint_ns,
            reclaiming: status.reclaiming,
            backlog_bytes: status.backlog_bytes,
            reclaimed_blocks: self.maintenance.reclaimed(),
            metadata_bytes: self.ledger.look(Metadata::cached_bytes),
            pending_bytes: status.pending_bytes,
            volumes,
        }
    }
}

fn tell_own(entry: &mut Entry, own: Own) {
    entry.unique_bytes = (own.data + own.pages) * BLOCK_BYTES;
    entry.shared_bytes = entry.used_bytes.saturating_sub(own.data * BLOCK_BYTES);
}

/// The entry, and whether what it owns alone is known.
fn describe(metadata: &Metadata, id: VolumeId) -> Option<(Entry, bool)> {
    let entry = &metadata.catalog.get(id).ok()?.entry;
    let path = metadata.catalog.path(id)?;
    let origin = match &entry.role {
        Role::Volume { origin, .. } => origin.and_then(|origin| metadata.catalog.path(origin)),
        Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => None,
    };
    let mut described = Entry {
        kind: if path.snapshot.is_some() {
            EntryKind::Snapshot
        } else {
            EntryKind::Volume
        },
        path,
        id: entry.id,
        origin,
        size_bytes: entry.bytes,
        sector_bytes: entry.sector_bytes,
        redirect: if entry.redirects_always {
            Redirect::Always
        } else {
            Redirect::Shared
        },
        used_bytes: entry.mapped_blocks * BLOCK_BYTES,
        unique_bytes: 0,
        shared_bytes: 0,
        created: entry.created,
        holds: tags(&metadata.catalog, id),
        limits: Limits::of(entry),
    };
    tell_own(&mut described, entry.kin.own);
    Some((described, entry.kin.is_counted))
}

fn tags(catalog: &Catalog, snapshot: VolumeId) -> Vec<Name> {
    catalog
        .holds(snapshot)
        .map(|(tag, _)| tag.clone())
        .collect()
}

fn outline_entry(catalog: &Catalog, id: VolumeId) -> Option<OutlineEntry> {
    let entry = &catalog.get(id).ok()?.entry;
    Some(OutlineEntry {
        path: catalog.path(id)?,
        id,
        origin: match entry.role {
            Role::Volume { origin, .. } => origin,
            Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => None,
        },
        created: entry.created,
        holds: tags(catalog, id),
    })
}
