//! The volumes, snapshots, removed trees and holds of a pool, in memory; which catalog page each stands in, and which
//! of those pages changed.

use super::kin::{Counting, KinTree};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{CatalogEntry, Role, SLOTS_PER_PAGE};
use crate::format::map_page::LEAF_ENTRIES;
use crate::format::record::Property;
use crate::limits::{SNAPSHOT_GROUP_MAX, VOLUMES_MAX};
use crate::name::{Name, VolumePath};
use crate::units::{BLOCK_BYTES, Lba, Pba, Seq, VolumeId};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// A volume, a snapshot, a removed tree or a hold.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    pub(crate) entry: CatalogEntry,
    slot: usize,
    /// Where its next newly allocated block is looked for first.
    pub(crate) goal: Pba,
    /// For a removed tree: nothing of it is returned before this record is durable.
    pub(crate) removed_at: Seq,
    pub(super) counting: Counting,
    /// Of a removed tree: blocks that it mapped and that its cursor has passed, as far as that is known.
    passed: u64,
}

impl Volume {
    /// Blocks that a removed tree still maps, at most: what its cursor has passed is gone, and what it shares below
    /// inner pages is passed without being counted.
    fn backlog(&self) -> u64 {
        match self.entry.role {
            Role::Reclaiming { cursor } => {
                let beyond = self.entry.bytes.div_ceil(BLOCK_BYTES);
                let beyond = beyond.saturating_sub(cursor.0);
                let left = self.entry.mapped_blocks.saturating_sub(self.passed);
                left.min(beyond)
            }
            Role::Volume { .. } | Role::Snapshot { .. } | Role::Hold { .. } => 0,
        }
    }
}

/// All volumes, snapshots, removed trees and holds.
#[derive(Debug)]
pub(crate) struct Catalog {
    /// The pool's name, for messages.
    pool: Name,
    volumes: FxHashMap<VolumeId, Volume>,
    by_name: BTreeMap<Name, VolumeId>,
    /// By volume, then by name.
    snapshots: BTreeMap<(VolumeId, Name), VolumeId>,
    reclaiming: BTreeSet<VolumeId>,
    /// By snapshot, then by tag.
    holds: BTreeMap<(VolumeId, Name), VolumeId>,
    /// What all of these still map, at most.
    backlog_blocks: u64,
    /// Volumes with a quota.
    limited: BTreeSet<VolumeId>,
    /// Volumes with a reserve, and how many blocks each may still need of it.
    owed: BTreeMap<VolumeId, u64>,
    /// All of those together.
    owed_blocks: u64,
    slots: Vec<Option<VolumeId>>,
    free_slots: BTreeSet<usize>,
    dirty_pages: BTreeSet<usize>,
    next_id: u64,
    pub(super) kin: KinTree,
}

impl Catalog {
    pub(crate) fn new(pool: Name, next_id: u64) -> Self {
        Self {
            pool,
            volumes: FxHashMap::default(),
            by_name: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            reclaiming: BTreeSet::new(),
            holds: BTreeMap::new(),
            backlog_blocks: 0,
            limited: BTreeSet::new(),
            owed: BTreeMap::new(),
            owed_blocks: 0,
            slots: Vec::new(),
            free_slots: BTreeSet::new(),
            dirty_pages: BTreeSet::new(),
            next_id: next_id.max(1),
            kin: KinTree::default(),
        }
    }

    /// The number for the next volume, snapshot or hold.
    pub(crate) fn next_id(&self) -> VolumeId {
        VolumeId(self.next_id)
    }

    /// How many slots there are, occupied or not.
    pub(crate) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn get(&self, id: VolumeId) -> Result<&Volume> {
        self.volumes.get(&id).ok_or_else(|| no_such(id))
    }

    /// The volume, its slot marked as changed.
    pub(crate) fn get_mut(&mut self, id: VolumeId) -> Result<&mut Volume> {
        let volume = self.volumes.get_mut(&id).ok_or_else(|| no_such(id))?;
        self.dirty_pages.insert(volume.slot / SLOTS_PER_PAGE);
        Ok(volume)
    }

    /// The volume, for what is not on disk.
    pub(crate) fn get_unsaved(&mut self, id: VolumeId) -> Option<&mut Volume> {
        self.volumes.get_mut(&id)
    }

    /// The volume or snapshot that `path` names.
    pub(crate) fn find(&self, path: &VolumePath) -> Result<&Volume> {
        let missing = |what: &str| {
            Error::with(
                ErrorKind::NotFound,
                format!("{}/{path}: no such {what}", self.pool),
            )
        };
        let volume = self
            .by_name
            .get(&path.volume)
            .ok_or_else(|| missing("volume"))?;
        let id = match &path.snapshot {
            None => volume,
            Some(name) => self
                .snapshots
                .get(&(*volume, name.clone()))
                .ok_or_else(|| missing("snapshot"))?,
        };
        self.get(*id)
    }

    /// The number of what `path` names, if there is such a thing.
    pub(crate) fn id_of(&self, path: &VolumePath) -> Option<VolumeId> {
        self.find(path).ok().map(|found| found.entry.id)
    }

    /// What names a volume or snapshot; none for a removed tree or a hold.
    pub(crate) fn path(&self, id: VolumeId) -> Option<VolumePath> {
        match &self.volumes.get(&id)?.entry.role {
            Role::Volume { name, .. } => Some(VolumePath {
                volume: name.clone(),
                snapshot: None,
            }),
            Role::Snapshot { name, volume } => match &self.volumes.get(volume)?.entry.role {
                Role::Volume { name: of, .. } => Some(VolumePath {
                    volume: of.clone(),
                    snapshot: Some(name.clone()),
                }),
                Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => None,
            },
            Role::Reclaiming { .. } | Role::Hold { .. } => None,
        }
    }

    /// The same with the pool's name before it, for messages.
    pub(crate) fn full_path(&self, id: VolumeId) -> Option<String> {
        self.path(id).map(|path| format!("{}/{path}", self.pool))
    }

    /// Volumes by name.
    pub(crate) fn volume_ids(&self) -> impl Iterator<Item = VolumeId> {
        self.by_name.values().copied()
    }

    /// A volume's snapshots, oldest first.
    pub(crate) fn snapshot_ids(&self, volume: VolumeId) -> Vec<VolumeId> {
        let mut ids: Vec<VolumeId> = self
            .snapshots
            .range((volume, Name::first())..)
            .take_while(|((of, _), _)| *of == volume)
            .map(|(_, id)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// A snapshot's holds, by tag.
    pub(crate) fn holds(&self, snapshot: VolumeId) -> impl Iterator<Item = (&Name, VolumeId)> {
        self.holds
            .range((snapshot, Name::first())..)
            .take_while(move |((of, _), _)| *of == snapshot)
            .map(|((_, tag), id)| (tag, *id))
    }

    /// The hold on a snapshot that has this tag.
    pub(crate) fn hold(&self, snapshot: VolumeId, tag: &Name) -> Option<VolumeId> {
        self.holds.get(&(snapshot, tag.clone())).copied()
    }

    /// Holds on what is no snapshot, and why each is one.
    pub(crate) fn stray_holds(&self) -> Vec<(VolumeId, Error)> {
        let strays = self.holds.iter().filter(|((snapshot, _), _)| {
            let found = self.volumes.get(snapshot).map(|found| &found.entry.role);
            !matches!(found, Some(Role::Snapshot { .. }))
        });
        let told = |((snapshot, tag), id): (&(VolumeId, Name), &VolumeId)| {
            let fact = format!(
                "hold {tag}: is on number {}, which is no snapshot",
                snapshot.0
            );
            (*id, Error::corrupt(fact))
        };
        strays.map(told).collect()
    }

    /// Removed trees whose space is not all returned.
    pub(crate) fn reclaiming(&self) -> &BTreeSet<VolumeId> {
        &self.reclaiming
    }

    /// Blocks that removed trees still map, at most.
    pub(crate) fn backlog_blocks(&self) -> u64 {
        self.backlog_blocks
    }

    /// Blocks that this removed tree still maps, at most; none for anything else.
    pub(crate) fn backlog_of(&self, id: VolumeId) -> u64 {
        self.volumes.get(&id).map_or(0, Volume::backlog)
    }

    /// Moves the cursor of a removed tree on, past so many blocks that it mapped.
    pub(crate) fn advance_cursor(&mut self, id: VolumeId, cursor: Lba, passed: u64) -> Result<()> {
        let before = self.backlog_of(id);
        let volume = self.get_mut(id)?;
        volume.entry.role = Role::Reclaiming { cursor };
        volume.passed += passed;
        let after = volume.backlog();
        self.backlog_blocks = (self.backlog_blocks + after).saturating_sub(before);
        Ok(())
    }

    /// Whether any volume has a quota.
    pub(crate) fn has_quotas(&self) -> bool {
        !self.limited.is_empty()
    }

    pub(crate) fn volume_count(&self) -> usize {
        self.by_name.len()
    }

    pub(crate) fn snapshot_count(&self) -> usize {
        self.snapshots.len()
    }

    /// Whether something with this role could be added or take this name.
    pub(crate) fn check_name(&self, role: &Role) -> Result<()> {
        let taken = match role {
            Role::Volume { name, .. } => self.by_name.contains_key(name).then(|| name.to_string()),
            Role::Snapshot { name, volume } => {
                let owner = self
                    .path(*volume)
                    .map_or_else(String::new, |path| path.to_string());
                let taken = self.snapshots.contains_key(&(*volume, name.clone()));
                taken.then(|| format!("{owner}@{name}"))
            }
            Role::Reclaiming { .. } => None,
            Role::Hold { snapshot, tag } => {
                if self.hold(*snapshot, tag).is_none() {
                    return Ok(());
                }
                let held = self
                    .path(*snapshot)
                    .map_or_else(String::new, |path| path.to_string());
                return Err(Error::with(
                    ErrorKind::AlreadyExists,
                    format!("{}/{held}: has a hold {tag} already", self.pool),
                ));
            }
        };
        match taken {
            Some(name) => Err(Error::with(
                ErrorKind::AlreadyExists,
                format!("{}/{name}: exists already", self.pool),
            )),
            None => Ok(()),
        }
    }

    /// Whether there is room for another entry.
    pub(crate) fn check_room(&self) -> Result<()> {
        if self.volumes.len() + SNAPSHOT_GROUP_MAX >= VOLUMES_MAX {
            let message = format!(
                "the pool has {VOLUMES_MAX} volumes, snapshots and holds, which is the most; remove some"
            );
            return Err(Error::with(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    /// Adds an entry in a free slot.
    pub(crate) fn insert(&mut self, entry: CatalogEntry, removed_at: Seq) {
        let slot = self.free_slots.pop_first().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.dirty_pages.insert(slot / SLOTS_PER_PAGE);
        self.place(entry, slot, removed_at);
    }

    /// Adds what a catalog page holds in a slot; slots come in ascending order, without gaps.
    pub(crate) fn insert_loaded(&mut self, entry: Option<CatalogEntry>) -> Result<()> {
        let slot = self.slots.len();
        self.slots.push(None);
        let Some(entry) = entry else {
            self.free_slots.insert(slot);
            return Ok(());
        };
        let is_double =
            self.volumes.contains_key(&entry.id) || self.check_name(&entry.role).is_err();
        if is_double || entry.id.0 >= self.next_id {
            return Err(Error::corrupt(format!(
                "catalog: number {} stands twice or is too high",
                entry.id.0
            )));
        }
        self.place(entry, slot, Seq(0));
        Ok(())
    }

    /// Gives a volume a limit, in bytes; 0 takes it away.
    pub(crate) fn set_limit(&mut self, id: VolumeId, property: Property, bytes: u64) -> Result<()> {
        let entry = &mut self.get_mut(id)?.entry;
        match property {
            Property::Quota => entry.quota_bytes = bytes,
            Property::Reserve => entry.reserve_bytes = bytes,
        }
        let (has_quota, has_reserve) = (entry.quota_bytes > 0, entry.reserve_bytes > 0);
        self.note_limits(id, has_quota, has_reserve);
        Ok(())
    }

    fn note_limits(&mut self, id: VolumeId, has_quota: bool, has_reserve: bool) {
        if has_quota {
            self.limited.insert(id);
        } else {
            self.limited.remove(&id);
        }
        if has_reserve {
            self.owed.entry(id).or_insert(0);
        } else {
            self.owed_blocks -= self.owed.remove(&id).unwrap_or(0);
        }
    }

    /// The volume is as that snapshot was.
    pub(crate) fn set_origin(&mut self, id: VolumeId, snapshot: VolumeId) -> Result<()> {
        if let Role::Volume { origin, .. } = &mut self.get_mut(id)?.entry.role {
            *origin = Some(snapshot);
        }
        Ok(())
    }

    /// Whether any volume has a reserve.
    pub(crate) fn has_reserves(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Blocks that the others may still need of their reserves.
    pub(crate) fn owed_to_others(&self, id: VolumeId) -> u64 {
        self.owed_blocks - self.owed.get(&id).unwrap_or(&0)
    }

    /// Blocks that all volumes may still need of their reserves.
    pub(crate) fn owed_blocks(&self) -> u64 {
        self.owed_blocks
    }

    /// Looks again at what a volume may still need of its reserve.
    pub(crate) fn refresh_owed(&mut self, id: VolumeId) {
        let Some(entry) = self.volumes.get(&id).map(|volume| &volume.entry) else {
            return;
        };
        let blocks = owed(entry, entry.kin.own.data);
        if let Some(before) = self.owed.get_mut(&id) {
            self.owed_blocks = self.owed_blocks - *before + blocks;
            *before = blocks;
        }
    }

    /// The same for all volumes.
    pub(crate) fn refresh_all_owed(&mut self) {
        let ids: Vec<VolumeId> = self.owed.keys().copied().collect();
        for id in ids {
            self.refresh_owed(id);
        }
    }

    /// What the volume would be owed with other limits and, `is_shared`, right after a snapshot.
    pub(crate) fn would_owe(entry: &CatalogEntry, is_shared: bool) -> u64 {
        owed(entry, if is_shared { 0 } else { entry.kin.own.data })
    }

    fn place(&mut self, entry: CatalogEntry, slot: usize, removed_at: Seq) {
        let id = entry.id;
        self.note_limits(id, entry.quota_bytes > 0, entry.reserve_bytes > 0);
        self.slots[slot] = Some(id);
        self.next_id = self.next_id.max(id.0 + 1);
        self.kin.add(&entry);
        match &entry.role {
            Role::Volume { name, .. } => {
                self.by_name.insert(name.clone(), id);
            }
            Role::Snapshot { name, volume } => {
                self.snapshots.insert((*volume, name.clone()), id);
            }
            Role::Reclaiming { .. } => {
                self.reclaiming.insert(id);
            }
            Role::Hold { snapshot, tag } => {
                self.holds.insert((*snapshot, tag.clone()), id);
            }
        }
        let volume = Volume {
            entry,
            slot,
            goal: Pba(0),
            removed_at,
            counting: Counting::default(),
            passed: 0,
        };
        self.backlog_blocks += volume.backlog();
        self.volumes.insert(id, volume);
    }

    fn unname(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get(&id) {
            self.kin.remove(&volume.entry);
        }
        self.backlog_blocks = self.backlog_blocks.saturating_sub(self.backlog_of(id));
        match self.volumes.get(&id).map(|volume| &volume.entry.role) {
            Some(Role::Volume { name, .. }) => {
                self.by_name.remove(name);
            }
            Some(Role::Snapshot { name, volume }) => {
                self.snapshots.remove(&(*volume, name.clone()));
            }
            Some(Role::Reclaiming { .. }) => {
                self.reclaiming.remove(&id);
            }
            Some(Role::Hold { snapshot, tag }) => {
                self.holds.remove(&(*snapshot, tag.clone()));
            }
            None => {}
        }
    }

    /// Gives an entry another role: another name, or being reclaimed.
    pub(crate) fn set_role(&mut self, id: VolumeId, role: Role, removed_at: Seq) {
        self.unname(id);
        if let Some(mut volume) = self.volumes.remove(&id) {
            self.dirty_pages.insert(volume.slot / SLOTS_PER_PAGE);
            if let Role::Reclaiming { .. } = role {
                (volume.entry.quota_bytes, volume.entry.reserve_bytes) = (0, 0);
            }
            volume.entry.role = role;
            let slot = volume.slot;
            self.place(volume.entry, slot, removed_at);
        }
    }

    /// Removes an entry that has no space, or none left to return.
    pub(crate) fn remove(&mut self, id: VolumeId) {
        self.unname(id);
        self.note_limits(id, false, false);
        if let Some(volume) = self.volumes.remove(&id) {
            self.slots[volume.slot] = None;
            self.free_slots.insert(volume.slot);
            self.dirty_pages.insert(volume.slot / SLOTS_PER_PAGE);
        }
        // Slots at the end go, so that an emptied catalog takes no pages.
        while self.slots.last().is_some_and(Option::is_none) {
            self.slots.pop();
            self.free_slots.remove(&self.slots.len());
        }
    }

    /// Catalog pages that changed since they were last taken.
    pub(crate) fn dirty_pages(&self) -> &BTreeSet<usize> {
        &self.dirty_pages
    }

    /// The same, taken.
    pub(crate) fn take_dirty_pages(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.dirty_pages)
    }

    /// The slots of a catalog page.
    pub(crate) fn page_slots(&self, page: usize) -> impl Iterator<Item = Option<&CatalogEntry>> {
        let first = page * SLOTS_PER_PAGE;
        (first..first + SLOTS_PER_PAGE).map(|slot| {
            let id = self.slots.get(slot).copied().flatten()?;
            self.volumes.get(&id).map(|volume| &volume.entry)
        })
    }

    /// All entries, by number.
    pub(crate) fn entries(&self) -> Vec<&CatalogEntry> {
        let mut entries: Vec<&CatalogEntry> =
            self.volumes.values().map(|volume| &volume.entry).collect();
        entries.sort_by_key(|entry| entry.id);
        entries
    }
}

/// Blocks that a volume may still need of its reserve: what it cannot overwrite in place, with the leaves of its map if
/// that is written in order. No more than the volume holds is ever needed.
fn owed(entry: &CatalogEntry, alone_blocks: u64) -> u64 {
    owed_blocks(entry.reserve_bytes.min(entry.bytes), alone_blocks)
}

/// The same of a reserve of so many bytes.
pub(super) fn owed_blocks(reserve_bytes: u64, alone_blocks: u64) -> u64 {
    let need = reserve_bytes
        .div_ceil(BLOCK_BYTES)
        .saturating_sub(alone_blocks);
    need + need.div_ceil(LEAF_ENTRIES as u64 / 2)
}

fn no_such(id: VolumeId) -> Error {
    Error::with(
        ErrorKind::NotFound,
        format!("volume number {}: no such volume", id.0),
    )
}
