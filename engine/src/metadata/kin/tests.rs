//! What is known of owners without a walk, held against walks.

use super::super::Metadata;
use super::super::tests::{clone, create, empty, map, remove, rollback, snapshot, unmap};
use crate::format::catalog::{CatalogEntry, Kin, Own, Role, Root};
use crate::format::record::Record;
use crate::units::{Lba, Pba, Seq, VolumeId};
use fastrand::Rng;

impl Metadata {
    fn walked(&self, root: Root) -> Own {
        let (mut own, mut at) = (Own::default(), Lba(0));
        while at.0 != u64::MAX {
            let (next, found) = self.map.own(&self.space, root, at).unwrap();
            own.data += found.data;
            own.pages += found.pages;
            at = next;
        }
        own
    }

    fn known(&self, id: u64) -> Option<Own> {
        self.catalog.get(VolumeId(id)).unwrap().entry.kin.counted()
    }

    fn kept(&self, kind: fn(&Role) -> bool) -> Vec<u64> {
        let entries = self.catalog.entries().into_iter();
        let of_kind = entries.filter(|entry| kind(&entry.role));
        of_kind.map(|entry| entry.id.0).collect()
    }

    /// Counts an entry as a list does.
    fn count(&mut self, id: u64) -> bool {
        let round = self.catalog.begin_counting(&[VolumeId(id)]);
        let own = self.walked(self.catalog.get(VolumeId(id)).unwrap().entry.root);
        self.catalog.counted(VolumeId(id), round, own)
    }

    fn check_owners(&self, context: &str) -> usize {
        let mut known = 0;
        let entries = self.catalog.entries().into_iter();
        for entry in entries.filter(|entry| !is_removed(&entry.role)) {
            let (told, walked) = (entry.kin.own, self.walked(entry.root));
            let is_bound = told.data <= walked.data && told.pages <= walked.pages;
            assert!(is_bound, "{context}: number {}", entry.id.0);
            if let Some(own) = entry.kin.counted() {
                assert_eq!(own, walked, "{context}: number {}", entry.id.0);
                known += 1;
            }
        }
        known
    }

    /// Maps as many blocks as one free run has.
    fn mapping(&mut self, volume: u64, lba: u64, count: u64) -> Record {
        let extent = self.space.reserve(Pba(8000), count).unwrap();
        Record::Map {
            volume: VolumeId(volume),
            lba: Lba(lba),
            pba: extent.start,
            count: extent.count,
        }
    }

    fn reclaim_step(&mut self) {
        let Some(id) = self.catalog.reclaiming().first().copied() else {
            return;
        };
        self.reclaim(id, Seq(5)).unwrap();
    }

    fn end_generation(&mut self) {
        let generation = self.map.generation();
        self.map.freeze();
        self.space.freeze(generation);
        let freed = self.space.take_pending();
        self.space.reuse(&freed, true);
    }
}

fn is_volume(role: &Role) -> bool {
    matches!(role, Role::Volume { .. })
}

fn is_snapshot(role: &Role) -> bool {
    matches!(role, Role::Snapshot { .. })
}

fn is_removed(role: &Role) -> bool {
    matches!(role, Role::Reclaiming { .. })
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn what_is_known_of_owners_equals_walks() {
    let mut known = 0;
    for seed in 0..400 {
        let mut rng = Rng::with_seed(seed);
        let mut metadata = empty();
        metadata.replay(&create(1, "v1"), Seq(5)).unwrap();
        for step in 0..80 {
            let next = metadata.catalog.next_id().0;
            let (volumes, snapshots) = (metadata.kept(is_volume), metadata.kept(is_snapshot));
            let volume = rng.choice(&volumes).copied();
            let some = rng.choice(&snapshots).copied();
            let (lba, count) = (rng.u64(..1000), rng.u64(1..24));
            // Two leaves, and a few places in them, so that owners meet.
            let lba = if lba < 500 { lba % 40 } else { 512 + lba % 40 };
            let record = match (rng.u8(..16), volume, some) {
                (0..6, Some(volume), _) => Some(metadata.mapping(volume, lba, count)),
                (6..8, Some(volume), _) => Some(unmap(volume, lba, rng.u64(1..400))),
                (8..10, Some(volume), _) => Some(snapshot(volume, next, &format!("s{next}"))),
                (10, _, Some(from)) => Some(clone(from, next, &format!("v{next}"))),
                (11, _, Some(to)) => {
                    let of = &metadata.catalog.get(VolumeId(to)).unwrap().entry.role;
                    let Role::Snapshot { volume, .. } = of else {
                        unreachable!("a snapshot is one")
                    };
                    Some(rollback(volume.0, to, next))
                }
                (12, _, Some(snapshot)) => Some(remove(snapshot)),
                (13, Some(volume), _) => {
                    let has_snapshots = !metadata.catalog.snapshot_ids(VolumeId(volume)).is_empty();
                    let goes = volumes.len() > 1 && !has_snapshots;
                    goes.then(|| remove(volume))
                }
                (14, _, _) => {
                    metadata.end_generation();
                    None
                }
                _ => None,
            };
            match record {
                Some(record) => metadata.replay(&record, Seq(5)).unwrap(),
                None if rng.bool() => {
                    for _ in 0..rng.u8(..6) {
                        metadata.reclaim_step();
                    }
                }
                None => {
                    let kept = [volumes, snapshots].concat();
                    if let Some(id) = rng.choice(&kept) {
                        metadata.count(*id);
                    }
                }
            }
            known += metadata.check_owners(&format!("seed {seed}, step {step}"));
        }
        while !metadata.catalog.reclaiming().is_empty() {
            metadata.reclaim_step();
            metadata.check_owners(&format!("seed {seed}, at the end"));
        }
        for id in [metadata.kept(is_volume), metadata.kept(is_snapshot)].concat() {
            assert!(metadata.count(id), "nothing goes on, so every count counts");
        }
        metadata.check_owners(&format!("seed {seed}, counted"));
    }
    assert!(
        known > 50_000,
        "only {known} figures were known without a walk"
    );
}

#[test]
fn a_writer_owns_what_it_takes_and_its_snapshot_is_counted_once_it_may_own_something() {
    let mut metadata = empty();
    let own = |data, pages| Some(Own { data, pages });
    metadata.replay(&create(1, "v"), Seq(5)).unwrap();
    let first = map(&mut metadata, 1, 0, 10);
    metadata.replay(&first, Seq(5)).unwrap();
    assert_eq!(metadata.known(1), own(10, 2));
    metadata.replay(&snapshot(1, 2, "s"), Seq(5)).unwrap();
    assert_eq!(
        (metadata.known(1), metadata.known(2)),
        (own(0, 0), own(0, 0))
    );
    let second = map(&mut metadata, 1, 0, 1);
    metadata.replay(&second, Seq(5)).unwrap();
    assert_eq!((metadata.known(1), metadata.known(2)), (own(1, 2), None));
    assert!(metadata.count(2));
    assert_eq!(metadata.known(2), own(1, 2));
    assert_eq!(metadata.catalog.uncounted(VolumeId(0), 9), []);
}

#[test]
fn a_count_that_a_change_overtook_does_not_count() {
    let mut metadata = empty();
    metadata.replay(&create(1, "v"), Seq(5)).unwrap();
    let first = map(&mut metadata, 1, 0, 10);
    metadata.replay(&first, Seq(5)).unwrap();
    metadata.replay(&snapshot(1, 2, "s"), Seq(5)).unwrap();
    let change = map(&mut metadata, 1, 0, 1);
    metadata.replay(&change, Seq(5)).unwrap();
    let round = metadata.catalog.begin_counting(&[VolumeId(2)]);
    let change = map(&mut metadata, 1, 1, 1);
    metadata.replay(&change, Seq(5)).unwrap();
    assert!(!metadata.catalog.counted(VolumeId(2), round, Own::default()));
    // While removed space comes back, too.
    metadata.replay(&create(3, "w"), Seq(5)).unwrap();
    metadata.replay(&remove(3), Seq(5)).unwrap();
    assert!(!metadata.count(2));
    metadata.reclaim_step();
    assert!(metadata.count(2));
}

#[test]
fn after_damage_everybody_is_adjacent_to_everybody() {
    let mut metadata = empty();
    for (id, name) in [(1, "v"), (2, "w")] {
        metadata.replay(&create(id, name), Seq(5)).unwrap();
    }
    assert_eq!(metadata.catalog.adjacent(VolumeId(1)), []);
    metadata.catalog.forget_kin();
    assert_eq!(metadata.catalog.adjacent(VolumeId(1)), [VolumeId(2)]);
    assert_eq!(metadata.known(1), None);
    let entry: &CatalogEntry = &metadata.catalog.get(VolumeId(1)).unwrap().entry;
    assert_eq!(entry.kin, Kin::UNKNOWN);
}
