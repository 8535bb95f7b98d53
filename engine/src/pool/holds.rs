//! Holds: what keeps a snapshot from being removed.

use super::Pool;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::Role;
use crate::format::record::Record;
use crate::limits::SNAPSHOT_GROUP_MAX;
use crate::name::{Name, VolumePath};
use crate::units::VolumeId;
use std::collections::BTreeSet;

impl Pool {
    /// Puts a hold on each of these snapshots: it is not removed while it has one. All of them or none; durable on
    /// return.
    pub async fn hold<D: Device>(
        &self,
        device: &D,
        tag: &Name,
        snapshots: &[VolumePath],
    ) -> Result<()> {
        let _alone = self.control.lock().await;
        let ids = self.holdable(tag, snapshots)?;
        let created = self.ledger.clock.now();
        self.change(device, |draft| {
            let first = draft.metadata().catalog.next_id().0;
            let record = |(number, snapshot): (u64, &VolumeId)| Record::Hold {
                snapshot: *snapshot,
                id: VolumeId(number),
                created,
                tag: tag.clone(),
            };
            let records: Vec<Record> = (first..).zip(&ids).map(record).collect();
            draft.apply_all(&records)
        })
        .await
    }

    /// Takes the hold with this tag from each of these snapshots. All of them or none; durable on return.
    pub async fn release<D: Device>(
        &self,
        device: &D,
        tag: &Name,
        snapshots: &[VolumePath],
    ) -> Result<()> {
        let _alone = self.control.lock().await;
        let holds = self.releasable(tag, snapshots)?;
        let records: Vec<Record> = holds.into_iter().map(|id| Record::Release { id }).collect();
        self.change(device, |draft| draft.apply_all(&records)).await
    }

    /// The error that [`Pool::hold`] would end with, as far as that can be seen without changing anything.
    pub fn check_hold(&self, tag: &Name, snapshots: &[VolumePath]) -> Result<()> {
        self.holdable(tag, snapshots).map(drop)
    }

    /// The error that [`Pool::release`] would end with, as far as that can be seen without changing anything.
    pub fn check_release(&self, tag: &Name, snapshots: &[VolumePath]) -> Result<()> {
        self.releasable(tag, snapshots).map(drop)
    }

    /// The numbers of these snapshots, none of which has a hold with this tag.
    fn holdable(&self, tag: &Name, snapshots: &[VolumePath]) -> Result<Vec<VolumeId>> {
        let ids = self.distinct_snapshots(snapshots)?;
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            ids.iter().try_for_each(|snapshot| {
                catalog.check_name(&Role::Hold {
                    snapshot: *snapshot,
                    tag: tag.clone(),
                })
            })
        })?;
        Ok(ids)
    }

    /// The numbers of the holds with this tag, one on each of these snapshots.
    fn releasable(&self, tag: &Name, snapshots: &[VolumePath]) -> Result<Vec<VolumeId>> {
        let ids = self.distinct_snapshots(snapshots)?;
        self.ledger.look(|metadata| {
            let hold = |(snapshot, path): (&VolumeId, &VolumePath)| {
                metadata.catalog.hold(*snapshot, tag).ok_or_else(|| {
                    Error::with(
                        ErrorKind::NotFound,
                        format!("{}/{path}: has no hold {tag}", self.name),
                    )
                })
            };
            ids.iter().zip(snapshots).map(hold).collect()
        })
    }

    fn distinct_snapshots(&self, snapshots: &[VolumePath]) -> Result<Vec<VolumeId>> {
        // The next checkpoint has room for so many new entries.
        if snapshots.is_empty() || snapshots.len() > SNAPSHOT_GROUP_MAX {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!(
                    "a hold takes 1 to {SNAPSHOT_GROUP_MAX} snapshots at a time, not {}",
                    snapshots.len()
                ),
            ));
        }
        let mut seen = BTreeSet::new();
        for path in snapshots {
            self.require_snapshot(path)?;
            if !seen.insert(path) {
                return Err(Error::with(
                    ErrorKind::Invalid,
                    format!("{}/{path}: is named twice", self.name),
                ));
            }
        }
        self.ledger.look(|metadata| {
            let id = |path| metadata.catalog.find(path).map(|found| found.entry.id);
            snapshots.iter().map(id).collect()
        })
    }
}
