//! All metadata of an open pool: space, maps and catalog, and the one way to change them: a record is *prepared*,
//! which may find something missing and changes nothing, then *applied*, which cannot fail. Live changes and replay
//! go the same way.

mod catalog;
mod kin;
mod limits;
#[cfg(test)]
mod tests;

pub(crate) use catalog::Catalog;

use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{CatalogEntry, Kin, Role, Root, level_sizes};
use crate::format::map_page::level_for;
use crate::format::page::PagePtr;
use crate::format::record::Record;
use crate::limits::{CHECKPOINT_PAGES_MAX, SNAPSHOT_GROUP_MAX};
use crate::map::{MapStore, ReclaimStep, UnmapStep};
use crate::space::{Fault, SpaceMap, Tally};
use crate::units::{BLOCK_BYTES, Extent, Lba, MetadataId, PoolId, Seq, Timestamp, VolumeId};

/// Where the catalog's pages stand: the pages themselves, then each index level above them.
pub(crate) type CatalogPlaces = Vec<Vec<Option<PagePtr>>>;

/// The metadata of an open pool.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) id: PoolId,
    pub(crate) page_id: MetadataId,
    pub(crate) space: SpaceMap,
    pub(crate) map: MapStore,
    pub(crate) catalog: Catalog,
    pub(crate) catalog_places: CatalogPlaces,
}

/// What preparing a record found, for applying it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Prepared {
    /// All of it can be applied.
    Whole,
    /// The same of blocks that are mapped elsewhere: in this leaf as it is, if any.
    Remap(Option<PagePtr>),
    /// An unmap goes step by step; this is its next one.
    Unmap(UnmapStep),
}

/// Pages of a catalog with so many slots, those of its index included.
fn catalog_pages(slots: usize) -> u64 {
    level_sizes(slots).sum::<usize>() as u64
}

/// Blocks of a volume of so many bytes; a last partial block counts.
pub(crate) fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

impl Metadata {
    /// Looks at all that `record` touches; nothing is changed but what is set aside for pages.
    pub(crate) fn prepare(&mut self, record: &Record) -> Result<Prepared, Fault> {
        // The next checkpoint may have to write every catalog page, and those of a group of new entries.
        let slots = self.catalog.slot_count() + SNAPSHOT_GROUP_MAX;
        self.space.keep_back(catalog_pages(slots));
        match record {
            Record::Map {
                volume, lba, count, ..
            } => {
                let entry = self.writable(*volume)?;
                in_range(entry, *lba, *count)?;
                let root = entry.root;
                let leaf = self
                    .map
                    .prepare_remap(root, *lba, *count, &mut self.space)?;
                return Ok(Prepared::Remap(leaf));
            }
            Record::Unmap { volume, lba, count } => {
                let entry = self.writable(*volume)?;
                in_range(entry, *lba, *count)?;
                let root = entry.root;
                let step = self
                    .map
                    .prepare_unmap(root, *lba, lba.plus(*count), &mut self.space)?;
                return Ok(Prepared::Unmap(step));
            }
            Record::Create { id, name, .. } => {
                let role = Role::Volume {
                    name: name.clone(),
                    origin: None,
                };
                self.check_new(*id, &role)?;
            }
            Record::Snapshot {
                volume, id, name, ..
            } => {
                let role = Role::Snapshot {
                    name: name.clone(),
                    volume: *volume,
                };
                self.check_new(*id, &role)?;
                let root = self.writable(*volume)?.root;
                self.prepare_fork(root)?;
            }
            Record::Clone {
                snapshot, id, name, ..
            } => {
                let role = Role::Volume {
                    name: name.clone(),
                    origin: Some(*snapshot),
                };
                self.check_new(*id, &role)?;
                let root = self.snapshot(*snapshot)?.root;
                self.prepare_fork(root)?;
            }
            Record::Rollback {
                volume,
                snapshot,
                reclaim,
            } => {
                self.check_new(*reclaim, &Role::Reclaiming { cursor: Lba(0) })?;
                self.writable(*volume)?;
                let root = self.snapshot(*snapshot)?.root;
                self.prepare_fork(root)?;
            }
            Record::Remove { id } => self.removable(*id)?,
            Record::RemoveAll { ids } => ids.iter().try_for_each(|id| self.removable(*id))?,
            Record::Rename { id, name } => {
                let role = self.renamed(*id, name)?;
                self.catalog.check_name(&role)?;
            }
            Record::Grow { .. } => self.space.prepare_grow()?,
            Record::Resize { id, bytes } => {
                let root = self.writable(*id)?.root;
                let level = level_for(blocks_of(*bytes));
                if level > root.level {
                    self.map.prepare_raise(root, level, &mut self.space)?;
                }
            }
            Record::Hold {
                snapshot, id, tag, ..
            } => {
                self.snapshot(*snapshot)?;
                let role = Role::Hold {
                    snapshot: *snapshot,
                    tag: tag.clone(),
                };
                self.check_new(*id, &role)?;
            }
            Record::Release { id } => match self.catalog.get(*id)?.entry.role {
                Role::Hold { .. } => {}
                Role::Volume { .. } | Role::Snapshot { .. } | Role::Reclaiming { .. } => {
                    return Err(Error::corrupt("what is no hold is released").into());
                }
            },
            Record::SetProperty { id, .. } => {
                self.writable(*id)?;
            }
        }
        Ok(Prepared::Whole)
    }

    /// Whoever removes something has looked for its holds, so one that is there now is damage.
    fn removable(&self, id: VolumeId) -> Result<()> {
        let fact = match self.catalog.get(id)?.entry.role {
            Role::Reclaiming { .. } => "a removed volume is removed again",
            Role::Hold { .. } => "a hold is removed as a volume is",
            Role::Snapshot { .. } if self.catalog.holds(id).next().is_some() => {
                "a snapshot is removed that is held"
            }
            Role::Volume { .. } | Role::Snapshot { .. } => return Ok(()),
        };
        Err(Error::corrupt(fact))
    }

    /// Where an entry is added, the next checkpoint has room for its page.
    fn check_room(&self) -> Result<(), Fault> {
        self.catalog.check_room()?;
        self.space.require(catalog_pages(
            self.catalog.slot_count() + SNAPSHOT_GROUP_MAX,
        ))
    }

    fn writable(&self, id: VolumeId) -> Result<&CatalogEntry> {
        let entry = &self.catalog.get(id)?.entry;
        match entry.role {
            Role::Volume { .. } => Ok(entry),
            Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => {
                Err(Error::new(ErrorKind::ReadOnly))
            }
        }
    }

    fn snapshot(&self, id: VolumeId) -> Result<&CatalogEntry> {
        let entry = &self.catalog.get(id)?.entry;
        match entry.role {
            Role::Snapshot { .. } => Ok(entry),
            Role::Volume { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => Err(Error::with(
                ErrorKind::Invalid,
                format!("number {} is not a snapshot", id.0),
            )),
        }
    }

    fn renamed(&self, id: VolumeId, name: &crate::name::Name) -> Result<Role> {
        Ok(match &self.catalog.get(id)?.entry.role {
            Role::Volume { origin, .. } => Role::Volume {
                name: name.clone(),
                origin: *origin,
            },
            Role::Snapshot { volume, .. } => Role::Snapshot {
                name: name.clone(),
                volume: *volume,
            },
            Role::Reclaiming { .. } => return Err(Error::corrupt("a removed volume is renamed")),
            Role::Hold { .. } => return Err(Error::corrupt("a hold is renamed")),
        })
    }

    fn check_new(&self, id: VolumeId, role: &Role) -> Result<(), Fault> {
        if id < self.catalog.next_id() {
            return Err(Error::corrupt(format!("number {} is given a second time", id.0)).into());
        }
        self.check_room()?;
        Ok(self.catalog.check_name(role)?)
    }

    fn prepare_fork(&self, root: Root) -> Result<(), Fault> {
        if let Some(ptr) = root.ptr {
            self.space.referenced(ptr.pba)?;
        }
        Ok(())
    }

    /// Applies a prepared record, whose number is `seq`.
    pub(crate) fn apply(&mut self, record: &Record, prepared: Prepared, seq: Seq) -> Result<()> {
        let before = self.space.tally();
        match record {
            Record::Map {
                volume,
                lba,
                pba,
                count,
            } => {
                let leaf = match prepared {
                    Prepared::Remap(leaf) => leaf,
                    Prepared::Whole | Prepared::Unmap(_) => None,
                };
                self.remap(*volume, *lba, Extent::new(*pba, *count), leaf, seq)?;
            }
            Record::Unmap { volume, .. } => {
                let Prepared::Unmap(step) = prepared else {
                    return Ok(());
                };
                let id = *volume;
                let volume = self.catalog.get_mut(id)?;
                self.map
                    .unmap(&mut volume.entry.root, step, seq, &mut self.space);
                self.note_change(id, before);
            }
            Record::Create {
                id,
                name,
                bytes,
                sector_bytes,
                redirects_always,
                created,
            } => {
                let role = Role::Volume {
                    name: name.clone(),
                    origin: None,
                };
                let mut entry = empty_volume(*id, role, *bytes, *created);
                entry.sector_bytes = *sector_bytes;
                entry.redirects_always = *redirects_always;
                self.catalog.insert(entry, seq);
            }
            Record::Snapshot {
                volume: from,
                id,
                name,
                created,
            } => {
                let role = Role::Snapshot {
                    name: name.clone(),
                    volume: *from,
                };
                self.fork(*from, *id, role, *created, seq)?;
            }
            Record::Clone {
                snapshot: from,
                id,
                name,
                created,
            } => {
                let role = Role::Volume {
                    name: name.clone(),
                    origin: Some(*from),
                };
                self.fork(*from, *id, role, *created, seq)?;
            }
            Record::Rollback {
                volume,
                snapshot,
                reclaim,
            } => {
                self.roll_back(*volume, *snapshot, *reclaim, seq)?;
            }
            Record::Remove { id } => self.remove(*id, seq),
            Record::RemoveAll { ids } => ids.iter().for_each(|id| self.remove(*id, seq)),
            Record::Rename { id, name } => {
                let role = self.renamed(*id, name)?;
                self.catalog.set_role(*id, role, seq);
            }
            Record::Grow { blocks } => self.space.grow(*blocks),
            Record::Resize { id, bytes } => {
                let entry = &mut self.catalog.get_mut(*id)?.entry;
                entry.bytes = *bytes;
                let level = level_for(blocks_of(*bytes));
                self.map.raise(&mut entry.root, level, &mut self.space);
                self.note_change(*id, before);
            }
            Record::Hold { .. } | Record::Release { .. } => self.apply_to_holds(record, seq),
            Record::SetProperty {
                id,
                property,
                value,
            } => self.catalog.set_limit(*id, *property, *value)?,
        }
        self.refresh_owed(record);
        Ok(())
    }

    fn remove(&mut self, id: VolumeId, seq: Seq) {
        self.catalog.leaves(id);
        self.catalog
            .set_role(id, Role::Reclaiming { cursor: Lba(0) }, seq);
    }

    fn apply_to_holds(&mut self, record: &Record, seq: Seq) {
        if let Record::Release { id } = record {
            self.catalog.remove(*id);
        } else if let Record::Hold {
            snapshot,
            id,
            created,
            tag,
        } = record
        {
            let entry = CatalogEntry {
                id: *id,
                role: Role::Hold {
                    snapshot: *snapshot,
                    tag: tag.clone(),
                },
                root: Root::default(),
                bytes: 0,
                sector_bytes: 0,
                redirects_always: false,
                mapped_blocks: 0,
                created: *created,
                kin: Kin::default(),
                quota_bytes: 0,
                reserve_bytes: 0,
            };
            self.catalog.insert(entry, seq);
        }
    }

    fn roll_back(
        &mut self,
        volume: VolumeId,
        snapshot: VolumeId,
        reclaim: VolumeId,
        seq: Seq,
    ) -> Result<()> {
        let to = self.catalog.get(snapshot)?.entry.clone();
        let root = MapStore::fork(to.root, &mut self.space);
        let entry = &mut self.catalog.get_mut(volume)?.entry;
        let mut old = entry.clone();
        entry.root = root;
        entry.bytes = to.bytes;
        entry.mapped_blocks = to.mapped_blocks;
        old.id = reclaim;
        old.role = Role::Reclaiming { cursor: Lba(0) };
        old.kin = Kin::default();
        (old.quota_bytes, old.reserve_bytes) = (0, 0);
        self.catalog.set_origin(volume, snapshot)?;
        self.catalog.insert(old, seq);
        self.catalog.rolled_back(volume, snapshot);
        Ok(())
    }

    fn remap(
        &mut self,
        id: VolumeId,
        lba: Lba,
        extent: Extent,
        leaf: Option<PagePtr>,
        seq: Seq,
    ) -> Result<()> {
        let before = self.space.tally();
        let root = &mut self.catalog.get_mut(id)?.entry.root;
        self.map
            .remap(root, lba, extent, leaf, seq, &mut self.space);
        self.note_change(id, before);
        Ok(())
    }

    /// Notes how much a volume maps and owns alone that is marked as changed already.
    fn note_change(&mut self, id: VolumeId, before: Tally) {
        let (map, after) = (&self.map, self.space.tally());
        let mapped = |root| map.mapped(root).ok();
        self.catalog.changed(id, before, after, mapped);
    }

    fn fork(
        &mut self,
        from: VolumeId,
        id: VolumeId,
        role: Role,
        created: Timestamp,
        seq: Seq,
    ) -> Result<()> {
        let mut entry = self.catalog.get(from)?.entry.clone();
        entry.id = id;
        entry.role = role;
        entry.root = MapStore::fork(entry.root, &mut self.space);
        entry.created = created;
        let role = entry.role.clone();
        // A limit is a volume's own: a snapshot has none, and a clone starts without.
        (entry.quota_bytes, entry.reserve_bytes) = (0, 0);
        self.catalog.insert(entry, seq);
        self.catalog.forked(from, id, &role);
        Ok(())
    }

    /// Applies a record of the journal, all of its steps.
    pub(crate) fn replay(&mut self, record: &Record, seq: Seq) -> Result<(), Fault> {
        let Record::Unmap { volume, lba, count } = record else {
            return self.replay_step(record, seq).map(drop);
        };
        // Steps already taken find a hole, so a step that lacks something may be tried again from the start.
        let (mut at, end) = (*lba, lba.plus(*count));
        while at < end {
            let rest = Record::Unmap {
                volume: *volume,
                lba: at,
                count: end.0 - at.0,
            };
            match self.replay_step(&rest, seq)? {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Applies a record of the journal, or the first step of one that goes step by step: where the next one begins.
    pub(crate) fn replay_step(&mut self, record: &Record, seq: Seq) -> Result<Option<Lba>, Fault> {
        let prepared = self.prepare(record)?;
        self.apply(record, prepared, seq)?;
        Ok(match prepared {
            Prepared::Unmap(step) => Some(step.end()),
            Prepared::Whole | Prepared::Remap(_) => None,
        })
    }

    /// Returns a step's worth of a removed tree's space. `seq` is the last record appended.
    pub(crate) fn reclaim(&mut self, id: VolumeId, seq: Seq) -> Result<ReclaimStep, Fault> {
        let entry = &self.catalog.get(id)?.entry;
        let Role::Reclaiming { cursor } = entry.role else {
            return Err(Error::with(
                ErrorKind::Busy,
                "a volume that was not removed is reclaimed",
            )
            .into());
        };
        let step = self.map.reclaim(entry.root, cursor, seq, &mut self.space)?;
        match step.next {
            None => self.catalog.remove(id),
            Some(next) => self.catalog.advance_cursor(id, next, step.passed)?,
        }
        Ok(step)
    }
}

fn empty_volume(id: VolumeId, role: Role, bytes: u64, created: Timestamp) -> CatalogEntry {
    CatalogEntry {
        id,
        role,
        root: Root {
            ptr: None,
            level: level_for(blocks_of(bytes)),
        },
        bytes,
        sector_bytes: 4096,
        redirects_always: false,
        mapped_blocks: 0,
        created,
        kin: Kin::beside(None),
        quota_bytes: 0,
        reserve_bytes: 0,
    }
}

/// Bytes of memory that a map page takes, with what leads to it.
const PAGE_BYTES: u64 = 4400;
/// The same for the counts of a region, whose counts are not wide.
const REGION_BYTES: u64 = 4700;

impl Metadata {
    /// Bounds the memory of map pages and counts: three quarters for pages, of which there are 1,984 for each 512 regions
    /// where every block is mapped, and one for counts.
    pub(crate) fn limit(&mut self, bytes: u64) {
        let part =
            |quarters, each| usize::try_from(bytes / 4 * quarters / each).unwrap_or(usize::MAX);
        self.map.limit(part(3, PAGE_BYTES));
        self.space.limit(part(1, REGION_BYTES));
    }

    /// Bytes of memory that map pages and counts take now.
    pub(crate) fn cached_bytes(&self) -> u64 {
        self.map.loaded_pages() as u64 * PAGE_BYTES
            + self.space.loaded_regions() as u64 * REGION_BYTES
    }

    /// Whether more of it is in memory than may be.
    pub(crate) fn is_over(&self) -> bool {
        self.map.is_over() || self.space.is_over()
    }

    /// Whether so much of it changed that a checkpoint has to come before much can be dropped, or that doing it once more
    /// after a crash would take long.
    pub(crate) fn is_mostly_dirty(&self) -> bool {
        let changed = self.map.dirty_pages() + self.space.dirty_regions();
        let are_many = self.map.is_mostly_dirty() || self.space.is_mostly_dirty();
        are_many || changed > CHECKPOINT_PAGES_MAX
    }

    /// Drops a little of what is too much and can be read again.
    pub(crate) fn evict(&mut self) {
        self.map.evict();
        self.space.evict(self.map.durable());
    }
}

fn in_range(entry: &CatalogEntry, lba: Lba, count: u64) -> Result<()> {
    if lba.0 + count > blocks_of(entry.bytes) {
        return Err(Error::with(ErrorKind::Invalid, "a block beyond the volume's end").at_lba(lba));
    }
    Ok(())
}
