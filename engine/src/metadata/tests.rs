//! What each record may do, what it does, and what the catalog says afterwards.

use super::{Catalog, Metadata, Prepared, blocks_of};
use crate::error::ErrorKind;
use crate::format::catalog::{CatalogEntry, Role, Root, SLOTS_PER_PAGE};
use crate::format::layout;
use crate::format::record::Record;
use crate::limits::CHECKPOINT_PAGES_MAX;
use crate::map::{MapStore, Mapping};
use crate::name::Name;
use crate::space::{Fault, Missing, SpaceMap};
use crate::units::{Extent, Generation, Lba, MetadataId, Pba, PoolId, Seq, Timestamp, VolumeId};

const BLOCKS: u64 = 16_384;
const MIB: u64 = 1 << 20;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(super) fn empty() -> Metadata {
    let mut space = SpaceMap::new(BLOCKS, layout::journal(BLOCKS));
    for region in 0..layout::region_count(BLOCKS) {
        space.load(region, None, None).unwrap();
    }
    Metadata {
        id: PoolId([7; 16]),
        page_id: MetadataId([7; 16]),
        space,
        map: MapStore::new(Generation(2)),
        catalog: Catalog::new(name("p"), 1),
        catalog_places: Vec::new(),
    }
}

pub(super) fn create(id: u64, text: &str) -> Record {
    Record::Create {
        id: VolumeId(id),
        name: name(text),
        bytes: 4 * MIB,
        sector_bytes: 512,
        redirects_always: true,
        created: Timestamp(id),
    }
}

pub(super) fn snapshot(volume: u64, id: u64, text: &str) -> Record {
    Record::Snapshot {
        volume: VolumeId(volume),
        id: VolumeId(id),
        name: name(text),
        created: Timestamp(id),
    }
}

pub(super) fn clone(snapshot: u64, id: u64, text: &str) -> Record {
    Record::Clone {
        snapshot: VolumeId(snapshot),
        id: VolumeId(id),
        name: name(text),
        created: Timestamp(id),
    }
}

pub(super) fn rollback(volume: u64, snapshot: u64, reclaim: u64) -> Record {
    Record::Rollback {
        volume: VolumeId(volume),
        snapshot: VolumeId(snapshot),
        reclaim: VolumeId(reclaim),
    }
}

pub(super) fn remove(id: u64) -> Record {
    Record::Remove { id: VolumeId(id) }
}

fn rename(id: u64, text: &str) -> Record {
    Record::Rename {
        id: VolumeId(id),
        name: name(text),
    }
}

fn hold(snapshot: u64, id: u64, tag: &str) -> Record {
    Record::Hold {
        snapshot: VolumeId(snapshot),
        id: VolumeId(id),
        created: Timestamp(id),
        tag: name(tag),
    }
}

fn release(id: u64) -> Record {
    Record::Release { id: VolumeId(id) }
}

fn resize(id: u64, bytes: u64) -> Record {
    Record::Resize {
        id: VolumeId(id),
        bytes,
    }
}

pub(super) fn unmap(volume: u64, lba: u64, count: u64) -> Record {
    Record::Unmap {
        volume: VolumeId(volume),
        lba: Lba(lba),
        count,
    }
}

pub(super) fn map(metadata: &mut Metadata, volume: u64, lba: u64, count: u64) -> Record {
    let extent = metadata.space.reserve(Pba(8000), count).unwrap();
    assert_eq!(extent.count, count);
    Record::Map {
        volume: VolumeId(volume),
        lba: Lba(lba),
        pba: extent.start,
        count,
    }
}

impl Metadata {
    fn does(&mut self, record: &Record) {
        self.replay(record, Seq(5)).unwrap();
    }

    fn refuses(&mut self, record: &Record, kind: ErrorKind) {
        let before = (self.catalog.entries().len(), self.catalog.next_id());
        match self.prepare(record) {
            Err(Fault::Error(error)) => assert_eq!(error.kind(), kind, "{record:?}: {error}"),
            other => panic!("{record:?}: {other:?}"),
        }
        let after = (self.catalog.entries().len(), self.catalog.next_id());
        assert_eq!(before, after);
    }

    fn entry(&self, id: u64) -> &CatalogEntry {
        &self.catalog.get(VolumeId(id)).unwrap().entry
    }

    fn path(&self, id: u64) -> Option<String> {
        self.catalog.path(VolumeId(id)).map(|path| path.to_string())
    }
}

/// Volume 1 `a` with blocks 3 to 6, its snapshot 2 `a@s`, of that a clone 3 `b`, and a removed tree 4.
fn populated() -> Metadata {
    let mut metadata = empty();
    metadata.does(&create(1, "a"));
    let mapped = map(&mut metadata, 1, 3, 4);
    metadata.does(&mapped);
    metadata.does(&snapshot(1, 2, "s"));
    metadata.does(&clone(2, 3, "b"));
    metadata.does(&create(4, "gone"));
    metadata.does(&remove(4));
    metadata
}

#[test]
fn a_number_is_given_once_and_a_name_is_one_things() {
    let mut metadata = populated();
    let (corrupt, exists) = (ErrorKind::Corrupt, ErrorKind::AlreadyExists);
    for used in [1, 2, 3, 4] {
        metadata.refuses(&create(used, "c"), corrupt);
        metadata.refuses(&snapshot(1, used, "t"), corrupt);
        metadata.refuses(&clone(2, used, "c"), corrupt);
        metadata.refuses(&rollback(1, 2, used), corrupt);
    }
    metadata.refuses(&create(5, "b"), exists);
    metadata.refuses(&snapshot(1, 5, "s"), exists);
    metadata.refuses(&clone(2, 5, "a"), exists);
    metadata.refuses(&rename(1, "b"), exists);
    metadata.does(&snapshot(1, 5, "t"));
    metadata.refuses(&rename(5, "s"), exists);
    // A name is free again when its bearer is removed, and belongs to one volume's snapshots only.
    metadata.does(&create(6, "gone"));
    metadata.does(&snapshot(3, 7, "s"));
    assert_eq!(metadata.path(7).unwrap(), "b@s");
    assert_eq!(metadata.path(4), None);
    assert_eq!(metadata.catalog.next_id(), VolumeId(8));
}

#[test]
fn each_record_wants_the_right_kind_of_thing() {
    let mut metadata = populated();
    let missing = ErrorKind::NotFound;
    for record in [
        unmap(9, 0, 1),
        snapshot(9, 10, "x"),
        clone(9, 10, "x"),
        rollback(9, 2, 10),
        rollback(1, 9, 10),
        remove(9),
        rename(9, "x"),
        resize(9, MIB),
    ] {
        metadata.refuses(&record, missing);
    }
    let on_snapshot = map(&mut metadata, 2, 0, 1);
    for record in [
        on_snapshot,
        unmap(2, 0, 1),
        unmap(4, 0, 1),
        snapshot(2, 10, "x"),
        rollback(2, 2, 10),
        resize(2, MIB),
        resize(4, MIB),
    ] {
        metadata.refuses(&record, ErrorKind::ReadOnly);
    }
    for record in [clone(1, 10, "x"), clone(4, 10, "x"), rollback(1, 3, 10)] {
        metadata.refuses(&record, ErrorKind::Invalid);
    }
    metadata.refuses(&remove(4), ErrorKind::Corrupt);
    metadata.refuses(&rename(4, "x"), ErrorKind::Corrupt);
    // Up to a volume's end, and not beyond.
    let last = map(&mut metadata, 1, 1023, 1);
    metadata.does(&last);
    let beyond = map(&mut metadata, 1, 1023, 2);
    metadata.refuses(&beyond, ErrorKind::Invalid);
    metadata.refuses(&unmap(1, 0, 1025), ErrorKind::Invalid);
    metadata.does(&unmap(1, 0, 1024));
    assert_eq!(metadata.entry(1).mapped_blocks, 0);
    assert_eq!((blocks_of(0), blocks_of(1), blocks_of(4096)), (0, 1, 1));
    assert_eq!(blocks_of(4097), 2);
}

#[test]
fn what_a_record_does_stands_in_the_catalog() {
    let mut metadata = populated();
    let a = metadata.entry(1).clone();
    assert_eq!(
        (a.bytes, a.sector_bytes, a.redirects_always),
        (4 * MIB, 512, true)
    );
    assert_eq!((a.mapped_blocks, a.created), (4, Timestamp(1)));
    let s = metadata.entry(2).clone();
    assert_eq!((s.root, s.bytes, s.mapped_blocks), (a.root, a.bytes, 4));
    assert_eq!(
        (s.created, metadata.path(2).unwrap()),
        (Timestamp(2), "a@s".to_owned())
    );
    assert_eq!(metadata.space.count(a.root.ptr.unwrap().pba).unwrap(), 3);
    let origin = |metadata: &Metadata, id| match metadata.entry(id).role {
        Role::Volume { origin, .. } => origin,
        Role::Snapshot { .. } | Role::Reclaiming { .. } | Role::Hold { .. } => {
            panic!("{id} is no volume")
        }
    };
    assert_eq!(
        (origin(&metadata, 1), origin(&metadata, 3)),
        (None, Some(VolumeId(2)))
    );

    metadata.does(&rename(1, "c"));
    metadata.does(&rename(2, "u"));
    metadata.does(&rename(3, "d"));
    assert_eq!(metadata.path(2).unwrap(), "c@u");
    assert_eq!(origin(&metadata, 3), Some(VolumeId(2)));
    let find = |metadata: &Metadata, path: &str| {
        let found = metadata.catalog.find(&path.parse().unwrap());
        found
            .map(|volume| volume.entry.id.0)
            .map_err(|error| error.to_string())
    };
    assert_eq!(find(&metadata, "c@u"), Ok(2));
    assert_eq!(find(&metadata, "d"), Ok(3));
    for (path, what) in [("a", "volume"), ("c@s", "snapshot"), ("x@u", "volume")] {
        let error = find(&metadata, path).unwrap_err();
        assert!(
            error.contains(&format!("p/{path}: no such {what}")),
            "{error}"
        );
    }

    // A rollback keeps the volume's number and name, and hands its old tree to the reclaim.
    let mapped = map(&mut metadata, 1, 100, 2);
    metadata.does(&mapped);
    metadata.does(&resize(1, 8 * MIB));
    let (before, old) = (metadata.entry(1).root, metadata.space.used_blocks());
    metadata.does(&rollback(1, 2, 5));
    let (a, gone) = (metadata.entry(1).clone(), metadata.entry(5).clone());
    assert_eq!((a.root, a.bytes, a.mapped_blocks), (s.root, 4 * MIB, 4));
    assert_eq!(
        (gone.root, gone.role),
        (before, Role::Reclaiming { cursor: Lba(0) })
    );
    assert_eq!(origin(&metadata, 1), Some(VolumeId(2)));
    assert_eq!(metadata.space.used_blocks(), old);
    let reclaiming: Vec<u64> = metadata
        .catalog
        .reclaiming()
        .iter()
        .map(|id| id.0)
        .collect();
    assert_eq!(reclaiming, [4, 5]);
    assert_eq!(
        metadata.catalog.get(VolumeId(5)).unwrap().removed_at,
        Seq(5)
    );
    while metadata.catalog.get(VolumeId(5)).is_ok() {
        metadata.reclaim(VolumeId(5), Seq(5)).unwrap();
    }
    // Two blocks of data, the leaf that named them and the root that the larger size needed.
    let pages = u64::from(before.level) + 1;
    assert_eq!(old - metadata.space.used_blocks(), 2 + pages);
    assert!(matches!(
        metadata.reclaim(VolumeId(1), Seq(5)),
        Err(Fault::Error(error)) if error.kind() == ErrorKind::Busy
    ));
}

#[test]
fn a_larger_volume_gets_a_higher_map_and_keeps_what_it_maps() {
    let mut metadata = empty();
    metadata.does(&create(1, "a"));
    let mapped = map(&mut metadata, 1, 7, 1);
    let Record::Map { pba, .. } = mapped else {
        unreachable!()
    };
    metadata.does(&mapped);
    let small = metadata.entry(1).root.level;
    metadata.does(&resize(1, 1 << 40));
    let large = metadata.entry(1).root;
    assert!(large.level > small);
    metadata.does(&resize(1, MIB));
    assert_eq!(metadata.entry(1).bytes, MIB);
    let root = metadata.entry(1).root;
    assert_eq!(root, large, "a map never gets lower");
    let found = metadata
        .map
        .lookup(&metadata.space, root, Lba(7), 1)
        .unwrap();
    assert_eq!(found, Mapping::Exclusive(Extent::new(pba, 1)));
}

#[test]
fn a_change_says_what_is_missing_before_it_changes_anything() {
    let mut metadata = populated();
    let root = metadata.entry(1).root;
    let region = root.ptr.unwrap().pba.0 / layout::REGION_BLOCKS;
    let fresh = || SpaceMap::new(BLOCKS, layout::journal(BLOCKS));
    for record in [snapshot(1, 9, "t"), clone(2, 9, "c"), rollback(1, 2, 9)] {
        metadata.space = fresh();
        let prepared = metadata.prepare(&record);
        assert!(
            matches!(prepared, Err(Fault::Missing(Missing::Counts(missing))) if missing == region),
            "{record:?}: {prepared:?}"
        );
    }
    let grow = metadata.prepare(&Record::Grow { blocks: BLOCKS * 2 });
    let last = layout::region_count(BLOCKS) - 1;
    assert!(matches!(grow, Err(Fault::Missing(Missing::Counts(missing))) if missing == last));
    let mut metadata = populated();
    metadata.map = MapStore::new(Generation(3));
    for record in [unmap(1, 0, 9), resize(1, 1 << 40)] {
        let prepared = metadata.prepare(&record);
        assert!(
            matches!(prepared, Err(Fault::Missing(Missing::Page(..)))),
            "{record:?}: {prepared:?}"
        );
    }
    // A size within what the map can address needs no page.
    metadata.does(&resize(1, 5 * MIB / 2));
}

#[test]
fn an_unmap_of_many_leaves_goes_on_until_its_end() {
    let mut metadata = empty();
    metadata.does(&create(1, "a"));
    metadata.does(&resize(1, 64 * MIB));
    for leaf in 0..5 {
        let mapped = map(&mut metadata, 1, leaf * 512 + 100, 8);
        metadata.does(&mapped);
    }
    assert_eq!(metadata.entry(1).mapped_blocks, 40);
    let record = unmap(1, 104, 3 * 512);
    let first = metadata.replay_step(&record, Seq(9)).unwrap();
    assert_eq!(first, Some(Lba(512)));
    assert_eq!(metadata.entry(1).mapped_blocks, 36);
    metadata.replay(&record, Seq(9)).unwrap();
    assert_eq!(metadata.entry(1).mapped_blocks, 16);
    assert!(matches!(
        metadata.prepare(&rename(1, "b")),
        Ok(Prepared::Whole)
    ));
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_catalog_leaves_room_for_the_next_checkpoints_pages() {
    let mut metadata = empty();
    metadata.does(&create(1, "a"));
    // Nothing is left but what a checkpoint of a few pages needs.
    let free = metadata.space.free_for_data();
    metadata.space.set_aside_last(1).unwrap();
    let mut taken = Vec::new();
    while let Ok(extent) = metadata.space.reserve(Pba(0), free) {
        taken.push(extent);
    }
    metadata.does(&create(2, "b"));
    let reserve = metadata.space.reserve_blocks();
    for _ in 0..reserve - 5 {
        metadata.space.set_aside_last(1).unwrap();
        metadata.space.take_metadata();
    }
    metadata.refuses(&create(3, "c"), ErrorKind::OutOfSpace);
    metadata.refuses(&snapshot(1, 3, "c"), ErrorKind::OutOfSpace);
    // What frees space needs none.
    metadata.prepare(&remove(1)).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_checkpoint_is_wanted_before_replay_would_read_and_make_many_pages() {
    let regions = CHECKPOINT_PAGES_MAX as u64;
    let blocks = regions * layout::REGION_BLOCKS;
    let mut metadata = empty();
    metadata.space = SpaceMap::new(blocks, layout::journal(blocks));
    for region in 0..regions {
        metadata.space.load(region, None, None).unwrap();
    }
    metadata.does(&create(1, "a"));
    metadata.does(&resize(1, regions * 2 * MIB));
    // Each changes a leaf and the counts of a region.
    let mut changes = 0;
    while !metadata.is_mostly_dirty() {
        let goal = Pba(changes * layout::REGION_BLOCKS + 1000);
        let extent = metadata.space.reserve(goal, 1).unwrap();
        metadata.does(&Record::Map {
            volume: VolumeId(1),
            lba: Lba(changes * 512),
            pba: extent.start,
            count: 1,
        });
        changes += 1;
    }
    let expected = regions / 2;
    assert!(
        (expected * 9 / 10..=expected + 1).contains(&changes),
        "{changes}"
    );
}

fn volume(id: u64, text: &str) -> CatalogEntry {
    CatalogEntry {
        id: VolumeId(id),
        role: Role::Volume {
            name: name(text),
            origin: None,
        },
        root: Root::default(),
        bytes: MIB,
        sector_bytes: 4096,
        redirects_always: false,
        mapped_blocks: 0,
        kin: crate::format::catalog::Kin::default(),
        created: Timestamp(0),
        quota_bytes: 0,
        reserve_bytes: 0,
    }
}

#[test]
fn slots_are_used_again_and_pages_that_changed_are_known() {
    let mut catalog = Catalog::new(name("p"), 0);
    assert_eq!(catalog.next_id(), VolumeId(1), "number 0 is nobody's");
    let pages = |catalog: &mut Catalog| catalog.take_dirty_pages().into_iter().collect::<Vec<_>>();
    let slots = SLOTS_PER_PAGE as u64;
    for id in 1..=2 * slots + 1 {
        catalog.insert(volume(id, &format!("v{id}")), Seq(0));
    }
    assert_eq!(catalog.slot_count(), 2 * SLOTS_PER_PAGE + 1);
    assert_eq!((catalog.volume_count(), catalog.snapshot_count()), (31, 0));
    assert_eq!(pages(&mut catalog), [0, 1, 2]);
    catalog.get_mut(VolumeId(slots + 1)).unwrap();
    assert_eq!(pages(&mut catalog), [1]);
    catalog.get_unsaved(VolumeId(1)).unwrap().goal = Pba(9);
    assert!(pages(&mut catalog).is_empty());
    catalog.set_role(VolumeId(slots), Role::Reclaiming { cursor: Lba(0) }, Seq(3));
    assert_eq!(pages(&mut catalog), [0]);
    catalog.remove(VolumeId(slots));
    catalog.remove(VolumeId(slots + 3));
    assert_eq!(pages(&mut catalog), [0, 1]);
    assert!(catalog.reclaiming().is_empty());
    assert_eq!(catalog.slot_count(), 2 * SLOTS_PER_PAGE + 1);
    // The lowest free slot first.
    catalog.insert(volume(50, "x"), Seq(0));
    assert_eq!(pages(&mut catalog), [0]);
    let ids = |catalog: &Catalog, page| -> Vec<u64> {
        let slots = catalog.page_slots(page);
        slots
            .map(|entry| entry.map_or(0, |entry| entry.id.0))
            .collect()
    };
    assert_eq!(ids(&catalog, 0)[SLOTS_PER_PAGE - 1], 50);
    assert_eq!(ids(&catalog, 1)[..4], [16, 17, 0, 19]);
    assert_eq!(ids(&catalog, 2)[..2], [31, 0]);
    // Empty slots at the end go, and are not handed out twice.
    for id in 19..=31 {
        catalog.remove(VolumeId(id));
    }
    assert_eq!(catalog.slot_count(), SLOTS_PER_PAGE + 2);
    for id in 60..64 {
        catalog.insert(volume(id, &format!("y{id}")), Seq(0));
    }
    assert_eq!(catalog.slot_count(), SLOTS_PER_PAGE + 6);
    assert_eq!(catalog.next_id(), VolumeId(64));
    let entries: Vec<u64> = catalog.entries().iter().map(|entry| entry.id.0).collect();
    assert!(entries.is_sorted() && entries.len() == 21);
    for id in entries {
        catalog.remove(VolumeId(id));
    }
    assert_eq!((catalog.slot_count(), catalog.volume_count()), (0, 0));
}

#[test]
fn a_loaded_catalog_has_each_number_and_each_name_once() {
    let mut catalog = Catalog::new(name("p"), 10);
    catalog.insert_loaded(Some(volume(9, "a"))).unwrap();
    catalog.insert_loaded(None).unwrap();
    for wrong in [volume(9, "b"), volume(8, "a"), volume(10, "c")] {
        assert!(catalog.insert_loaded(Some(wrong)).is_err());
    }
    assert_eq!((catalog.volume_count(), catalog.slot_count()), (1, 5));
    assert!(catalog.dirty_pages().is_empty());
    catalog.insert(volume(10, "c"), Seq(0));
    assert_eq!(catalog.slot_count(), 5, "the empty slot is free");
    let of = |id, text: &str, of| CatalogEntry {
        role: Role::Snapshot {
            name: name(text),
            volume: VolumeId(of),
        },
        ..volume(id, text)
    };
    catalog.insert(of(13, "x", 9), Seq(0));
    catalog.insert(of(12, "y", 9), Seq(0));
    catalog.insert(of(14, "x", 10), Seq(0));
    catalog.insert(of(15, "z", 12), Seq(0));
    let ids = |of| -> Vec<u64> {
        let ids = catalog.snapshot_ids(VolumeId(of));
        ids.into_iter().map(|id| id.0).collect()
    };
    assert_eq!((ids(9), ids(10), ids(11)), (vec![12, 13], vec![14], vec![]));
    assert_eq!(
        catalog.path(VolumeId(15)),
        None,
        "a snapshot has none of its own"
    );
    let volumes: Vec<u64> = catalog.volume_ids().map(|id| id.0).collect();
    assert_eq!(volumes, [9, 10]);
    assert!(catalog.check_room().is_ok());
}

#[test]
fn a_held_snapshot_is_not_removed_and_all_else_goes_on() {
    let mut metadata = populated();
    let (corrupt, missing) = (ErrorKind::Corrupt, ErrorKind::NotFound);
    let used = metadata.space.used_blocks();
    metadata.does(&hold(2, 5, "backup"));
    metadata.does(&hold(2, 6, "audit"));
    assert_eq!(metadata.space.used_blocks(), used, "a hold has no map");
    let tags = |metadata: &Metadata, id| -> Vec<String> {
        let holds = metadata.catalog.holds(VolumeId(id));
        holds.map(|(tag, id)| format!("{tag} {}", id.0)).collect()
    };
    assert_eq!(tags(&metadata, 2), ["audit 6", "backup 5"]);
    metadata.refuses(&remove(2), corrupt);
    // A tag is one hold's on a snapshot, and any other snapshot's too.
    metadata.refuses(&hold(2, 7, "backup"), ErrorKind::AlreadyExists);
    metadata.does(&snapshot(1, 7, "t"));
    metadata.does(&hold(7, 8, "backup"));
    metadata.does(&clone(2, 9, "c"));
    metadata.does(&rollback(1, 2, 10));
    metadata.does(&rename(2, "u"));
    metadata.does(&rename(1, "z"));
    assert_eq!(metadata.path(2).unwrap(), "z@u");
    assert_eq!(tags(&metadata, 2), ["audit 6", "backup 5"]);

    metadata.does(&release(5));
    metadata.refuses(&remove(2), corrupt);
    metadata.does(&release(6));
    assert_eq!(tags(&metadata, 2), [""; 0]);
    assert_eq!(tags(&metadata, 7), ["backup 8"]);
    metadata.does(&remove(2));
    metadata.refuses(&release(5), missing);
    metadata.refuses(&hold(2, 11, "late"), ErrorKind::Invalid);
    metadata.does(&hold(7, 11, "late"));
}

#[test]
fn a_hold_is_on_a_snapshot_and_is_nothing_else() {
    let mut metadata = populated();
    metadata.does(&hold(2, 5, "backup"));
    for (on, kind) in [
        (1, ErrorKind::Invalid),
        (4, ErrorKind::Invalid),
        (5, ErrorKind::Invalid),
        (9, ErrorKind::NotFound),
    ] {
        metadata.refuses(&hold(on, 6, "x"), kind);
    }
    metadata.refuses(&hold(2, 3, "x"), ErrorKind::Corrupt);
    for record in [
        remove(5),
        rename(5, "x"),
        release(1),
        release(2),
        release(4),
    ] {
        metadata.refuses(&record, ErrorKind::Corrupt);
    }
    for record in [clone(5, 6, "x"), rollback(1, 5, 6)] {
        metadata.refuses(&record, ErrorKind::Invalid);
    }
    for record in [unmap(5, 0, 1), snapshot(5, 6, "x"), resize(5, MIB)] {
        metadata.refuses(&record, ErrorKind::ReadOnly);
    }
    assert!(metadata.reclaim(VolumeId(5), Seq(5)).is_err());
    assert_eq!(metadata.path(5), None);
    assert!(metadata.catalog.stray_holds().is_empty());
}

#[test]
fn a_loaded_hold_may_stand_before_its_snapshot_and_is_stray_without_one() {
    let held = |id, on, tag: &str| CatalogEntry {
        id: VolumeId(id),
        role: Role::Hold {
            snapshot: VolumeId(on),
            tag: name(tag),
        },
        bytes: 0,
        sector_bytes: 0,
        ..volume(id, tag)
    };
    let snapshot = CatalogEntry {
        role: Role::Snapshot {
            name: name("s"),
            volume: VolumeId(1),
        },
        ..volume(2, "s")
    };
    let mut catalog = Catalog::new(name("p"), 10);
    catalog.insert_loaded(Some(held(5, 2, "a"))).unwrap();
    catalog.insert_loaded(Some(volume(1, "v"))).unwrap();
    let strays = |catalog: &Catalog| -> Vec<u64> {
        let strays = catalog.stray_holds();
        strays.into_iter().map(|(id, _)| id.0).collect()
    };
    assert_eq!(strays(&catalog), [5]);
    catalog.insert_loaded(Some(snapshot)).unwrap();
    assert!(strays(&catalog).is_empty());
    // On a volume, on a hold, on nothing, and one twice.
    for (id, on) in [(6, 1), (7, 5), (8, 4711)] {
        catalog.insert_loaded(Some(held(id, on, "a"))).unwrap();
    }
    assert!(catalog.insert_loaded(Some(held(9, 2, "a"))).is_err());
    assert_eq!(strays(&catalog), [6, 7, 8]);
    let (_, error) = catalog.stray_holds().remove(0);
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (
            ErrorKind::Corrupt,
            "hold a: is on number 1, which is no snapshot"
        )
    );
    assert_eq!((catalog.volume_count(), catalog.snapshot_count()), (1, 1));
}
