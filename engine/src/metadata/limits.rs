//! What a volume may take: its quota, and what is not set aside for others.
//!
//! A quota is held against each record that maps, under the lock that applies it: so no two writers pass it together.
//! Replay does not ask again. Overwriting, redirecting and discarding what is mapped adds nothing, and always goes on.

use super::catalog::owed_blocks;
use super::{Catalog, Metadata, catalog_pages};
use crate::error::{Error, ErrorKind};
use crate::format::catalog::CatalogEntry;
use crate::format::record::Record;
use crate::limits::SNAPSHOT_GROUP_MAX;
use crate::space::Fault;
use crate::units::{BLOCK_BYTES, VolumeId};
use std::collections::BTreeSet;

/// A pool with less than one part in so many free takes no snapshots, so that there is room for what follows them.
const SNAPSHOT_FREE_PART: u64 = 128;

impl Metadata {
    /// How many of `want` blocks a volume may take for a write, at least one: to holes, or to blocks that it maps and
    /// others share.
    pub(crate) fn grant(&self, id: VolumeId, want: u64, is_shared: bool) -> Result<u64, Fault> {
        let mut want = want;
        if !is_shared && self.catalog.has_quotas() {
            let entry = &self.catalog.get(id)?.entry;
            match quota_left(entry) {
                Some(0) => return Err(self.over_quota(entry).into()),
                Some(left) => want = want.min(left),
                None => {}
            }
        }
        let owed = self.catalog.owed_to_others(id);
        if owed > 0 {
            let free = self.space.free_for_data();
            want = want.min(free.saturating_sub(owed));
            if want == 0 {
                let bytes = free * BLOCK_BYTES;
                let message = format!(
                    "no space left in the pool: {bytes} bytes are free, and set aside for volumes with a reserve"
                );
                return Err(Error::with(ErrorKind::OutOfSpace, message).into());
            }
        }
        Ok(want)
    }

    /// After a record was applied: what volumes may still need of their reserves. That a volume has more blocks for
    /// itself because another one lost them may show late; that it has fewer shows at once.
    pub(super) fn refresh_owed(&mut self, record: &Record) {
        if !self.catalog.has_reserves() {
            return;
        }
        match record {
            Record::Map { volume, .. } | Record::Unmap { volume, .. } => {
                self.catalog.refresh_owed(*volume);
            }
            Record::Create { .. }
            | Record::Snapshot { .. }
            | Record::Clone { .. }
            | Record::Rollback { .. }
            | Record::Remove { .. }
            | Record::RemoveAll { .. }
            | Record::Rename { .. }
            | Record::Grow { .. }
            | Record::Resize { .. }
            | Record::SetProperty { .. } => self.catalog.refresh_all_owed(),
            Record::Hold { .. } | Record::Release { .. } => {}
        }
    }

    /// Blocks that data can take of the pool when nothing else is in it than the catalog.
    pub(crate) fn data_capacity(&self) -> u64 {
        let slots = self.catalog.slot_count() + SNAPSHOT_GROUP_MAX;
        self.space.data_capacity(catalog_pages(slots))
    }

    /// Refuses a reserve that there is no space for.
    pub(crate) fn check_reserve(&self, entry: &CatalogEntry) -> Result<(), Error> {
        self.check_owed(
            self.catalog.owed_to_others(entry.id) + Catalog::would_owe(entry, false),
            || match self.catalog.full_path(entry.id) {
                Some(path) => format!("{path}: a reserve of {} bytes", entry.reserve_bytes),
                None => format!("a reserve of {} bytes", entry.reserve_bytes),
            },
        )
    }

    /// The same for a volume that maps nothing yet.
    pub(crate) fn check_new_reserve(&self, bytes: u64) -> Result<(), Error> {
        let owed = self.catalog.owed_blocks() + owed_blocks(bytes, 0);
        self.check_owed(owed, || format!("a reserve of {bytes} bytes"))
    }

    /// Refuses snapshots of volumes, each named once or more, that would leave too little for reserves, or for volumes
    /// that have none: right after it a volume can overwrite nothing in place.
    pub(crate) fn check_snapshots(&self, volumes: &[VolumeId]) -> Result<(), Error> {
        let forked: BTreeSet<VolumeId> = volumes.iter().copied().collect();
        let mut owed = self.catalog.owed_blocks();
        let mut reserving = None;
        let mut written = None;
        for id in forked {
            let entry = &self.catalog.get(id)?.entry;
            if entry.reserve_bytes > 0 {
                owed -= Catalog::would_owe(entry, false);
                owed += Catalog::would_owe(entry, true);
                reserving = Some(id);
            } else if entry.mapped_blocks > 0 {
                written = Some(id);
            }
        }
        let shown = |id| self.catalog.full_path(id).unwrap_or_default();
        if let Some(id) = reserving {
            self.check_owed(owed, || {
                format!("{}: a snapshot of a volume with a reserve", shown(id))
            })?;
        }
        if let Some(id) = written {
            self.check_redirects(owed, || shown(id))?;
        }
        Ok(())
    }

    /// Refuses a snapshot of a volume without a reserve where hardly anything is free for what is written afterwards.
    /// Blocks that only a checkpoint is missing for are as good as free.
    fn check_redirects(&self, owed: u64, subject: impl Fn() -> String) -> Result<(), Error> {
        let pending = self.space.pending_blocks() + self.space.kept_blocks();
        let free = self.space.free_for_data() + pending;
        let left = free.saturating_sub(owed);
        if left >= self.space.blocks() / SNAPSHOT_FREE_PART {
            return Ok(());
        }
        let message = format!(
            "{}: a snapshot makes each overwrite need new space, and {} bytes are free; remove something, or grow the pool",
            subject(),
            left * BLOCK_BYTES
        );
        Err(Error::with(ErrorKind::OutOfSpace, message))
    }

    fn check_owed(&self, owed: u64, subject: impl Fn() -> String) -> Result<(), Error> {
        let free = self.space.free_for_data();
        if owed <= free {
            return Ok(());
        }
        let (owed, free) = (owed.saturating_mul(BLOCK_BYTES), free * BLOCK_BYTES);
        let message = format!(
            "{}: {owed} bytes would have to be set aside, and {free} are free; remove something, or lower a reserve",
            subject()
        );
        Err(Error::with(ErrorKind::OutOfSpace, message))
    }

    /// Refuses a record that would map more than the volume's quota allows.
    pub(crate) fn check_quota(&self, record: &Record) -> Result<(), Fault> {
        let Record::Map {
            volume, lba, count, ..
        } = record
        else {
            return Ok(());
        };
        if !self.catalog.has_quotas() {
            return Ok(());
        }
        let entry = &self.catalog.get(*volume)?.entry;
        let Some(left) = quota_left(entry) else {
            return Ok(());
        };
        if left < *count && left < self.map.holes(entry.root, *lba, *count)? {
            return Err(self.over_quota(entry).into());
        }
        Ok(())
    }

    fn over_quota(&self, entry: &CatalogEntry) -> Error {
        let quota = entry.quota_bytes;
        let message = match self.catalog.full_path(entry.id) {
            Some(path) => {
                format!("{path}: its quota of {quota} bytes is used up; discard, or raise it")
            }
            None => format!("a quota of {quota} bytes is used up"),
        };
        Error::with(ErrorKind::OverQuota, message)
    }
}

/// How many more blocks a volume may map; none where it has no quota. A rollback may have taken it beyond its quota.
fn quota_left(entry: &CatalogEntry) -> Option<u64> {
    let quota = entry.quota_bytes / BLOCK_BYTES;
    (quota > 0).then(|| quota.saturating_sub(entry.mapped_blocks))
}
