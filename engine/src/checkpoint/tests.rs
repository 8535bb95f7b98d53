//! Checkpoints on a device in memory: the order of what they write, and what is read back.

use super::*;
use crate::device::Device;
use crate::device::memory::{Call, Memory, now};
use crate::error::ErrorKind;
use crate::format::catalog::{CATALOG_INDEX_ENTRIES, CatalogEntry, Role, SLOTS_PER_PAGE};
use crate::format::layout::{self, SUPERBLOCKS};
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::journal::Ledger;
use crate::journal::tests::{BLOCKS, create, ledger, superblock};
use crate::metadata::Metadata;
use crate::units::{BLOCK_LEN, Extent, Generation, Lba, MetadataId, Pba, Seq, VolumeId};

fn put(device: &Memory, place: Pba, superblock: &Superblock) {
    device.set_block(place, &superblock.encode(place));
}

#[test]
fn each_superblock_copy_is_durable_before_the_next_is_touched() {
    let device = Memory::default();
    let superblock = superblock();
    let flush = async || device.flush().await;
    now(write_superblocks(&device, &superblock, flush)).unwrap();
    let expected = [
        Call::Write(0, 1),
        Call::Flush,
        Call::Write(8, 1),
        Call::Flush,
    ];
    assert_eq!(device.take_calls(), expected);
    let found = now(read_superblocks(&device, BLOCKS)).unwrap();
    assert_eq!(found.superblock, superblock);
    assert!(found.warnings.is_empty());
    device.refuse(Some(Call::Flush));
    assert!(now(write_superblocks(&device, &superblock, flush)).is_err());
    assert_eq!(device.take_calls().last(), Some(&Call::Flush));
}

#[test]
fn the_younger_copy_counts_by_generation_and_then_by_session() {
    let aged = |generation, session| Superblock {
        generation: Generation(generation),
        session,
        ..superblock()
    };
    for (older, younger) in [
        (aged(5, 1), aged(5, 2)),
        (aged(5, 9), aged(6, 1)),
        (aged(5, 1), aged(6, 1)),
    ] {
        for [one, other] in [SUPERBLOCKS, [SUPERBLOCKS[1], SUPERBLOCKS[0]]] {
            let device = Memory::default();
            put(&device, one, &older);
            put(&device, other, &younger);
            let found = now(read_superblocks(&device, BLOCKS)).unwrap();
            assert_eq!(found.superblock, younger);
        }
    }
}

#[test]
fn a_damaged_copy_is_named_and_the_other_used() {
    for [one, other] in [SUPERBLOCKS, [SUPERBLOCKS[1], SUPERBLOCKS[0]]] {
        let device = Memory::default();
        put(&device, one, &superblock());
        let found = now(read_superblocks(&device, BLOCKS)).unwrap();
        assert_eq!(
            found.warnings,
            ["one superblock copy is gone; the other is used"]
        );
        put(&device, other, &superblock());
        device.flip(other, 8 * 100);
        let found = now(read_superblocks(&device, BLOCKS)).unwrap();
        let [warning] = &found.warnings[..] else {
            panic!("{:?}", found.warnings)
        };
        assert!(warning.contains("checksum") && warning.contains("the other copy is used"));
        // Both damaged, or one gone: what is damaged says so.
        device.flip(one, 8 * 100);
        for _ in 0..2 {
            let error = now(read_superblocks(&device, BLOCKS)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            device.set_block(one, &[0; BLOCK_LEN]);
        }
        device.set_block(other, &[0; BLOCK_LEN]);
        let error = now(read_superblocks(&device, BLOCKS)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        // A copy that a newer program wrote decides.
        put(&device, one, &superblock());
        let mut newer = superblock().encode(other);
        newer[8] = 2;
        newer[12..16].fill(0);
        let crc = crate::format::bytes::crc_without(&newer, 12..16);
        newer[12..16].copy_from_slice(&crc.to_le_bytes());
        device.set_block(other, &newer);
        let error = now(read_superblocks(&device, BLOCKS)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn a_device_too_small_for_a_copy_holds_none() {
    let device = Memory::default();
    for blocks in [0, 8] {
        let error = now(read_superblocks(&device, blocks)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(device.take_calls().len(), usize::from(blocks > 0));
    }
    let error = now(read_superblocks(&device, 9)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(device.take_calls().len(), 2);
    device.refuse(Some(Call::Read(8, 1)));
    let error = now(read_superblocks(&device, 9)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

/// A pool in memory: what changes it, and its checkpoints.
struct World {
    device: Memory,
    ledger: Ledger,
    checkpoints: Checkpoints,
}

impl World {
    fn new() -> Self {
        Self {
            device: Memory::default(),
            ledger: ledger(0),
            checkpoints: Checkpoints::new(superblock()),
        }
    }

    fn does(&self, record: &Record) {
        let change = self
            .ledger
            .change(&self.device, 0, |draft| draft.apply(record));
        now(change).unwrap().unwrap();
    }

    fn map(&self, lba: u64, goal: u64, count: u64) -> Extent {
        let map = self.ledger.change(&self.device, 0, |draft| {
            let extent = draft.metadata().space.reserve(Pba(goal), count)?;
            draft.apply(&Record::Map {
                volume: VolumeId(1),
                lba: Lba(lba),
                pba: extent.start,
                count: extent.count,
            })?;
            Ok(extent)
        });
        now(map).unwrap().unwrap()
    }

    fn checkpoint(&self) {
        let (ledger, device) = (&self.ledger, &self.device);
        let written = self.checkpoints.write(ledger, device, Ending::GoOn, |_| {});
        now(written).unwrap();
    }

    /// As after a power cut.
    fn load(&self) -> Metadata {
        self.device.cut_power();
        let found = now(read_superblocks(&self.device, BLOCKS)).unwrap();
        assert!(found.warnings.is_empty());
        now(load(&self.device, &found.superblock)).unwrap()
    }

    fn entries(&self) -> Vec<CatalogEntry> {
        self.ledger.look(cloned)
    }
}

fn cloned(metadata: &Metadata) -> Vec<CatalogEntry> {
    let entries = metadata.catalog.entries();
    entries.into_iter().cloned().collect()
}

#[test]
fn a_checkpoint_is_durable_step_by_step() {
    let world = World::new();
    world.does(&create(1));
    let mapped = world.map(0, 3000, 3);
    world.device.take_calls();
    world.checkpoint();
    let calls = world.device.take_calls();
    let journal = layout::journal(BLOCKS).start.0;
    // Data; then journal and pages; then the superblocks, one after the other.
    assert_eq!(calls[..2], [Call::Flush, Call::Write(journal, 1)]);
    let ends = calls.iter().filter(|call| **call == Call::Flush).count();
    assert_eq!(ends, 4);
    let tail = [
        Call::Flush,
        Call::Write(0, 1),
        Call::Flush,
        Call::Write(8, 1),
        Call::Flush,
    ];
    assert!(calls.ends_with(&tail), "{calls:?}");
    let (generation, written, _) = world.checkpoints.progress();
    assert_eq!((generation, written), (Generation(2), 1));
    // The journal before it is worth nothing any more.
    assert_eq!(
        world.ledger.journal_usage(),
        Some((0, layout::journal(BLOCKS).count))
    );
    assert_eq!(world.ledger.durable(), Seq(2));
    assert!(!world.ledger.has_pending());
    let mut found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    assert_eq!((found.seq, found.journal_block), (Seq(3), 1));
    assert_eq!((found.next_id, found.is_clean), (2, false));
    let read = now(crate::journal::read_journal(&world.device, &found, true)).unwrap();
    assert_eq!(read.records, []);

    let mut loaded = world.load();
    assert_eq!(cloned(&loaded), world.entries());
    let root = loaded.catalog.get(VolumeId(1)).unwrap().entry.root;
    let count = loaded.with_supply(&world.device, |metadata| {
        assert_eq!(metadata.map.mapped(root)?, 3);
        metadata.space.count(mapped.start)
    });
    assert_eq!(now(count).unwrap(), 1);
    // A map younger than its checkpoint is another checkpoint's.
    found.generation = Generation(1);
    let error = now(load(&world.device, &found)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_close_says_so_and_what_else_the_superblock_is_to_say() {
    let world = World::new();
    let restate = |superblock: &mut Superblock| superblock.session = 40;
    let closed = world
        .checkpoints
        .write(&world.ledger, &world.device, Ending::Close, restate);
    now(closed).unwrap();
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    assert_eq!((found.is_clean, found.session), (true, 40));
    let again = world
        .checkpoints
        .restate(&world.device, |superblock| superblock.session = 41);
    now(again).unwrap();
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    assert_eq!((found.generation, found.session), (Generation(2), 41));
    assert_eq!(now(world.checkpoints.hold()).superblock.session, 41);
}

#[test]
fn one_checkpoint_serves_all_who_asked_before_it() {
    let world = World::new();
    let after = |seen| {
        let (ledger, device) = (&world.ledger, &world.device);
        now(world
            .checkpoints
            .write_after(Generation(seen), ledger, device))
        .unwrap();
        world.checkpoints.progress().1
    };
    assert_eq!(after(1), 1);
    assert_eq!(after(1), 1, "somebody has written one since");
    assert_eq!(after(2), 2);
}

#[test]
fn a_checkpoint_that_fails_poisons_and_the_last_one_counts() {
    let world = World::new();
    world.does(&create(1));
    world.checkpoint();
    let before = world.entries();
    world.does(&create(2));
    world.device.refuse(Some(Call::Write(8, 1)));
    let failed = world
        .checkpoints
        .write(&world.ledger, &world.device, Ending::GoOn, |_| {});
    assert_eq!(now(failed).unwrap_err().kind(), ErrorKind::Io);
    assert!(world.ledger.is_poisoned());
    assert_eq!(world.checkpoints.progress().1, 1);
    // Copy 1 was durable, so the newer state is there too.
    world.device.cut_power();
    let found = now(read_superblocks(&world.device, BLOCKS)).unwrap();
    let loaded = now(load(&world.device, &found.superblock)).unwrap();
    assert_eq!(cloned(&loaded).len(), before.len() + 1);
    let poisoned = world
        .checkpoints
        .write(&world.ledger, &world.device, Ending::GoOn, |_| {});
    assert_eq!(now(poisoned).unwrap_err().kind(), ErrorKind::Poisoned);
}

#[test]
fn freed_runs_go_back_to_the_device_when_they_are_long() {
    let world = World::new();
    world.does(&create(1));
    let [long, short] = [world.map(0, 3000, 16), world.map(100, 3016, 15)];
    world.map(200, 3031, 40);
    world.checkpoint();
    let used = world.ledger.look(|metadata| metadata.space.used_blocks());
    let unmap = |lba, count| {
        world.does(&Record::Unmap {
            volume: VolumeId(1),
            lba: Lba(lba),
            count,
        });
    };
    unmap(0, 16);
    unmap(100, 15);
    unmap(210, 30);
    assert_eq!(long.end(), short.start);
    world.device.take_calls();
    world.checkpoint();
    let calls = world.device.take_calls();
    let discards: Vec<_> = calls
        .iter()
        .filter(|call| matches!(call, Call::Discard(..)))
        .collect();
    // Neighbours are one run; so are the blocks of the third from its eleventh on.
    let third = short.end().0 + 10;
    assert_eq!(
        discards,
        [&Call::Discard(long.start.0, 31), &Call::Discard(third, 30)]
    );
    let freed = used - world.ledger.look(|metadata| metadata.space.used_blocks());
    assert_eq!(freed, 61);
    // A refused discard frees all the same.
    let again = world.map(0, 3200, 20);
    world.checkpoint();
    unmap(0, 20);
    world.device.refuse(Some(Call::Discard(again.start.0, 20)));
    world.checkpoint();
    let left = world.ledger.look(|metadata| metadata.space.used_blocks());
    assert_eq!(left, used - 61);
    assert!(!world.ledger.is_poisoned());
    // Fifteen blocks are not worth a discard, sixteen are.
    for (count, is_given_back) in [(15, false), (16, true)] {
        world.map(100, 3300, count);
        world.checkpoint();
        unmap(100, count);
        world.device.take_calls();
        world.checkpoint();
        let mut calls = world.device.take_calls().into_iter();
        let given = calls.any(|call| matches!(call, Call::Discard(..)));
        assert_eq!(given, is_given_back, "{count} blocks");
    }
}

/// So many volumes that the catalog has two levels of index pages.
#[test]
fn a_catalog_of_three_levels_is_read_back_and_shrinks_again() {
    let world = World::new();
    world.does(&create(1));
    world.checkpoint();
    let small = world.ledger.look(|metadata| metadata.space.used_blocks());
    let many = (SLOTS_PER_PAGE * CATALOG_INDEX_ENTRIES + 20) as u64;
    for number in 2..=many {
        world.does(&create(number));
        if world
            .ledger
            .journal_usage()
            .is_some_and(|(used, all)| used * 2 > all)
            || number % 500 == 0
        {
            world.checkpoint();
        }
    }
    world.checkpoint();
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    assert_eq!((found.catalog_level, found.catalog_slots), (2, many));
    let loaded = world.load();
    assert_eq!(cloned(&loaded), world.entries());
    // Only what changed is written again: the page, and those above it.
    world.device.take_calls();
    world.does(&Record::Rename {
        id: VolumeId(many),
        name: "other".parse().unwrap(),
    });
    let places = world
        .ledger
        .look(|metadata| metadata.catalog_places.clone());
    world.checkpoint();
    let moved = world
        .ledger
        .look(|metadata| metadata.catalog_places.clone());
    let changed: Vec<usize> = places
        .iter()
        .zip(&moved)
        .map(|(old, new)| old.iter().zip(new).filter(|(old, new)| old != new).count())
        .collect();
    assert_eq!(changed, [1, 1, 1]);
    assert_eq!(cloned(&world.load()), world.entries());

    // Some page that is lost costs what it held, and nothing else.
    let lost = places[0][100].unwrap();
    world.device.set_block(lost.pba, &[0; BLOCK_LEN]);
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    assert_eq!(
        now(load(&world.device, &found)).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    let (partial, losses) = now(load_readable(&world.device, &found)).unwrap();
    let slots: Vec<_> = losses
        .catalog
        .iter()
        .map(|(slots, _)| slots.clone())
        .collect();
    let held = 100 * SLOTS_PER_PAGE..101 * SLOTS_PER_PAGE;
    assert_eq!(slots, std::slice::from_ref(&held));
    assert_eq!(partial.catalog.entries().len() as u64, many - 15);
    let lost = moved[1][0].unwrap();
    world.device.set_block(lost.pba, &[0; BLOCK_LEN]);
    let (partial, losses) = now(load_readable(&world.device, &found)).unwrap();
    assert_eq!(
        losses.catalog[0].0,
        0..SLOTS_PER_PAGE * CATALOG_INDEX_ENTRIES
    );
    assert_eq!(partial.catalog.entries().len(), 20);

    for number in 2..=many {
        world.does(&Record::Remove {
            id: VolumeId(number),
        });
        let reclaim = world
            .ledger
            .adjust_reading(&world.device, |draft| draft.reclaim(VolumeId(number)));
        now(reclaim).unwrap();
        if number % 500 == 0 {
            world.checkpoint();
        }
    }
    world.checkpoint();
    assert_eq!(world.load().catalog.slot_count(), 1);
    world.checkpoint();
    let left = world.ledger.look(|metadata| metadata.space.used_blocks());
    assert_eq!(left, small);
}

#[test]
fn a_superblock_with_a_catalog_of_another_size_is_damaged() {
    let world = World::new();
    world.does(&create(1));
    world.checkpoint();
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    let wrong: [fn(&mut Superblock); 4] = [
        |superblock| superblock.catalog_slots = 0,
        |superblock| superblock.catalog_slots = 16,
        |superblock| superblock.catalog_level = 1,
        |superblock| superblock.catalog = None,
    ];
    for change in wrong {
        let mut superblock = found.clone();
        change(&mut superblock);
        let error = now(load(&world.device, &superblock)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    let mut other = found.clone();
    other.metadata_id = MetadataId([9; 16]);
    assert!(now(load(&world.device, &other)).is_err());
    // A number beyond the next one: the entry is lost, the rest is not.
    let mut early = found;
    early.next_id = 1;
    let (metadata, losses) = now(load_readable(&world.device, &early)).unwrap();
    assert_eq!(losses.catalog.len(), 1);
    assert_eq!(losses.catalog[0].0, 0..1);
    assert!(metadata.catalog.entries().is_empty());
}

#[test]
fn a_lost_index_page_names_the_regions_below() {
    let world = World::new();
    world.does(&create(1));
    world.map(0, 3000, 3);
    world.checkpoint();
    let found = now(read_superblocks(&world.device, BLOCKS))
        .unwrap()
        .superblock;
    let all = 0..layout::region_count(BLOCKS);
    for level in 1..=3 {
        for slot in [layout::Slot::A, layout::Slot::B] {
            let at = layout::index_slot(level, 0, slot);
            let before = world.device.block(at);
            if before == [0; BLOCK_LEN] {
                continue;
            }
            world.device.flip(at, 8 * 60);
            let (metadata, losses) = now(load_readable(&world.device, &found)).unwrap();
            let regions: Vec<_> = losses.counts.iter().map(|(lost, _)| lost.clone()).collect();
            assert_eq!(regions, std::slice::from_ref(&all), "level {level}");
            assert_eq!(metadata.catalog.volume_count(), 1);
            let error = now(load(&world.device, &found)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            world.device.set_block(at, &before);
        }
    }
    let role = world.entries()[0].role.clone();
    assert!(matches!(role, Role::Volume { .. }));
}
