//! What can be made of a damaged pool in memory: counts found again by walking the maps, and everything applied that
//! can be. Opening a damaged pool for reading shows it, a repair writes it down.
//!
//! Nothing is guessed. While some map cannot be read, no count is lowered: what that map names must not be given to
//! others.

use super::check::Findings;
use super::open::RingPlace;
use super::recovery::{Unapplied, Unsaved, read_unsaved, replay_readable, volumes};
use super::report::RepairStep;
use crate::checkpoint::load_readable;
use crate::device::Device;
use crate::error::Result;
use crate::format::catalog::{CatalogEntry, Role, Root};
use crate::format::layout::REGION_BLOCKS;
use crate::format::superblock::Superblock;
use crate::metadata::Metadata;
use crate::name::Name;
use crate::units::{Pba, Seq, VolumeId};
use std::collections::BTreeSet;

/// What a damaged pool is looked at for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To read what is whole; nothing is written.
    Look,
    /// To write down what could be mended.
    Write {
        /// Go on from where the journal is damaged, without what it held behind.
        discards_journal: bool,
    },
}

/// A damaged pool, as far as it can be mended.
#[derive(Debug)]
pub(super) struct Mended {
    pub(super) metadata: Metadata,
    pub(super) unsaved: Unsaved,
    /// Volumes and snapshots that may lack acknowledged writes.
    pub(super) withheld: BTreeSet<VolumeId>,
    pub(super) steps: Vec<RepairStep>,
    /// Whether the pool may be written to after this.
    pub(super) can_write: bool,
}

impl Mended {
    /// What is wrong, in a line each.
    pub(super) fn facts(&self) -> impl Iterator<Item = String> {
        let line = |step: &RepairStep| format!("{}: {}", step.place, step.what);
        self.steps.iter().map(line)
    }
}

fn mended(what: impl Into<String>, place: impl Into<String>, action: &str) -> RepairStep {
    RepairStep {
        what: what.into(),
        place: place.into(),
        action: action.to_owned(),
        mends: true,
    }
}

fn left(what: impl Into<String>, place: impl Into<String>, action: &str) -> RepairStep {
    RepairStep {
        mends: false,
        ..mended(what, place, action)
    }
}

/// Loads the checkpoint of `superblock` and what it does not cover, and mends in memory what can be.
pub(super) async fn mend<D: Device>(
    device: &D,
    superblock: &Superblock,
    was_clean: bool,
    ring: &RingPlace,
    purpose: Purpose,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Mended> {
    let mut unsaved = read_unsaved(device, superblock, was_clean, ring, &mut Vec::new()).await?;
    let mut steps = Vec::new();
    let mut findings = find(device, superblock, &BTreeSet::new(), progress).await?;
    let removed = unreadable_removed(&findings);
    if purpose != Purpose::Look && !removed.is_empty() {
        // Nobody wants what was removed; without it everything else may be provable.
        for id in &removed {
            let place = findings.name(*id);
            let what = "cannot be read, so that its space does not come back";
            steps.push(mended(what, place, "forget it, and count again"));
        }
        findings = find(device, superblock, &removed, progress).await?;
        for id in &removed {
            findings.metadata.catalog.remove(*id);
        }
    }
    let mut can_write = findings.losses.catalog.is_empty();
    steps.extend(mend_counts(&mut findings, purpose));
    steps.extend(mend_catalog(&mut findings));

    let mut withheld = name_orphans(&mut findings.metadata);
    if !steps.is_empty() {
        findings.metadata.catalog.forget_kin();
    }
    let mut metadata = findings.metadata;
    let unapplied = replay_readable(device, &mut metadata, &unsaved, &withheld).await?;
    steps.extend(unapplied_steps(&metadata, &unapplied, &unsaved));
    can_write &= unapplied.withheld.is_empty() && !unapplied.may_be_readable_later();
    withheld.extend(&unapplied.withheld);
    if let Some(lost) = &unsaved.lost {
        let discards_journal = purpose
            == Purpose::Write {
                discards_journal: true,
            };
        steps.push(journal_step(
            &metadata,
            &lost.to_string(),
            &unsaved,
            discards_journal,
        ));
        if discards_journal {
            unsaved.tail.next = unsaved.beyond;
            unsaved.tail.oldest = unsaved.beyond;
        } else {
            can_write = false;
            withheld.extend(volumes(&metadata));
        }
    }
    if !can_write && purpose != Purpose::Look {
        for step in steps.iter_mut().filter(|step| step.mends) {
            step.mends = false;
            "nothing while the pool can only be read".clone_into(&mut step.action);
        }
    }
    Ok(Mended {
        metadata,
        unsaved,
        withheld,
        steps,
        can_write,
    })
}

async fn find<D: Device>(
    device: &D,
    superblock: &Superblock,
    without: &BTreeSet<VolumeId>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Findings> {
    let (metadata, losses) = load_readable(device, superblock).await?;
    let generation = superblock.generation;
    Ok(Findings::of(device, metadata, losses, generation, without, progress).await)
}

/// Removed trees that lead to pages which cannot be read.
fn unreadable_removed(findings: &Findings) -> BTreeSet<VolumeId> {
    let reclaiming = findings.metadata.catalog.reclaiming();
    let ids = findings.lost.keys().copied();
    ids.filter(|id| reclaiming.contains(id)).collect()
}

/// Puts the counts right, as far as that is proven.
fn mend_counts(findings: &mut Findings, purpose: Purpose) -> Vec<RepairStep> {
    let mut steps = Vec::new();
    let is_proven = findings.reach.unreadable.is_empty() && findings.losses.catalog.is_empty();
    // What a map that cannot be read may name, once, is nobody's to take or to overwrite.
    let unseen = u32::from(!is_proven && purpose != Purpose::Look);
    let again = if is_proven {
        "count again from the maps"
    } else {
        "count again from the maps; whatever they do not show stays used"
    };
    let mut regions: BTreeSet<u64> = BTreeSet::new();
    for (lost, error) in &findings.losses.counts {
        let place = format!("counts of {} regions", lost.clone().count());
        steps.push(mended(error.to_string(), place, again));
        // The first region makes the next checkpoint write the index page, whether anything is counted there or not.
        let below = lost.clone();
        regions.extend(below.filter(|region| {
            unseen > 0 || *region == lost.start || findings.reach.touches(*region)
        }));
    }
    let index_lost = regions.clone();
    let (mut low, mut high) = (0, 0);
    for (region, fault) in &findings.regions {
        if index_lost.contains(region) {
            continue;
        }
        if let Some(error) = &fault.lost {
            let place = format!("counts of blocks from {}", Pba(region * REGION_BLOCKS));
            steps.push(mended(error.to_string(), place, again));
            regions.insert(*region);
        } else if fault.low > 0 || (fault.high > 0 && is_proven) {
            regions.insert(*region);
        }
        low += fault.low;
        high += fault.high;
    }
    let blocks = |count: u64| format!("{count} blocks");
    if low > 0 {
        steps.push(mended("counted too low", blocks(low), "count them again"));
    }
    if high > 0 && is_proven {
        steps.push(mended(
            "lost: counted, and named by nothing",
            blocks(high),
            "give them back",
        ));
    } else if high > 0 {
        let what = "counted more often than the readable maps name them";
        steps.push(left(
            what,
            blocks(high),
            "nothing while a map cannot be read",
        ));
    }
    for region in regions {
        let space = &mut findings.metadata.space;
        let is_lost = index_lost.contains(&region)
            || findings
                .regions
                .get(&region)
                .is_some_and(|fault| fault.lost.is_some());
        let counts: Vec<u32> = (0..)
            .zip(space.region_blocks(region).map(Pba))
            .map(|(offset, pba)| {
                let found = findings.reach.count(region, offset);
                match space.count(pba) {
                    _ if is_lost => found + unseen,
                    Ok(counted) if !is_proven => found.max(counted),
                    _ => found,
                }
            })
            .collect();
        space.set_counts(region, |offset| counts.get(offset).copied().unwrap_or(0));
    }
    steps
}

/// Puts right what the catalog says of maps that can be read, and names what cannot be.
fn mend_catalog(findings: &mut Findings) -> Vec<RepairStep> {
    let mut steps = Vec::new();
    for (slots, error) in &findings.losses.catalog {
        let place = format!("catalog, {} slots", slots.len());
        let action = "cannot be mended; what else there is can be read, and copied to a new pool";
        steps.push(left(error.to_string(), place, action));
    }
    for (id, error) in &findings.losses.holds {
        findings.metadata.catalog.remove(*id);
        let place = format!("catalog, number {}", id.0);
        steps.push(mended(error.to_string(), place, "forget the hold"));
    }
    for unreadable in findings.report().unreadable {
        let what = format!("{} bytes cannot be read", unreadable.bytes);
        let action = "cannot be mended; once it is removed, a repair gives its space back";
        steps.push(left(what, findings.name(unreadable.id), action));
    }
    for (id, is, says) in findings.misjudged() {
        let what = format!(
            "the catalog says that it owns {} blocks alone, it owns {}",
            says.data + says.pages,
            is.data + is.pages
        );
        steps.push(mended(what, findings.name(id), "count them again"));
        findings.metadata.catalog.recount(id);
    }
    for (id, mapped) in std::mem::take(&mut findings.reach.miscounted) {
        let place = findings.name(id);
        if let Ok(found) = findings.metadata.catalog.get_mut(id) {
            let what = format!(
                "the catalog says that it maps {} blocks, its map says {mapped}",
                found.entry.mapped_blocks
            );
            found.entry.mapped_blocks = mapped;
            steps.push(mended(what, place, "believe the map"));
        }
    }
    steps
}

/// Gives snapshots whose volume is lost with a part of the catalog a volume to be named by; those that were made up.
fn name_orphans(metadata: &mut Metadata) -> BTreeSet<VolumeId> {
    let catalog = &mut metadata.catalog;
    let orphans: Vec<CatalogEntry> = catalog
        .entries()
        .into_iter()
        .filter_map(|entry| {
            let Role::Snapshot { volume, .. } = &entry.role else {
                return None;
            };
            catalog.get(*volume).is_err().then(|| CatalogEntry {
                id: *volume,
                root: Root {
                    ptr: None,
                    level: entry.root.level,
                },
                mapped_blocks: 0,
                ..entry.clone()
            })
        })
        .collect();
    let mut made_up = BTreeSet::new();
    for mut entry in orphans {
        let names = ["lost", "lost-volume", "lost-volume-number"];
        let name = names.iter().find_map(|word| {
            let name: Name = format!("{word}-{}", entry.id.0).parse().ok()?;
            let role = Role::Volume { name, origin: None };
            catalog.check_name(&role).is_ok().then_some(role)
        });
        if let Some(role) = name
            && made_up.insert(entry.id)
        {
            entry.role = role;
            catalog.insert(entry, Seq(0));
        }
    }
    made_up
}

fn unapplied_steps(
    metadata: &Metadata,
    unapplied: &Unapplied,
    unsaved: &Unsaved,
) -> Vec<RepairStep> {
    let mut steps = Vec::new();
    let name = |id: &VolumeId| {
        let path = metadata.catalog.path(*id);
        path.map_or_else(
            || format!("volume number {}", id.0),
            |path| path.to_string(),
        )
    };
    for (id, (count, error)) in &unapplied.unreadable {
        let what = format!(
            "{count} changes of {} lead there: {error}",
            unsaved.records.len()
        );
        let action = "drop them; what they changed cannot be read either way";
        steps.push(mended(what, name(id), action));
    }
    for id in &unapplied.withheld {
        let what = "changes of it cannot be applied, so that it is not what it should be";
        steps.push(left(what, name(id), "cannot be mended"));
    }
    if unapplied.unknown > 0 {
        let what = format!("{} changes are about what is lost there", unapplied.unknown);
        steps.push(left(what, "catalog", "cannot be mended"));
    }
    steps
}

fn journal_step(
    metadata: &Metadata,
    lost: &str,
    unsaved: &Unsaved,
    discards_journal: bool,
) -> RepairStep {
    let paths = volumes(metadata);
    let paths = paths.iter().filter_map(|id| metadata.catalog.path(*id));
    let paths: Vec<String> = paths.map(|path| path.to_string()).collect();
    let place = format!("journal; may concern {}", paths.join(", "));
    let what = format!(
        "{lost}; acknowledged writes behind record {} are lost",
        unsaved.next.0.saturating_sub(1)
    );
    if discards_journal {
        let action = "go back to the state before it; what was written later is given up";
        return mended(what, place, action);
    }
    let action = "cannot be mended; snapshots can be read; --discard-journal gives up what was written later";
    left(what, place, action)
}
