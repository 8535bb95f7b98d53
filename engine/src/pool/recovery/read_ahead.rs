//! Reading ahead: what the records of a journal lead to is read many pages at a time, before the records are applied one
//! by one. It is advice: what is not read here is read when it is needed, and damage is found then.

use crate::device::Device;
use crate::format::layout::REGION_BLOCKS;
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::record::Record;
use crate::metadata::Metadata;
use crate::space::{Fault, Missing};
use crate::units::{Lba, VolumeId};
use rustc_hash::FxHashSet;
use std::collections::{BTreeMap, BTreeSet};

/// From a root to the counts of what a leaf maps, and some more for leaves that are copied.
const ROUNDS_MAX: usize = 12;

/// Reads the counts of the blocks that the records map.
pub(super) async fn read_mapped<D: Device>(
    device: &D,
    metadata: &mut Metadata,
    records: &[Record],
) {
    let mut regions = BTreeSet::new();
    for record in records {
        if let Record::Map { pba, count, .. } = record {
            let last = pba.0.saturating_add(count.saturating_sub(1));
            regions.extend([pba.0 / REGION_BLOCKS, last / REGION_BLOCKS]);
        }
    }
    let is_missing = |region: &u64| !metadata.space.has_region(*region);
    let missing: Vec<_> = regions
        .into_iter()
        .filter(is_missing)
        .map(Missing::Counts)
        .collect();
    metadata.supply_all(device, &missing).await;
}

/// Reads what preparing the records meets. The blocks that they map are claimed.
pub(super) async fn read_changed<D: Device>(
    device: &D,
    metadata: &mut Metadata,
    records: &[Record],
) {
    let mut seen = FxHashSet::default();
    let mut left: Vec<&Record> = records
        .iter()
        .filter(|record| leaf(record).is_none_or(|leaf| seen.insert(leaf)))
        .collect();
    for _ in 0..ROUNDS_MAX {
        let mut missing = BTreeMap::new();
        left.retain(|record| match metadata.prepare(record) {
            Err(Fault::Missing(found)) => {
                missing.insert(place(found), found);
                true
            }
            Ok(_) | Err(Fault::Error(_)) => false,
        });
        if missing.is_empty() {
            return;
        }
        let missing: Vec<_> = missing.into_values().collect();
        metadata.supply_all(device, &missing).await;
    }
}

/// The leaf that a record changes first.
fn leaf(record: &Record) -> Option<(VolumeId, u64)> {
    let (Record::Map { volume, lba, .. } | Record::Unmap { volume, lba, .. }) = record else {
        return None;
    };
    let Lba(at) = *lba;
    Some((*volume, at / LEAF_ENTRIES as u64))
}

/// What tells one missing thing from another, in the order of the device.
fn place(missing: Missing) -> (bool, u64) {
    match missing {
        Missing::Counts(region) => (false, region),
        Missing::Page(ptr, _) => (true, ptr.pba.0),
    }
}
