//! Making, renaming, resizing and removing volumes, and removing snapshots.

use super::Pool;
use super::change::Change;
use super::limits::create_limited;
use super::report::{Limits, Redirect, Removal, VolumeOptions};
use crate::datapath::Counters;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{CatalogEntry, Role};
use crate::format::map_page::Node;
use crate::format::page::PagePtr;
use crate::format::record::Record;
use crate::journal::{CHANGE_BYTES_MAX, ring_bytes};
use crate::limits::VOLUME_BYTES_MAX;
use crate::metadata::{Metadata, blocks_of};
use crate::name::{Name, VolumePath};
use crate::space::Fault;
use crate::units::{BLOCK_BYTES, Lba, Pba, VolumeId};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::BTreeSet;

/// The most blockers that one refusal names.
const BLOCKERS_NAMED_MAX: usize = 8;

fn check_size(name: &str, bytes: u64, sector_bytes: u32) -> Result<()> {
    let invalid = |fact: String| Err(Error::with(ErrorKind::Invalid, format!("{name}: {fact}")));
    if sector_bytes != 512 && sector_bytes != 4096 {
        return invalid(format!(
            "a sector has 512 or 4096 bytes, not {sector_bytes}"
        ));
    }
    if bytes == 0 {
        return invalid("a size of 0; give at least one sector".into());
    }
    if bytes > VOLUME_BYTES_MAX {
        return invalid(format!(
            "a size of {bytes} bytes; a volume has at most {} TiB",
            VOLUME_BYTES_MAX >> 40
        ));
    }
    if !bytes.is_multiple_of(u64::from(sector_bytes)) {
        return invalid(format!(
            "a size of {bytes} bytes is not a multiple of the sector, {sector_bytes} bytes"
        ));
    }
    Ok(())
}

/// The records that remove these, snapshots first.
fn removals(metadata: &Metadata, ids: &[VolumeId]) -> Vec<Record> {
    let is_volume = |id: &VolumeId| {
        let role = metadata.catalog.get(*id).map(|found| &found.entry.role);
        matches!(role, Ok(Role::Volume { .. }))
    };
    let (mut volumes, mut snapshots): (Vec<VolumeId>, Vec<VolumeId>) =
        ids.iter().partition(|id| is_volume(id));
    volumes.sort_unstable();
    snapshots.sort_unstable();
    let mut records = Record::removals(&snapshots);
    records.extend(Record::removals(&volumes));
    records
}

impl Pool {
    /// Makes an empty volume.
    pub async fn create_volume<D: Device>(
        &self,
        device: &D,
        name: &Name,
        options: VolumeOptions,
    ) -> Result<VolumeId> {
        self.create_limited_volume(device, name, options, Limits::default())
            .await
    }

    /// Makes an empty volume with limits, both or neither.
    pub async fn create_limited_volume<D: Device>(
        &self,
        device: &D,
        name: &Name,
        options: VolumeOptions,
        limits: Limits,
    ) -> Result<VolumeId> {
        check_size(
            &format!("{}/{name}", self.name),
            options.bytes,
            options.sector_bytes,
        )?;
        self.check_limits(name, options.bytes, limits)?;
        let _alone = self.control.lock().await;
        self.check_commit(name, options.bytes)?;
        let created = self.ledger.clock.now();
        self.change(device, |draft| {
            let id = draft.metadata().catalog.next_id();
            let create = Record::Create {
                id,
                name: name.clone(),
                bytes: options.bytes,
                sector_bytes: options.sector_bytes,
                redirects_always: options.redirect == Redirect::Always,
                created,
            };
            create_limited(draft, &create, id, limits)?;
            Ok(id)
        })
        .await
    }

    /// Renames a volume (its snapshots follow), or a snapshot within its volume.
    pub async fn rename<D: Device>(
        &self,
        device: &D,
        from: &VolumePath,
        to: &VolumePath,
    ) -> Result<()> {
        let name = match (&from.snapshot, &to.snapshot) {
            (None, None) => &to.volume,
            (Some(_), Some(name)) if from.volume == to.volume => name,
            _ => {
                return Err(Error::with(
                    ErrorKind::Invalid,
                    format!(
                        "{from} cannot become {to}: a volume becomes a volume, a snapshot one of the same volume"
                    ),
                ));
            }
        };
        let _alone = self.control.lock().await;
        self.change(device, |draft| {
            let id = draft.metadata().catalog.find(from)?.entry.id;
            draft.apply(&Record::Rename {
                id,
                name: name.clone(),
            })
        })
        .await
    }

    /// Changes a volume's size. Shrinking needs `allow_shrink` and an unattached volume.
    pub async fn resize<D: Device>(
        &self,
        device: &D,
        volume: &Name,
        bytes: u64,
        allow_shrink: bool,
    ) -> Result<()> {
        let path = VolumePath {
            volume: volume.clone(),
            snapshot: None,
        };
        let shown = format!("{}/{volume}", self.name);
        let concerned = |metadata: &Metadata| metadata.catalog.id_of(&path).into_iter().collect();
        let mut turn = self.turn(concerned).await;
        self.check_writable()?;
        let entry = self.ledger.look(|metadata| {
            metadata
                .catalog
                .find(&path)
                .map(|found| found.entry.clone())
        })?;
        check_size(&shown, bytes, entry.sector_bytes)?;
        let _change = Change::announce(self, vec![entry.id]);
        let attached = self.attached.lock().get(&entry.id).cloned();
        if bytes > entry.bytes {
            self.check_commit(volume, bytes)?;
        }
        if bytes < entry.bytes {
            if !allow_shrink {
                let message = format!(
                    "{shown}: has {} bytes; --allow-shrink cuts off what is beyond {bytes}",
                    entry.bytes
                );
                return Err(Error::with(ErrorKind::Invalid, message));
            }
            if attached.is_some() {
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!("{shown}: is attached; detach it before it shrinks"),
                ));
            }
            // A walk as long as the map is large: the commands of other volumes go on meanwhile.
            drop(turn);
            self.cut_off(device, &entry, bytes).await?;
            turn = self.control.lock().await;
        }
        let id = entry.id;
        self.change(device, |draft| draft.apply(&Record::Resize { id, bytes }))
            .await?;
        drop(turn);
        if let Some(attached) = attached {
            attached.bytes.set(bytes);
        }
        Ok(())
    }

    /// Unmaps what lies beyond a new, smaller size, so that it reads as zeros if the volume grows again.
    async fn cut_off<D: Device>(&self, device: &D, entry: &CatalogEntry, bytes: u64) -> Result<()> {
        let counters = Counters::new(&*self.ledger.clock);
        let io = self.io(device, entry.id, entry.redirects_always, &counters);
        let whole = bytes.next_multiple_of(BLOCK_BYTES);
        if whole > bytes {
            io.write_zeroes(bytes, whole.min(entry.bytes) - bytes, false)
                .await?;
        }
        io.unmap(Lba(blocks_of(bytes)), Lba(blocks_of(entry.bytes)))
            .await
    }

    /// Removes volumes and snapshots, or with `dry_run` says what that would free. `recursive`: a volume's snapshots
    /// too. Nothing goes if anything named cannot go.
    pub async fn remove<D: Device>(
        &self,
        device: &D,
        targets: &[VolumePath],
        recursive: bool,
        dry_run: bool,
    ) -> Result<Removal> {
        let removal = |ids: Vec<VolumeId>, freed_bytes| {
            let paths: Result<Vec<VolumePath>> = ids.iter().map(|id| self.path_of(*id)).collect();
            Ok(Removal {
                targets: paths?,
                freed_bytes,
                ids,
            })
        };
        if dry_run {
            // A walk over all that would go, as long as the maps are large. Nobody waits for it, so what others change
            // meanwhile may be in its figure or not.
            let ids = self.removable(targets, recursive)?;
            let freed = self.freed_by(device, &ids).await?;
            return removal(ids, Some(freed * BLOCK_BYTES));
        }
        let concerned = |metadata: &Metadata| {
            let ids = targets.iter().map(|path| metadata.catalog.id_of(path));
            ids.flatten().collect()
        };
        let _alone = self.turn(concerned).await;
        let ids = self.removable(targets, recursive)?;
        let _change = Change::announce(self, ids);
        // Again, now that nobody attaches any of it.
        let ids = self.removable(targets, recursive)?;
        let removal = removal(ids, None)?;
        let records = self
            .ledger
            .look(|metadata| removals(metadata, &removal.ids));
        let bytes = ring_bytes(&records);
        if bytes > CHANGE_BYTES_MAX {
            let message = format!(
                "{}: {} volumes and snapshots are too many to be removed at once; remove some of them first",
                self.name,
                removal.ids.len()
            );
            return Err(Error::with(ErrorKind::Invalid, message));
        }
        self.change_much(device, bytes, |draft| draft.apply_all(&records))
            .await?;
        self.maintenance.want();
        Ok(removal)
    }

    /// Refuses a removal that [`Pool::remove`] would refuse; nothing is walked and nothing changed.
    pub fn check_removable(&self, targets: &[VolumePath], recursive: bool) -> Result<()> {
        self.removable(targets, recursive).map(drop)
    }

    /// What removing `targets` removes, snapshots before their volume, each once.
    fn removable(&self, targets: &[VolumePath], recursive: bool) -> Result<Vec<VolumeId>> {
        let attached = self.attached.lock();
        self.ledger.look(|metadata| {
            let catalog = &metadata.catalog;
            let named: Result<Vec<VolumeId>> = targets
                .iter()
                .map(|path| catalog.find(path).map(|found| found.entry.id))
                .collect();
            let named = named?;
            let is_named: FxHashSet<VolumeId> = named.iter().copied().collect();
            let mut ids: Vec<VolumeId> = Vec::new();
            let (mut blockers, mut ways_out) = (Vec::new(), BTreeSet::new());
            for &id in &named {
                let snapshots = catalog.snapshot_ids(id);
                for snapshot in snapshots {
                    if recursive || is_named.contains(&snapshot) {
                        ids.push(snapshot);
                    } else {
                        blockers.extend(
                            catalog
                                .path(snapshot)
                                .map(|path| format!("snapshot {}/{path}", self.name)),
                        );
                        ways_out.insert("-r removes snapshots too");
                    }
                }
                ids.push(id);
            }
            let mut seen = FxHashSet::default();
            ids.retain(|id| seen.insert(*id));
            // A snapshot may be named after its volume.
            ids.sort_by_key(|id| {
                matches!(
                    catalog.get(*id).map(|found| &found.entry.role),
                    Ok(Role::Volume { .. })
                )
            });
            for id in &ids {
                if attached.contains_key(id) {
                    blockers.extend(
                        catalog
                            .path(*id)
                            .map(|path| format!("{}/{path} is attached", self.name)),
                    );
                    ways_out.insert("detach what is attached");
                }
                for (tag, _) in catalog.holds(*id) {
                    blockers.extend(
                        catalog
                            .path(*id)
                            .map(|path| format!("{}/{path} is held by {tag}", self.name)),
                    );
                    ways_out.insert("`ublkctl release` takes a hold away");
                }
            }
            if blockers.is_empty() {
                return Ok(ids);
            }
            let first = targets
                .first()
                .map_or_else(String::new, ToString::to_string);
            let ways_out: Vec<&str> = ways_out.into_iter().collect();
            let more = blockers.len().saturating_sub(BLOCKERS_NAMED_MAX);
            blockers.truncate(BLOCKERS_NAMED_MAX);
            if more > 0 {
                blockers.push(format!("{more} more"));
            }
            Err(Error::with(
                ErrorKind::Busy,
                format!(
                    "{}/{first}: cannot be removed: {}; {}",
                    self.name,
                    blockers.join(", "),
                    ways_out.join(", ")
                ),
            ))
        })
    }

    /// Blocks that removing these together frees: those whose every owner goes.
    async fn freed_by<D: Device>(&self, device: &D, ids: &[VolumeId]) -> Result<u64> {
        let mut freed = 0;
        // How many owners of a shared block or page are among those that go.
        let mut going: FxHashMap<Pba, u32> = FxHashMap::default();
        let mut pages: Vec<(PagePtr, u8)> = self.ledger.look(|metadata| {
            let roots = ids.iter().filter_map(|id| metadata.catalog.get(*id).ok());
            roots
                .filter_map(|found| {
                    found
                        .entry
                        .root
                        .ptr
                        .map(|ptr| (ptr, found.entry.root.level))
                })
                .collect()
        });
        while let Some((ptr, level)) = pages.pop() {
            let owners = self
                .ledger
                .view(device, |metadata| metadata.space.referenced(ptr.pba))
                .await;
            let owners = match owners {
                Ok(owners) => owners,
                Err(error) if error.kind() == ErrorKind::Corrupt => continue,
                Err(error) => return Err(error),
            };
            let gone = going.entry(ptr.pba).or_default();
            *gone += 1;
            // Once: a damaged map may name a page more often than it is counted.
            if *gone != owners {
                continue;
            }
            freed += 1;
            let below = self
                .ledger
                .view(device, |metadata| {
                    let node = &metadata.map.page(ptr, level)?.node;
                    let mut counts = Vec::new();
                    if let Node::Leaf(entries) = node {
                        for entry in entries.iter().filter(|entry| entry.0 != 0) {
                            counts.push((*entry, metadata.space.referenced(*entry)?));
                        }
                    }
                    Ok::<_, Fault>((node.clone(), counts))
                })
                .await;
            let (node, counts) = match below {
                Ok(below) => below,
                // What cannot be read is not counted, and does not keep the rest from being removed.
                Err(error) if error.kind() == ErrorKind::Corrupt => continue,
                Err(error) => return Err(error),
            };
            if let Node::Inner(children) = &node {
                pages.extend(children.iter().flatten().map(|child| (*child, level - 1)));
            }
            for (pba, owners) in counts {
                let gone = going.entry(pba).or_default();
                *gone += 1;
                freed += u64::from(*gone == owners);
            }
        }
        Ok(freed)
    }
}
