//! Recovery: what the checkpoint does not cover, from the journal, then from the ring of a killed process, applied to
//! it: all of it, or, where metadata is damaged, all that can be.

mod read_ahead;
#[cfg(test)]
mod tests;

use super::open::RingPlace;
use crate::checkpoint::load;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::Role;
use crate::format::journal::{Framed, decode_framed};
use crate::format::map_page::span_blocks;
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::journal::{Ring, RingOwner, RingRecords, Tail, drop_cut_change, read_journal};
use crate::metadata::Metadata;
use crate::space::Fault;
use crate::units::{Extent, Lba, Seq, VolumeId};
use read_ahead::{read_changed, read_mapped};
use std::collections::{BTreeMap, BTreeSet};

/// What a checkpoint does not cover.
#[derive(Debug)]
pub(super) struct Unsaved {
    pub(super) records: Vec<Record>,
    /// The last of these as the ring has them, which the journal has not.
    pub(super) only_in_ring: RingRecords,
    /// The journal or the ring ends within a change, which is not among these.
    pub(super) is_cut: bool,
    pub(super) first: Seq,
    pub(super) next: Seq,
    pub(super) tail: Tail,
    /// Why records that were durable are missing behind these.
    pub(super) lost: Option<Error>,
    /// The first journal block number that nothing found on the device has.
    pub(super) beyond: u64,
}

/// What could not be applied.
#[derive(Debug, Default)]
pub(super) struct Unapplied {
    /// Records that lead to pages which cannot be read, by volume, and why for the first. Reading where they lead
    /// fails too.
    pub(super) unreadable: BTreeMap<VolumeId, (u64, Error)>,
    /// Volumes that are not as they should be, although they can be read.
    pub(super) withheld: BTreeSet<VolumeId>,
    /// Records about volumes that the lost part of the catalog held.
    pub(super) unknown: u64,
}

/// The checkpoint with everything applied that it does not cover.
pub(super) async fn load_current<D: Device>(
    device: &D,
    superblock: &Superblock,
    was_clean: bool,
    ring: &RingPlace,
    warnings: &mut Vec<String>,
) -> Result<(Metadata, Unsaved)> {
    let mut unsaved = read_unsaved(device, superblock, was_clean, ring, warnings).await?;
    if let Some(lost) = unsaved.lost.take() {
        return Err(lost);
    }
    let mut metadata = load(device, superblock).await?;
    replay(device, &mut metadata, &unsaved).await?;
    Ok((metadata, unsaved))
}

/// The records of the journal, then those that only the ring has.
pub(super) async fn read_unsaved<D: Device>(
    device: &D,
    superblock: &Superblock,
    was_clean: bool,
    place: &RingPlace,
    warnings: &mut Vec<String>,
) -> Result<Unsaved> {
    let read = read_journal(device, superblock, !was_clean).await?;
    let (mut framed, mut next, mut lost) = (read.records, read.next_seq, read.lost);
    let mut only_in_ring = RingRecords::new();
    if let RingPlace::File { path, boot_id } = place
        && superblock.boot_id == *boot_id
        && lost.is_none()
    {
        let owner = RingOwner {
            pool: superblock.id,
            boot_id: *boot_id,
            session: superblock.session,
        };
        match Ring::recover(path, owner)? {
            Some(records) => {
                for (seq, bytes) in records {
                    if seq < next {
                        continue;
                    }
                    if seq > next {
                        lost = Some(Error::corrupt(format!(
                            "{}: goes on at record {}, the journal ends before record {}",
                            path.display(),
                            seq.0,
                            next.0
                        )));
                        break;
                    }
                    framed.push(decode_framed(&bytes)?);
                    only_in_ring.push((seq, bytes));
                    next = next.next();
                }
            }
            None if superblock.session > 0 && !was_clean => warnings.push(format!(
                "{}: the shared ring of the last opening is not there; writes that it alone held are lost",
                path.display()
            )),
            None => {}
        }
    }
    let is_cut = drop_cut_change(&mut framed);
    Ok(Unsaved {
        only_in_ring,
        is_cut,
        records: framed
            .into_iter()
            .map(|Framed { record, .. }| record)
            .collect(),
        first: superblock.seq,
        next,
        tail: read.tail,
        lost,
        beyond: read.beyond,
    })
}

/// Applies what the checkpoint does not cover.
async fn replay<D: Device>(device: &D, metadata: &mut Metadata, unsaved: &Unsaved) -> Result<()> {
    // Blocks that the pool gained are named by the records behind.
    for record in &unsaved.records {
        if let Record::Grow { .. } = record {
            metadata
                .with_supply(device, |metadata| metadata.replay(record, unsaved.first))
                .await?;
        }
    }
    read_mapped(device, metadata, &unsaved.records).await;
    // Blocks that the journal maps were taken when it was written: pages that replay makes must not get them.
    for record in &unsaved.records {
        if let Record::Map { pba, count, .. } = record {
            let extent = Extent::new(*pba, *count);
            metadata
                .with_supply(device, |metadata| metadata.space.claim(extent))
                .await?;
        }
    }
    read_changed(device, metadata, &unsaved.records).await;
    let mut seq = unsaved.first;
    for record in &unsaved.records {
        metadata
            .with_supply(device, |metadata| metadata.replay(record, seq))
            .await?;
        seq = seq.next();
    }
    Ok(())
}

/// Applies what can be applied. `made_up`: volumes that only stand for lost ones.
pub(super) async fn replay_readable<D: Device>(
    device: &D,
    metadata: &mut Metadata,
    unsaved: &Unsaved,
    made_up: &BTreeSet<VolumeId>,
) -> Result<Unapplied> {
    let mut unapplied = Unapplied {
        withheld: made_up.clone(),
        ..Unapplied::default()
    };
    for record in &unsaved.records {
        if let Record::Grow { .. } = record {
            metadata
                .with_supply(device, |metadata| metadata.replay(record, unsaved.first))
                .await?;
        }
    }
    // Records that map what the pool does not have, or what has no count that can be read.
    let mut impossible = BTreeSet::new();
    for (index, record) in unsaved.records.iter().enumerate() {
        if let Record::Map {
            volume, pba, count, ..
        } = record
        {
            let extent = Extent::new(*pba, *count);
            let claimed = metadata.with_supply(device, |metadata| metadata.space.claim(extent));
            if claimed.await.is_err() {
                unapplied.withheld.insert(*volume);
                impossible.insert(index);
            }
        }
    }
    let mut seq = unsaved.first;
    for (index, record) in unsaved.records.iter().enumerate() {
        if !impossible.contains(&index) {
            apply_readable(device, metadata, record, seq, &mut unapplied).await;
        }
        seq = seq.next();
    }
    Ok(unapplied)
}

/// Applies a record, or notes why not.
async fn apply_readable<D: Device>(
    device: &D,
    metadata: &mut Metadata,
    record: &Record,
    seq: Seq,
    unapplied: &mut Unapplied,
) {
    if let Record::RemoveAll { ids } = record {
        // What can be removed is.
        for id in ids {
            let one = Record::Remove { id: *id };
            Box::pin(apply_readable(device, metadata, &one, seq, unapplied)).await;
        }
        return;
    }
    let Record::Unmap { volume, lba, count } = record else {
        let applied = metadata.with_supply(device, |metadata| metadata.replay(record, seq));
        if let Err(error) = applied.await {
            let at = if let Record::Map { lba, .. } = record {
                Some(*lba)
            } else {
                None
            };
            note(device, metadata, subject(record), at, error, unapplied).await;
        }
        // What is made of something that is not as it should be is not either.
        if let Some((from, to)) = copied(record)
            && unapplied.withheld.contains(&from)
        {
            unapplied.withheld.insert(to);
        }
        return;
    };
    // What can be unmapped on both sides of a page that cannot be read is unmapped.
    let (mut at, end) = (*lba, lba.plus(*count));
    while at < end {
        let rest = Record::Unmap {
            volume: *volume,
            lba: at,
            count: end.0 - at.0,
        };
        let mut reached = at;
        let step = metadata.with_supply(device, |metadata| {
            let next = metadata.replay_step(&rest, seq)?;
            reached = next.unwrap_or(end);
            Ok::<_, Fault>(())
        });
        let step = step.await;
        match step {
            Ok(()) => at = reached.max(at.plus(1)),
            Err(error) => {
                let after = note(device, metadata, *volume, Some(at), error, unapplied).await;
                at = after.unwrap_or(end);
            }
        }
    }
}

/// Of a record that copies: from which volume or snapshot, to which.
fn copied(record: &Record) -> Option<(VolumeId, VolumeId)> {
    if let Record::Snapshot { volume, id, .. } = record {
        Some((*volume, *id))
    } else if let Record::Clone { snapshot, id, .. } = record {
        Some((*snapshot, *id))
    } else if let Record::Rollback {
        snapshot, volume, ..
    } = record
    {
        Some((*snapshot, *volume))
    } else {
        None
    }
}

/// The volume that a record changes; a hold is none, and nothing of its snapshot.
fn subject(record: &Record) -> VolumeId {
    match record {
        Record::Map { volume, .. }
        | Record::Unmap { volume, .. }
        | Record::Snapshot { volume, .. }
        | Record::Rollback { volume, .. } => *volume,
        Record::Create { id, .. }
        | Record::Clone { id, .. }
        | Record::Remove { id }
        | Record::Rename { id, .. }
        | Record::Resize { id, .. }
        | Record::Hold { id, .. }
        | Record::Release { id }
        | Record::SetProperty { id, .. } => *id,
        Record::Grow { .. } | Record::RemoveAll { .. } => VolumeId(0),
    }
}

/// Notes that a record of `volume` could not be applied, at `at` if it is about blocks. Where the reason is a page that
/// cannot be read, whoever reads there is told the same, so that nothing more is needed; the block after that page.
async fn note<D: Device>(
    device: &D,
    metadata: &mut Metadata,
    volume: VolumeId,
    at: Option<Lba>,
    error: Error,
    unapplied: &mut Unapplied,
) -> Option<Lba> {
    let Ok(found) = metadata.catalog.get(volume) else {
        unapplied.unknown += 1;
        return None;
    };
    let root = found.entry.root;
    if let Some(at) = at {
        for level in (0..=root.level).rev() {
            let readable = metadata.with_supply(device, |metadata| {
                match metadata.map.page_at(root, at, level)? {
                    Some(ptr) => metadata.map.page(ptr, level).map(drop),
                    None => Ok(()),
                }
            });
            if readable.await.is_err() {
                let lost = unapplied.unreadable.entry(volume).or_insert((0, error));
                lost.0 += 1;
                let span = span_blocks(level);
                return Some(Lba((at.0 / span + 1) * span));
            }
        }
    }
    unapplied.withheld.insert(volume);
    None
}

impl Unapplied {
    /// Whether reading failed for another reason than damage, so that a later attempt may succeed.
    pub(super) fn may_be_readable_later(&self) -> bool {
        let mut errors = self.unreadable.values().map(|(_, error)| error);
        errors.any(|error| error.kind() != ErrorKind::Corrupt)
    }
}

/// All volumes, without snapshots.
pub(super) fn volumes(metadata: &Metadata) -> BTreeSet<VolumeId> {
    let is_volume = |role: &Role| matches!(role, Role::Volume { .. });
    let entries = metadata.catalog.entries();
    entries
        .into_iter()
        .filter(|entry| is_volume(&entry.role))
        .map(|entry| entry.id)
        .collect()
}
