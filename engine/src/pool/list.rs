//! Looking: the list of volumes, the pool's state, its counters.

use super::Pool;
use super::report::{Entry, EntryKind, PoolStats, PoolStatus, Redirect};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{CatalogEntry, Role};
use crate::units::{BLOCK_BYTES, Lba, VolumeId};

impl Pool {
    /// All volumes and snapshots, by name, snapshots by age after their volume. Counts unique blocks by a walk.
    pub async fn list<D: Device>(&self, device: &D) -> Result<Vec<Entry>> {
        let ids: Vec<VolumeId> = self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let with_snapshots = |id| std::iter::once(id).chain(catalog.snapshot_ids(id));
            catalog.volume_ids().flat_map(with_snapshots).collect()
        });
        let mut entries = Vec::with_capacity(ids.len());
        for id in ids {
            let unique_blocks = self.unique(device, id).await?;
            let entry = self.ledger.look(|metadata| {
                let found = metadata.catalog.get(id)?;
                let path = metadata.catalog.path(id);
                let origin = match &found.entry.role {
                    Role::Volume { origin, .. } => {
                        origin.and_then(|origin| metadata.catalog.path(origin))
                    }
                    Role::Snapshot { .. } | Role::Reclaiming { .. } => None,
                };
                Ok::<_, Error>(path.map(|path| (path, origin, found.entry.clone())))
            });
            // Something removed meanwhile is not in the list.
            if let Ok(Some((path, origin, entry))) = entry {
                entries.push(describe(&entry, path, origin, unique_blocks));
            }
        }
        Ok(entries)
    }

    async fn unique<D: Device>(&self, device: &D, id: VolumeId) -> Result<u64> {
        let mut unique = 0;
        let mut at = Lba(0);
        let blocks = self.ledger.look(|metadata| metadata.space.blocks());
        loop {
            let (next, found) = self
                .ledger
                .view(device, |metadata| match metadata.catalog.get(id) {
                    Ok(found) => metadata.map.unique(&metadata.space, found.entry.root, at),
                    Err(_) => Ok((Lba(u64::MAX), 0)),
                })
                .await
                .or_else(unless_damaged)?;
            unique += found;
            // A damaged map may name a page as often as it has room; no more is unique than there is.
            if next.0 == u64::MAX || next <= at || unique > blocks {
                return Ok(unique.min(blocks));
            }
            at = next;
        }
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
                pending_bytes: space.pending_blocks() * BLOCK_BYTES,
                reserve_bytes: space.reserve_blocks() * BLOCK_BYTES,
                volumes: catalog.volume_count() as u64,
                snapshots: catalog.snapshot_count() as u64,
                reclaiming: catalog.reclaiming().len() as u64,
                generation: generation.0,
                created: self.created,
                poisoned: is_poisoned,
                warnings,
            }
        })
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
            reclaimed_blocks: self.maintenance.reclaimed(),
            pending_bytes: status.pending_bytes,
            volumes,
        }
    }
}

/// A map that cannot be read ends the count there, not the list of all others.
fn unless_damaged(error: Error) -> Result<(Lba, u64)> {
    if error.kind() == ErrorKind::Corrupt {
        Ok((Lba(u64::MAX), 0))
    } else {
        Err(error)
    }
}

fn describe(
    entry: &CatalogEntry,
    path: crate::name::VolumePath,
    origin: Option<crate::name::VolumePath>,
    unique_blocks: u64,
) -> Entry {
    let used = entry.mapped_blocks * BLOCK_BYTES;
    let unique = unique_blocks * BLOCK_BYTES;
    Entry {
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
        used_bytes: used,
        unique_bytes: unique,
        shared_bytes: used.saturating_sub(unique),
        created: entry.created,
    }
}
