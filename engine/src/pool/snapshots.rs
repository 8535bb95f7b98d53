//! Snapshots, clones, rollback and diff.

use super::Pool;
use super::change::Change;
use super::report::{DiffExtent, DiffKind};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::Root;
use crate::format::record::Record;
use crate::journal::Draft;
use crate::limits::SNAPSHOT_GROUP_MAX;
use crate::metadata::{Metadata, blocks_of};
use crate::name::{Name, VolumePath};
use crate::space::Fault;
use crate::units::{BLOCK_BYTES, Lba, VolumeId};
use std::collections::BTreeSet;

impl Pool {
    /// Takes snapshots of one or several volumes at one point in time; durable on return.
    ///
    /// The fork and the opening of a new epoch are one moment: writes after it see every block as shared. Writes in
    /// place that were under way are awaited before the snapshots are made durable.
    pub async fn snapshot<D: Device>(&self, device: &D, targets: &[VolumePath]) -> Result<()> {
        let invalid = |message: String| Err(Error::with(ErrorKind::Invalid, message));
        if targets.is_empty() || targets.len() > SNAPSHOT_GROUP_MAX {
            return invalid(format!(
                "a snapshot takes 1 to {SNAPSHOT_GROUP_MAX} targets, not {}",
                targets.len()
            ));
        }
        if let Some(path) = targets.iter().find(|path| path.snapshot.is_none()) {
            return invalid(format!(
                "{}/{path}: names no snapshot; write {path}@NAME",
                self.name
            ));
        }
        let mut seen = BTreeSet::new();
        if let Some(path) = targets.iter().find(|path| !seen.insert(*path)) {
            return invalid(format!("{}/{path}: is named twice", self.name));
        }
        // A snapshot of a volume that is being shrunk waits for its end; others don't.
        let origins = |metadata: &Metadata| {
            let origins = targets.iter().map(VolumePath::origin);
            origins
                .filter_map(|path| metadata.catalog.id_of(&path))
                .collect()
        };
        let _alone = self.turn(origins).await;
        self.check_writable()?;
        let created = self.ledger.clock.now();
        let (volumes, pause_ns) = self
            .change_epoch(device, |draft| {
                let began = self.ledger.clock.monotonic_ns();
                let catalog = &draft.metadata().catalog;
                let first = catalog.next_id().0;
                let mut records = Vec::with_capacity(targets.len());
                let mut volumes: Vec<VolumeId> = Vec::with_capacity(targets.len());
                for (number, target) in (first..).zip(targets) {
                    let volume = catalog.find(&target.origin())?.entry.id;
                    volumes.push(volume);
                    records.extend(target.snapshot.clone().map(|name| Record::Snapshot {
                        volume,
                        id: VolumeId(number),
                        name,
                        created,
                    }));
                }
                draft.metadata().check_snapshots(&volumes)?;
                draft.apply_all(&records)?;
                Ok((volumes, self.ledger.clock.monotonic_ns() - began))
            })
            .await?;
        let attached = self.attached.lock();
        for volume in volumes {
            if let Some(volume) = attached.get(&volume) {
                volume.counters.snapshot_pause.record(pause_ns);
            }
        }
        Ok(())
    }

    /// Makes a volume that begins as the snapshot is.
    pub async fn clone_snapshot<D: Device>(
        &self,
        device: &D,
        snapshot: &VolumePath,
        volume: &Name,
    ) -> Result<VolumeId> {
        self.require_snapshot(snapshot)?;
        let _alone = self.control.lock().await;
        let size = self.bytes_of(snapshot)?;
        self.check_commit(volume, size)?;
        let created = self.ledger.clock.now();
        self.change(device, |draft| {
            let catalog = &draft.metadata().catalog;
            let id = catalog.next_id();
            let snapshot = catalog.find(snapshot)?.entry.id;
            draft.apply(&Record::Clone {
                snapshot,
                id,
                name: volume.clone(),
                created,
            })?;
            Ok(id)
        })
        .await
    }

    /// Turns a volume back to one of its snapshots; newer snapshots stay. The caller keeps writers away meanwhile.
    pub async fn rollback<D: Device>(&self, device: &D, snapshot: &VolumePath) -> Result<()> {
        self.require_snapshot(snapshot)?;
        let origin = snapshot.origin();
        let concerned = |metadata: &Metadata| metadata.catalog.id_of(&origin).into_iter().collect();
        let _alone = self.turn(concerned).await;
        self.check_writable()?;
        let volume = self
            .ledger
            .look(|metadata| Ok::<_, Error>(metadata.catalog.find(&origin)?.entry.id))?;
        if self.bytes_of(snapshot)? > self.bytes_of(&origin)? {
            self.check_commit(&origin.volume, self.bytes_of(snapshot)?)?;
        }
        let _change = Change::announce(self, vec![volume]);
        let (volume, bytes) = self
            .change_epoch(device, |draft| {
                let catalog = &draft.metadata().catalog;
                let target = &catalog.find(snapshot)?.entry;
                let (snapshot, bytes) = (target.id, target.bytes);
                let volume = catalog.find(&origin)?.entry.id;
                let reclaim = catalog.next_id();
                draft.apply(&Record::Rollback {
                    volume,
                    snapshot,
                    reclaim,
                })?;
                Ok((volume, bytes))
            })
            .await?;
        if let Some(attached) = self.attached.lock().get(&volume) {
            attached.bytes.set(bytes);
        }
        self.maintenance.want();
        Ok(())
    }

    /// Changes the catalog and opens a new epoch, in one moment. Makes that durable once requests of the old epoch have
    /// ended.
    async fn change_epoch<D: Device, T>(
        &self,
        device: &D,
        mut change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<T> {
        loop {
            let closing = self.ledger.gate.closing().await;
            let change = |draft: &mut Draft<'_>| {
                let value = change(draft)?;
                closing.flip();
                Ok(value)
            };
            if let Some(value) = self.ledger.change(device, 0, change).await? {
                closing.drained().await;
                self.flush(device).await?;
                return Ok(value);
            }
            // A flush may need a checkpoint, which closes an epoch itself.
            drop(closing);
            self.flush(device).await?;
        }
    }

    /// The size of a volume or snapshot.
    pub fn bytes_of(&self, path: &VolumePath) -> Result<u64> {
        self.ledger
            .look(|metadata| metadata.catalog.find(path).map(|found| found.entry.bytes))
    }

    pub(super) fn require_snapshot(&self, path: &VolumePath) -> Result<()> {
        match path.snapshot {
            Some(_) => Ok(()),
            None => Err(Error::with(
                ErrorKind::Invalid,
                format!("{}/{path}: names no snapshot; write {path}@NAME", self.name),
            )),
        }
    }

    /// Where `to` differs from `from`, in order; adjacent runs of one kind are one.
    ///
    /// A live volume is compared as it is found, step by step; a snapshot of it is the way to one point in time.
    pub async fn diff<D: Device>(
        &self,
        device: &D,
        from: &VolumePath,
        to: &VolumePath,
    ) -> Result<Vec<DiffExtent>> {
        let (older, newer) = self.ledger.look(|metadata| {
            let id = |path| {
                let entry = &metadata.catalog.find(path)?.entry;
                self.check_withheld(entry.id, path)?;
                Ok::<_, Error>((entry.id, entry.bytes))
            };
            Ok::<_, Error>((id(from)?, id(to)?))
        })?;
        let end = Lba(blocks_of(older.1.max(newer.1)));
        // A map names no page twice, so two of them have at most so many leaves.
        let leaves_max = 2 * self.ledger.look(|metadata| metadata.space.blocks());
        let mut leaves = 0;
        let mut extents: Vec<DiffExtent> = Vec::new();
        let mut at = Lba(0);
        while at < end {
            let step = self
                .ledger
                .view(device, |metadata| {
                    let root = |id| metadata.catalog.get(id).map(|found| found.entry.root);
                    let (older, newer): (Root, Root) = (root(older.0)?, root(newer.0)?);
                    metadata.map.diff(older, newer, at)
                })
                .await?;
            leaves += u64::from(!step.blocks.is_empty());
            if leaves > leaves_max {
                let fact =
                    "differ in more leaves than the pool has room for: pages are named twice";
                return Err(Error::corrupt(format!("{from} and {to}: {fact}")));
            }
            for (lba, is_mapped) in step.blocks {
                let offset = lba.0 * BLOCK_BYTES;
                let kind = if is_mapped {
                    DiffKind::Data
                } else {
                    DiffKind::Zero
                };
                match extents.last_mut() {
                    Some(last) if last.kind == kind && last.offset + last.length == offset => {
                        last.length += BLOCK_BYTES;
                    }
                    _ => extents.push(DiffExtent {
                        offset,
                        length: BLOCK_BYTES,
                        kind,
                    }),
                }
            }
            at = step.next;
        }
        Ok(extents)
    }
}
