//! What a volume may map, its quota, and what others leave it, its reserve.

#[cfg(test)]
pub(super) mod tests;

use super::Pool;
use super::report::{Limit, LimitChange, Limits};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{CatalogEntry, Role, is_limit};
use crate::format::record::{Property, Record};
use crate::journal::Draft;
use crate::metadata::{Metadata, Prepared, blocks_of};
use crate::name::{Name, VolumePath};
use crate::space::Fault;
use crate::units::{BLOCK_BYTES, VolumeId};

impl Limits {
    /// The limits of a catalog entry.
    pub(super) fn of(entry: &CatalogEntry) -> Self {
        let limit = |bytes: u64| (bytes > 0).then_some(bytes);
        Self {
            quota_bytes: limit(entry.quota_bytes),
            reserve_bytes: limit(entry.reserve_bytes),
        }
    }

    /// As changes of a volume that has none.
    pub(super) fn changes(self) -> Vec<LimitChange> {
        let change = |limit, bytes: Option<u64>| LimitChange { limit, bytes };
        let (quota, reserve) = (self.quota_bytes, self.reserve_bytes);
        [change(Limit::Quota, quota), change(Limit::Reserve, reserve)]
            .into_iter()
            .filter(|change| change.bytes.is_some())
            .collect()
    }
}

impl LimitChange {
    fn property(self) -> Property {
        match self.limit {
            Limit::Quota => Property::Quota,
            Limit::Reserve => Property::Reserve,
        }
    }

    fn word(self) -> &'static str {
        match self.limit {
            Limit::Quota => "quota",
            Limit::Reserve => "reserve",
        }
    }

    /// Refuses what no volume can have.
    fn check(self, shown: &str) -> Result<()> {
        let word = self.word();
        let fact = match self.bytes {
            Some(0) => format!("a {word} of 0; `{word}=none` takes it away"),
            Some(bytes) if !bytes.is_multiple_of(BLOCK_BYTES) => {
                format!("a {word} of {bytes} bytes is not a multiple of {BLOCK_BYTES}")
            }
            Some(bytes) if !is_limit(bytes) => {
                format!("a {word} of {bytes} bytes is larger than any volume")
            }
            None | Some(_) => return Ok(()),
        };
        Err(Error::with(ErrorKind::Invalid, format!("{shown}: {fact}")))
    }

    fn record(self, id: VolumeId) -> Record {
        Record::SetProperty {
            id,
            property: self.property(),
            value: self.bytes.unwrap_or(0),
        }
    }
}

impl Pool {
    /// Changes the limits of a volume, all of them or none.
    pub async fn set_limits<D: Device>(
        &self,
        device: &D,
        volume: &Name,
        changes: &[LimitChange],
    ) -> Result<()> {
        let shown = format!("{}/{volume}", self.name);
        changes.iter().try_for_each(|change| change.check(&shown))?;
        let path = VolumePath {
            volume: volume.clone(),
            snapshot: None,
        };
        let _alone = self.control.lock().await;
        self.change(device, |draft| {
            let entry = draft.metadata().catalog.find(&path)?.entry.clone();
            let id = entry.id;
            check_changes(draft.metadata(), entry, changes, &shown)?;
            let records: Vec<Record> = changes.iter().map(|change| change.record(id)).collect();
            draft.apply_all(&records)
        })
        .await
    }

    /// Refuses changes that [`Pool::set_limits`] would refuse.
    pub fn check_limit_changes(&self, volume: &Name, changes: &[LimitChange]) -> Result<()> {
        let shown = format!("{}/{volume}", self.name);
        changes.iter().try_for_each(|change| change.check(&shown))?;
        let path = VolumePath {
            volume: volume.clone(),
            snapshot: None,
        };
        self.ledger.look(|metadata| {
            let entry = metadata.catalog.find(&path)?.entry.clone();
            check_changes(metadata, entry, changes, &shown)
        })
    }

    /// Where the pool forbids overcommit: refuses what gives volume `id`, or one more, so many bytes, if the volumes together
    /// would be larger than what the pool has room for.
    pub fn check_commit(&self, name: &Name, bytes: u64) -> Result<()> {
        if !self.forbids_overcommit {
            return Ok(());
        }
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let others = catalog.volume_ids().filter_map(|id| catalog.get(id).ok());
            let others = others.filter(|volume| {
                !matches!(&volume.entry.role, Role::Volume { name: other, .. } if other == name)
            });
            let blocks: u64 = others.map(|volume| blocks_of(volume.entry.bytes)).sum();
            let capacity = metadata.data_capacity();
            if blocks.saturating_add(blocks_of(bytes)) <= capacity {
                return Ok(());
            }
            let left = capacity.saturating_sub(blocks) * BLOCK_BYTES;
            Err(Error::with(
                ErrorKind::OutOfSpace,
                format!(
                    "{}/{name}: a size of {bytes} bytes; the pool was made with --no-overcommit and has room for {left} bytes beside its other volumes",
                    self.name
                ),
            ))
        })
    }

    /// Refuses limits that a new volume of so many bytes cannot have.
    pub fn check_limits(&self, volume: &Name, bytes: u64, limits: Limits) -> Result<()> {
        let shown = format!("{}/{volume}", self.name);
        for change in limits.changes() {
            change.check(&shown)?;
            fits(0, bytes, change, &shown)?;
        }
        let reserve = limits.reserve_bytes.unwrap_or(0);
        self.ledger
            .look(|metadata| metadata.check_new_reserve(reserve))
    }
}

/// Applies the record that makes volume `id`, and with it, as one change, its limits.
pub(super) fn create_limited(
    draft: &mut Draft<'_>,
    create: &Record,
    id: VolumeId,
    limits: Limits,
) -> Result<(), Fault> {
    if let Some(bytes) = limits.reserve_bytes {
        draft.metadata().check_new_reserve(bytes)?;
    }
    let prepared = draft.metadata().prepare(create)?;
    let mut left = limits.changes();
    left.reverse();
    draft.apply_prepared(create, prepared, !left.is_empty())?;
    while let Some(change) = left.pop() {
        // There is nothing to prepare: the volume stands since the record before.
        draft.apply_prepared(&change.record(id), Prepared::Whole, !left.is_empty())?;
    }
    Ok(())
}

/// Refuses limits that a volume has passed already, or that there is no space for.
fn check_changes(
    metadata: &Metadata,
    mut entry: CatalogEntry,
    changes: &[LimitChange],
    shown: &str,
) -> Result<()> {
    let mapped = entry.mapped_blocks * BLOCK_BYTES;
    let reserve_before = entry.reserve_bytes;
    for change in changes {
        fits(mapped, entry.bytes, *change, shown)?;
        if change.limit == Limit::Reserve {
            entry.reserve_bytes = change.bytes.unwrap_or(0);
        }
    }
    if entry.reserve_bytes > reserve_before {
        metadata.check_reserve(&entry)?;
    }
    Ok(())
}

/// Refuses a limit that a volume of so many bytes cannot have, so many of which are mapped.
fn fits(mapped: u64, size: u64, change: LimitChange, shown: &str) -> Result<()> {
    let fact = match (change.limit, change.bytes) {
        (Limit::Quota, Some(quota)) if quota < mapped => format!(
            "a quota of {quota} bytes is less than the {mapped} bytes that it maps; discard some first"
        ),
        (Limit::Reserve, Some(reserve)) if reserve > size.next_multiple_of(BLOCK_BYTES) => {
            format!("a reserve of {reserve} bytes is more than its size, {size} bytes")
        }
        (Limit::Quota | Limit::Reserve, _) => return Ok(()),
    };
    Err(Error::with(ErrorKind::Invalid, format!("{shown}: {fact}")))
}
