//! What each volume and snapshot owns alone, known without a walk over its map.
//!
//! A change of a volume tells by itself what the volume gains and loses: what it takes nobody else has, and what
//! loses its last owner was its own. It may also leave something to one other owner. That one is adjacent in a tree:
//! a snapshot stands between its volume and what the volume went on from, so whoever shares a block has it in common
//! with everything between. What was removed leaves its place to what went on from it. Then siblings may share what
//! their parent does not have, and the parent is called *ragged*. Those who may have gained are counted again when
//! somebody asks. See `docs/decisions/unique-as-it-happens.md`.

#[cfg(test)]
mod tests;

use super::Catalog;
use crate::format::catalog::{CatalogEntry, Kin, Own, Role, Root};
use crate::space::Tally;
use crate::units::VolumeId;
use std::collections::BTreeSet;
use std::ops::Bound;

/// Who goes on from whom, and who has to be counted.
#[derive(Debug, Default)]
pub(super) struct KinTree {
    /// Parent and child, of volumes and snapshots.
    children: BTreeSet<(VolumeId, VolumeId)>,
    uncounted: BTreeSet<VolumeId>,
    /// How often counting began.
    rounds: u64,
}

/// Where counting stands for an entry. Not on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counting {
    /// The round in which it is counted, while nothing has happened to it since.
    counted_in: Option<u64>,
    /// The round in which it told those adjacent that they have to be counted.
    told_in: Option<u64>,
}

/// Somebody else has all that it has.
fn shares_all(kin: &mut Kin) {
    kin.own = Own::default();
    kin.is_counted = true;
}

fn is_kept(entry: &CatalogEntry) -> bool {
    match entry.role {
        Role::Volume { .. } | Role::Snapshot { .. } => true,
        Role::Reclaiming { .. } | Role::Hold { .. } => false,
    }
}

impl KinTree {
    pub(super) fn add(&mut self, entry: &CatalogEntry) {
        if is_kept(entry) {
            self.place(entry.id, entry.kin);
        }
    }

    pub(super) fn remove(&mut self, entry: &CatalogEntry) {
        self.displace(entry.id, entry.kin);
    }

    fn place(&mut self, id: VolumeId, kin: Kin) {
        if let Some(parent) = kin.parent {
            self.children.insert((parent, id));
        }
        if !kin.is_counted {
            self.uncounted.insert(id);
        }
    }

    fn displace(&mut self, id: VolumeId, kin: Kin) {
        if let Some(parent) = kin.parent {
            self.children.remove(&(parent, id));
        }
        self.uncounted.remove(&id);
    }

    fn children(&self, id: VolumeId) -> impl Iterator<Item = VolumeId> {
        let of = self
            .children
            .range((id, VolumeId(0))..=(id, VolumeId(u64::MAX)));
        of.map(|(_, child)| *child)
            .filter(move |child| *child != id)
    }
}

impl Catalog {
    /// Whether there is such a volume or snapshot.
    fn keeps(&self, id: VolumeId) -> bool {
        self.get(id).is_ok_and(|found| is_kept(&found.entry))
    }

    /// Those who may be the only ones left with what an entry gives up.
    pub(crate) fn adjacent(&self, id: VolumeId) -> Vec<VolumeId> {
        let mut adjacent: Vec<VolumeId> = self.kin.children(id).collect();
        let parent = self.get(id).ok().and_then(|found| found.entry.kin.parent);
        let Some(parent) = parent.filter(|parent| *parent != id) else {
            return adjacent;
        };
        let is_ragged = match self.get(parent) {
            Ok(found) if is_kept(&found.entry) => {
                adjacent.push(parent);
                found.entry.kin.is_ragged
            }
            _ => true,
        };
        if is_ragged {
            adjacent.extend(self.kin.children(parent).filter(|sibling| *sibling != id));
        }
        adjacent
    }

    fn set_kin(&mut self, id: VolumeId, change: impl FnOnce(&mut Kin)) {
        let Ok(volume) = self.get_mut(id) else {
            return;
        };
        let before = volume.entry.kin;
        change(&mut volume.entry.kin);
        volume.counting = Counting::default();
        let after = volume.entry.kin;
        self.kin.displace(id, before);
        self.kin.place(id, after);
        self.refresh_owed(id);
    }

    /// What an entry owns alone has to be counted.
    fn forget_own(&mut self, id: VolumeId) {
        let is_known = self.get_unsaved(id).is_some_and(|volume| {
            volume.counting.counted_in = None;
            volume.entry.kin.is_counted
        });
        if is_known {
            self.set_kin(id, |kin| kin.is_counted = false);
        }
    }

    fn forget_adjacent(&mut self, id: VolumeId) {
        for other in self.adjacent(id) {
            self.forget_own(other);
        }
    }

    /// Nothing is known of who shares what with whom: counts were put right, or entries are lost.
    pub(crate) fn forget_kin(&mut self) {
        let entries = self.entries().into_iter();
        let kept = entries.filter(|entry| is_kept(entry));
        let ids: Vec<VolumeId> = kept.map(|entry| entry.id).collect();
        for id in ids {
            self.set_kin(id, |kin| *kin = Kin::UNKNOWN);
        }
    }

    /// What an entry owns alone was found to be wrong.
    pub(crate) fn recount(&mut self, id: VolumeId) {
        self.forget_own(id);
    }

    /// An entry was made that begins as `from` is: both have everything in common.
    pub(super) fn forked(&mut self, from: VolumeId, id: VolumeId, role: &Role) {
        let mut parent = Some(from);
        if let Role::Snapshot { .. } = role {
            // It stands between the volume and what that went on from.
            parent = self.get(from).ok().and_then(|found| found.entry.kin.parent);
            self.set_kin(from, |kin| kin.parent = Some(id));
        }
        self.set_kin(from, shares_all);
        self.set_kin(id, |kin| *kin = Kin::beside(parent));
    }

    /// A volume became as `snapshot` is; what it held goes.
    pub(super) fn rolled_back(&mut self, volume: VolumeId, snapshot: VolumeId) {
        self.forget_adjacent(volume);
        self.set_kin(snapshot, shares_all);
        self.set_kin(volume, |kin| *kin = Kin::beside(Some(snapshot)));
    }

    /// A volume or snapshot is about to be removed: what went on from it goes on from its parent.
    pub(super) fn leaves(&mut self, id: VolumeId) {
        self.forget_adjacent(id);
        let Ok(kin) = self.get(id).map(|found| found.entry.kin) else {
            return;
        };
        let children: Vec<VolumeId> = self.kin.children(id).collect();
        match kin.parent.filter(|parent| *parent != id) {
            Some(parent) => {
                for child in &children {
                    self.set_kin(*child, |kin| kin.parent = Some(parent));
                }
                let is_ragged = children.len() > 1 || (kin.is_ragged && !children.is_empty());
                if is_ragged && self.keeps(parent) {
                    self.set_kin(parent, |kin| kin.is_ragged = true);
                }
            }
            // Several keep its number, by which they know of each other.
            None if children.len() == 1 => {
                for child in children {
                    self.set_kin(child, |kin| kin.parent = None);
                }
            }
            None => {}
        }
    }

    /// A volume, whose slot is marked already, changed its map: how much it maps, if that can be said, and what was taken
    /// and given up before and after.
    pub(super) fn changed(
        &mut self,
        id: VolumeId,
        before: Tally,
        after: Tally,
        mapped: impl FnOnce(Root) -> Option<u64>,
    ) {
        let rounds = self.kin.rounds;
        let is_reclaiming = !self.reclaiming().is_empty();
        let Some(volume) = self.get_unsaved(id) else {
            return;
        };
        if let Some(mapped) = mapped(volume.entry.root) {
            volume.entry.mapped_blocks = mapped;
        }
        volume.counting.counted_in = None;
        let own = &mut volume.entry.kin.own;
        let pages_taken = after.pages_taken - before.pages_taken;
        let pages_freed = after.pages_freed - before.pages_freed;
        let data_taken = after.taken - before.taken - pages_taken;
        let data_freed = (after.freed - before.freed).saturating_sub(pages_freed);
        own.pages = (own.pages + pages_taken).saturating_sub(pages_freed);
        own.data = (own.data + data_taken).saturating_sub(data_freed);
        // What a removed tree still owns too, it leaves to somebody else later. Once in a round is enough: nobody is
        // counted for good who was told since its counting began.
        let leaves_some = is_reclaiming || after.left_alone != before.left_alone;
        let tells = leaves_some && volume.counting.told_in != Some(rounds);
        if tells {
            volume.counting.told_in = Some(rounds);
            self.forget_adjacent(id);
        }
    }

    /// Entries from `from` on that have to be counted, at most `max`.
    pub(crate) fn uncounted(&self, from: VolumeId, max: usize) -> Vec<VolumeId> {
        let rest = self
            .kin
            .uncounted
            .range((Bound::Included(from), Bound::Unbounded));
        rest.take(max).copied().collect()
    }

    /// Counting of these begins; the round for [`Catalog::counted`].
    pub(crate) fn begin_counting(&mut self, ids: &[VolumeId]) -> u64 {
        self.kin.rounds += 1;
        let round = self.kin.rounds;
        for id in ids {
            if let Some(volume) = self.get_unsaved(*id) {
                volume.counting.counted_in = Some(round);
            }
        }
        round
    }

    /// An entry was counted: from here on that is known, unless something happened to it meanwhile, or what was removed
    /// still gives up blocks.
    pub(crate) fn counted(&mut self, id: VolumeId, round: u64, own: Own) -> bool {
        let is_quiet = self
            .get(id)
            .is_ok_and(|found| found.counting.counted_in == Some(round))
            && self.reclaiming().is_empty();
        if is_quiet {
            self.set_kin(id, |kin| {
                kin.own = own;
                kin.is_counted = true;
            });
        }
        is_quiet
    }
}
