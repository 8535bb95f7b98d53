//! Commits on a device in memory: what they write, in which order, and what is read back of it.

use super::commit::Commit;
use super::*;
use crate::clock::ManualClock;
use crate::device::memory::{Call, Memory, now};
use crate::format::counts::IndexEntry;
use crate::format::host::Host;
use crate::format::journal::{BlockHeader, Framed, encode_blocks};
use crate::format::layout::{self, TOP_ENTRIES};
use crate::format::superblock::Superblock;
use crate::map::MapStore;
use crate::metadata::Catalog;
use crate::space::SpaceMap;
use crate::units::{BLOCK_LEN, Extent, Lba, Timestamp};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

pub(crate) const BLOCKS: u64 = 4096;

/// The superblock of an empty pool that was opened twice.
pub(crate) fn superblock() -> Superblock {
    Superblock {
        id: PoolId([7; 16]),
        metadata_id: MetadataId([7; 16]),
        name: "p".parse().unwrap(),
        created: Timestamp(1),
        blocks: BLOCKS,
        generation: Generation(1),
        session: 2,
        is_clean: true,
        boot_id: [0; 16],
        host: Host::default(),
        written: Timestamp(1),
        ring: None,
        forbids_overcommit: false,
        journal: layout::journal(BLOCKS),
        journal_block: 0,
        journal_chain: 0,
        seq: Seq(1),
        next_id: 1,
        catalog: None,
        catalog_level: 0,
        catalog_slots: 0,
        counts: Box::new([IndexEntry::default(); TOP_ENTRIES]),
    }
}

/// The metadata of that pool, all counts in memory.
pub(crate) fn metadata() -> Metadata {
    let mut space = SpaceMap::new(BLOCKS, layout::journal(BLOCKS));
    for region in 0..layout::region_count(BLOCKS) {
        space.load(region, None, None).unwrap();
    }
    Metadata {
        id: superblock().id,
        page_id: superblock().metadata_id,
        space,
        map: MapStore::new(Generation(2)),
        catalog: Catalog::new("p".parse().unwrap(), 1),
        catalog_places: Vec::new(),
    }
}

/// A ledger over them, whose journal goes on at block `next`.
pub(crate) fn ledger(next: u64) -> Ledger {
    ledger_by(next, Arc::new(ManualClock::default()))
}

fn ledger_by(next: u64, clock: Arc<ManualClock>) -> Ledger {
    let tail = Tail {
        place: layout::journal(BLOCKS),
        next,
        chain: 0,
        oldest: next,
        session: 3,
    };
    Ledger::new(metadata(), Seq(1), tail, None, clock)
}

/// The record that makes volume `number`.
pub(crate) fn create(number: u64) -> Record {
    Record::Create {
        id: VolumeId(number),
        name: format!("v{number}").parse().unwrap(),
        bytes: 1 << 20,
        sector_bytes: 4096,
        redirects_always: false,
        created: Timestamp(number),
    }
}

fn apply(ledger: &Ledger, device: &Memory, record: &Record) -> Result<()> {
    now(ledger.change(device, 0, |draft| draft.apply(record))).map(|applied| applied.expect("room"))
}

/// Gives block 9 of volume 1 a block.
fn map_a_block(draft: &mut Draft<'_>) -> Result<(), Fault> {
    let extent = draft.metadata().space.reserve(Pba(3000), 1)?;
    draft.apply(&Record::Map {
        volume: VolumeId(1),
        lba: Lba(9),
        pba: extent.start,
        count: 1,
    })
}

fn whole(records: impl Iterator<Item = u64>) -> Vec<Framed> {
    let framed = |number| Framed {
        record: create(number),
        continues: false,
    };
    records.map(framed).collect()
}

#[test]
fn a_commit_reads_back_as_what_was_applied_around_the_journals_end() {
    let place = layout::journal(BLOCKS);
    let begin = place.count - 2;
    let (device, ledger) = (Memory::default(), ledger(begin));
    assert!(!ledger.has_pending());
    for number in 1..=300 {
        apply(&ledger, &device, &create(number)).unwrap();
    }
    assert!(ledger.has_pending());
    assert_eq!((ledger.durable(), ledger.commits()), (Seq(0), 0));
    assert_eq!(device.take_calls(), []);
    assert_eq!(now(ledger.commit(&device)).unwrap(), Committed::Done);
    let calls = device.take_calls();
    let Some(Call::Write(_, around)) = calls.get(1) else {
        panic!("{calls:?}")
    };
    assert_eq!(
        calls,
        [
            Call::Write(place.start.0 + begin, 2),
            Call::Write(place.start.0, *around),
            Call::Flush
        ]
    );
    assert_eq!((ledger.durable(), ledger.commits()), (Seq(300), 1));
    assert!(!ledger.has_pending());
    let used = 2 + around;
    assert_eq!(ledger.journal_usage(), Some((used, place.count)));
    // Nothing to write: one flush of the data is enough.
    assert_eq!(now(ledger.commit(&device)).unwrap(), Committed::Done);
    assert_eq!(device.take_calls(), [Call::Flush]);
    assert_eq!((ledger.durable(), ledger.commits()), (Seq(300), 2));
    // The next commit goes on where the last ended.
    apply(&ledger, &device, &create(301)).unwrap();
    now(ledger.commit(&device)).unwrap();
    assert_eq!(ledger.journal_usage(), Some((used + 1, place.count)));

    let mut from = superblock();
    from.journal_block = begin;
    for may_be_lost in [false, true] {
        let read = now(read_journal(&device, &from, may_be_lost)).unwrap();
        assert_eq!(read.records, whole(1..=301));
        assert_eq!(read.next_seq, Seq(302));
        assert_eq!(
            (read.tail.next, read.beyond),
            (begin + used + 1, begin + used + 1)
        );
        assert_eq!((read.tail.oldest, read.tail.session), (begin, 3));
        assert!(read.lost.is_none());
    }
    // What a checkpoint covers is not read.
    from.journal_chain = 1;
    assert_eq!(
        now(read_journal(&device, &from, false)).unwrap().records,
        []
    );
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_journal_that_is_full_to_its_last_block_is_read_once_around() {
    let (device, from) = (Memory::default(), superblock());
    let count = from.journal.count;
    let ledger = ledger(0);
    for number in 1..=count {
        apply(&ledger, &device, &create(number)).unwrap();
        let committed = now(ledger.commit(&device)).unwrap();
        assert_eq!(committed, Committed::Done, "commit {number}");
    }
    assert_eq!(ledger.journal_usage(), Some((count, count)));
    let read = now(read_journal(&device, &from, true)).unwrap();
    assert_eq!(read.records, whole(1..=count));
    assert_eq!((read.tail.next, read.beyond), (count, count));
    assert!(read.lost.is_none());
    // No room is left; nothing of what waits is touched.
    device.take_calls();
    apply(&ledger, &device, &create(count + 1)).unwrap();
    let full = now(ledger.commit(&device)).unwrap();
    assert_eq!(full, Committed::JournalFull);
    assert!(ledger.has_pending());
    assert_eq!(device.take_calls(), []);
    assert_eq!(ledger.durable(), Seq(count));
}

#[test]
fn what_waits_must_fit_into_the_free_blocks() {
    let commit = |next, oldest| {
        Commit::new(Tail {
            place: Extent::new(Pba(1030), 128),
            next,
            chain: 0,
            oldest,
            session: 1,
        })
    };
    assert!(!commit(228, 100).fits(0));
    assert!(commit(227, 100).fits(3499));
    assert!(!commit(227, 100).fits(3500));
    assert!(commit(100, 100).fits(3500 * 128 - 1));
    assert!(!commit(100, 100).fits(3500 * 128));
}

#[test]
fn those_who_wait_for_a_commit_share_the_next() {
    let (device, ledger) = (Memory::default(), ledger(0));
    apply(&ledger, &device, &create(1)).unwrap();
    let held = now(ledger.hold_commits());
    assert_eq!(ledger.journal_usage(), None);
    let mut waker = Context::from_waker(Waker::noop());
    let mut one = pin!(ledger.commit(&device));
    let mut two = pin!(ledger.commit(&device));
    assert!(one.as_mut().poll(&mut waker).is_pending());
    assert!(two.as_mut().poll(&mut waker).is_pending());
    drop(held);
    for waiting in [one, two] {
        let Poll::Ready(done) = waiting.poll(&mut waker) else {
            panic!("nobody else commits")
        };
        assert_eq!(done.unwrap(), Committed::Done);
    }
    assert_eq!(ledger.commits(), 1);
    let written = Call::Write(layout::journal(BLOCKS).start.0, 1);
    assert_eq!(device.take_calls(), [written, Call::Flush]);
}

/// What a commit of one more record asks of the device.
fn commit_one(ledger: &Ledger, device: &Memory, number: u64) -> Vec<Call> {
    apply(ledger, device, &create(number)).unwrap();
    now(ledger.commit(device)).unwrap();
    device.take_calls()
}

#[test]
fn what_names_data_follows_it_to_the_device() {
    let (device, ledger) = (Memory::default(), ledger(0));
    let journal = layout::journal(BLOCKS).start.0;
    apply(&ledger, &device, &create(1)).unwrap();
    now(ledger.commit(&device)).unwrap();
    device.take_calls();
    now(ledger.change(&device, 0, map_a_block)).unwrap();
    // What comes behind it in the same commit waits too.
    assert_eq!(
        commit_one(&ledger, &device, 2),
        [Call::Flush, Call::Write(journal + 1, 1), Call::Flush]
    );
    // The next one owes nothing to it.
    assert_eq!(
        commit_one(&ledger, &device, 3),
        [Call::Write(journal + 2, 1), Call::Flush]
    );
}

#[test]
fn nothing_follows_what_a_checkpoint_wrote_before_that_is_durable() {
    let (device, ledger) = (Memory::default(), ledger(0));
    let journal = layout::journal(BLOCKS).start.0;
    let leave_to_a_checkpoint = |number| {
        apply(&ledger, &device, &create(number)).unwrap();
        let mut held = now(ledger.hold_commits());
        let batch = ledger.freeze(State::take_pending);
        assert!(now(ledger.write_if_fits(&device, &mut held, &batch)).unwrap());
    };
    leave_to_a_checkpoint(1);
    assert_eq!(device.take_calls(), [Call::Write(journal, 1)]);
    // Lost with the power, the block before would look like damage: a later commit says that it was durable.
    assert_eq!(
        commit_one(&ledger, &device, 2),
        [Call::Flush, Call::Write(journal + 1, 1), Call::Flush]
    );
    assert_eq!(
        commit_one(&ledger, &device, 3),
        [Call::Write(journal + 2, 1), Call::Flush]
    );
    // A commit without records makes it durable too.
    leave_to_a_checkpoint(4);
    now(ledger.commit(&device)).unwrap();
    assert_eq!(
        device.take_calls(),
        [Call::Write(journal + 3, 1), Call::Flush]
    );
    assert_eq!(
        commit_one(&ledger, &device, 5),
        [Call::Write(journal + 4, 1), Call::Flush]
    );
}

#[test]
fn a_commit_waits_for_those_who_shared_the_last_where_flushes_take_long() {
    // A tenth of a commit in eight steps, and no more than 5 ms.
    let (none, eight) = (vec![], |micros| {
        vec![Call::Pause(Duration::from_micros(micros)); 8]
    });
    for (flush_us, mut expected) in [
        (0, none.clone()),
        (499, none),
        (20_000, eight(250)),
        (2_000_000, eight(625)),
    ] {
        let clock = Arc::new(ManualClock::default());
        let (device, ledger) = (Memory::default(), ledger_by(0, Arc::clone(&clock)));
        device.make_flushes_take(flush_us * 1000, clock);
        // One who asks alone never waits.
        for _ in 0..2 {
            now(ledger.commit(&device)).unwrap();
        }
        assert_eq!(device.take_calls(), [Call::Flush; 2]);
        // Three share a commit.
        let held = now(ledger.hold_commits());
        let mut waker = Context::from_waker(Waker::noop());
        let mut asking = [(); 3].map(|()| Box::pin(ledger.commit(&device)));
        for one in &mut asking {
            assert!(one.as_mut().poll(&mut waker).is_pending());
        }
        drop(held);
        for one in asking {
            assert_eq!(now(one).unwrap(), Committed::Done);
        }
        assert_eq!(device.take_calls(), [Call::Flush]);
        // The first to come back gives the others time, once.
        now(ledger.commit(&device)).unwrap();
        expected.push(Call::Flush);
        assert_eq!(device.take_calls(), expected);
        now(ledger.commit(&device)).unwrap();
        assert_eq!(device.take_calls(), [Call::Flush]);
    }
}

#[test]
fn a_failed_flush_or_journal_write_is_for_good() {
    let journal = layout::journal(BLOCKS).start.0;
    for refused in [Call::Flush, Call::Write(journal, 1)] {
        let (device, ledger) = (Memory::default(), ledger(0));
        apply(&ledger, &device, &create(1)).unwrap();
        device.refuse(Some(refused));
        let failed = now(ledger.commit(&device)).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Io);
        assert!(ledger.is_poisoned());
        device.refuse(None);
        let later = [
            now(ledger.commit(&device)).map(drop),
            now(ledger.flush_device(&device)),
            apply(&ledger, &device, &create(2)),
            ledger.check_poison(),
        ];
        for answer in later {
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::Poisoned);
        }
        assert_eq!((ledger.durable(), ledger.commits()), (Seq(0), 0));
        // Looking goes on.
        assert_eq!(ledger.look(|metadata| metadata.catalog.volume_count()), 1);
    }
}

#[test]
fn writers_wait_once_too_much_waits_for_a_commit() {
    let ledger = ledger(0);
    for (bytes, is_too_much) in [
        (0, false),
        (JOURNAL_PENDING_BYTES_MAX - 1, false),
        (JOURNAL_PENDING_BYTES_MAX, true),
    ] {
        ledger.freeze(|state| state.pending = vec![0; bytes]);
        assert_eq!(ledger.is_backlogged(), is_too_much);
    }
}

#[test]
fn records_that_belong_together_are_all_prepared_before_one_is_applied() {
    let (device, ledger) = (Memory::default(), ledger(0));
    let both = [create(1), create(2)];
    now(ledger.change(&device, 0, |draft| draft.apply_all(&both))).unwrap();
    // The second of these cannot be, so the first is not either.
    let clash = [create(3), create(1)];
    let refused = now(ledger.change(&device, 0, |draft| draft.apply_all(&clash)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(ledger.look(|metadata| metadata.catalog.volume_count()), 2);
    now(ledger.commit(&device)).unwrap();
    let mut read = now(read_journal(&device, &superblock(), false)).unwrap();
    let continues: Vec<bool> = read.records.iter().map(|framed| framed.continues).collect();
    assert_eq!(continues, [true, false]);
    // Whole changes stay; one that was cut goes, all of it.
    drop_cut_change(&mut read.records);
    assert_eq!(read.records.len(), 2);
    read.records[1].continues = true;
    drop_cut_change(&mut read.records);
    assert_eq!(read.records, []);
}

/// Journal blocks of commits with so many records each; how many blocks each commit has.
fn commits(device: &Memory, superblock: &Superblock, sizes: &[u64]) -> Vec<u64> {
    let mut header = BlockHeader {
        metadata: superblock.metadata_id,
        number: superblock.journal_block,
        chain: superblock.journal_chain,
        first_seq: superblock.seq,
        batch: superblock.journal_block,
        session: superblock.session,
    };
    let mut lengths = Vec::new();
    for size in sizes {
        header.batch = header.number;
        let mut bytes = Vec::new();
        for number in header.first_seq.0..header.first_seq.0 + size {
            encode_framed(&create(number), false, &mut bytes);
        }
        let (blocks, chain) = encode_blocks(&bytes, header).unwrap();
        for (number, block) in (header.number..).zip(&blocks) {
            let at = number % superblock.journal.count;
            device.set_block(superblock.journal.start.plus(at), block);
        }
        lengths.push(blocks.len() as u64);
        header.number += blocks.len() as u64;
        header.chain = chain;
        header.first_seq = Seq(header.first_seq.0 + size);
    }
    lengths
}

/// A journal with commits of one, two and two blocks, that goes around its end; where its block `index` stands.
fn five_blocks(device: &Memory) -> (Superblock, impl Fn(u64) -> Pba) {
    let mut from = superblock();
    from.journal_block = 3 * from.journal.count - 2;
    from.journal_chain = 77;
    assert_eq!(commits(device, &from, &[10, 150, 150]), [1, 2, 2]);
    let (journal, first) = (from.journal, from.journal_block);
    (from, move |index| {
        journal.start.plus((first + index) % journal.count)
    })
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_flipped_bit_at_the_journals_end_is_damage_and_a_torn_commit_is_not() {
    for index in 0..5 {
        let device = Memory::default();
        let (from, at) = five_blocks(&device);
        let whole = now(read_journal(&device, &from, true)).unwrap();
        assert!(whole.lost.is_none());
        let end = from.journal_block + 5;
        assert_eq!(
            (whole.records.len(), whole.tail.next, whole.beyond),
            (310, end, end)
        );

        device.flip(at(index), 8 * 2000);
        let read = now(read_journal(&device, &from, true)).unwrap();
        assert_eq!(read.tail.next, from.journal_block + index);
        let lost = read.lost.expect("a bit is flipped");
        assert_eq!(lost.kind(), ErrorKind::Corrupt);
        assert!(lost.to_string().contains("one bit"), "{lost}");
        assert!(lost.to_string().contains(&at(index).to_string()), "{lost}");
        // The flipped block itself counts as there, whatever stands behind it.
        assert!(read.beyond >= end, "{} {end}", read.beyond);
        // After a proper close nobody looks.
        let closed = now(read_journal(&device, &from, false)).unwrap();
        assert!(closed.lost.is_none());
        assert_eq!(closed.beyond, closed.tail.next);

        device.set_block(at(index), &[0; BLOCK_LEN]);
        let read = now(read_journal(&device, &from, true)).unwrap();
        assert_eq!(read.tail.next, from.journal_block + index);
        // Only where a later commit stands behind is it certain that the block was durable.
        assert_eq!(read.lost.is_some(), index < 3, "block {index}");
        if let Some(lost) = read.lost {
            assert!(lost.to_string().contains("later commit"), "{lost}");
        }
        let known = end - u64::from(index == 4);
        assert_eq!(read.beyond, known, "block {index}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn blocks_of_an_earlier_lap_or_another_pool_say_nothing() {
    let device = Memory::default();
    // An earlier lap filled the whole circle.
    let mut earlier = superblock();
    earlier.journal_block = superblock().journal.count;
    commits(&device, &earlier, &vec![1; 128]);
    let (from, at) = five_blocks(&device);
    device.set_block(at(4), &[0; BLOCK_LEN]);
    let read = now(read_journal(&device, &from, true)).unwrap();
    assert!(read.lost.is_none());
    assert_eq!(read.beyond, from.journal_block + 4);
    let mut other = from.clone();
    other.metadata_id = MetadataId([8; 16]);
    let read = now(read_journal(&device, &other, true)).unwrap();
    assert_eq!((read.records.len(), read.beyond), (0, from.journal_block));
    assert!(read.lost.is_none());
}

#[test]
fn a_journal_that_cannot_be_read_is_an_error() {
    let device = Memory::default();
    let (from, at) = five_blocks(&device);
    let refused = Call::Read(at(2).0, from.journal.count);
    device.refuse(Some(refused));
    let failed = now(read_journal(&device, &from, false)).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Io);
    assert!(device.take_calls().contains(&refused));
}

/// A volume of one mapped block whose map page and counts are on the device only.
fn on_device(device: &Memory) -> (Ledger, crate::format::catalog::Root) {
    let ledger = ledger(0);
    apply(&ledger, device, &create(1)).unwrap();
    now(ledger.change(device, 0, map_a_block)).unwrap();
    let root = ledger.look(|metadata| metadata.catalog.get(VolumeId(1)).unwrap().entry.root);
    let frozen = ledger.adjust(|metadata| metadata.map.freeze());
    for page in frozen {
        let identity = PageIdentity {
            metadata: ledger.metadata_id,
            kind: PageKind::Map,
            level: page.page.level,
            ptr: page.ptr,
        };
        let bytes = map_page::encode(&page.page.node, page.page.mapped, identity);
        device.set_block(page.ptr.pba, &bytes[..]);
    }
    ledger.adjust(|metadata| metadata.map = MapStore::new(Generation(3)));
    (ledger, root)
}

#[test]
fn what_is_missing_is_read_once_and_damage_is_no_poison() {
    let device = Memory::default();
    let (ledger, root) = on_device(&device);
    device.take_calls();
    let mapped = || now(ledger.view(&device, |metadata| metadata.map.mapped(root)));
    assert_eq!(mapped().unwrap(), 1);
    let pba = root.ptr.unwrap().pba;
    assert_eq!(device.take_calls(), [Call::Read(pba.0, 1)]);
    assert_eq!(mapped().unwrap(), 1);
    assert_eq!(device.take_calls(), []);
    // Those who own the metadata alone get it in the same way.
    let mut owned = metadata();
    let count = owned.with_supply(&device, |metadata| metadata.map.mapped(root));
    assert_eq!(now(count).unwrap(), 1);

    ledger.adjust(|metadata| metadata.map = MapStore::new(Generation(3)));
    device.flip(pba, 8 * 100);
    assert_eq!(mapped().unwrap_err().kind(), ErrorKind::Corrupt);
    device.refuse(Some(Call::Read(pba.0, 1)));
    assert_eq!(mapped().unwrap_err().kind(), ErrorKind::Io);
    assert!(!ledger.is_poisoned());
    let count = owned.with_supply(&device, |metadata| {
        metadata.map = MapStore::new(Generation(3));
        metadata.map.mapped(root)
    });
    assert_eq!(now(count).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn counts_that_cannot_be_read_close_their_region_and_nothing_else() {
    let (device, ledger) = (Memory::default(), ledger(0));
    let bounds = ledger.look(|metadata| metadata.space.bounds());
    // The index says that region 1 was written; the page is not there.
    let mut space = SpaceMap::new(BLOCKS, bounds.journal);
    let mut index = crate::format::counts::empty_index();
    index[1] = IndexEntry {
        place: Some((layout::Slot::A, Generation(1))),
        free: 1000,
        ..index[1]
    };
    space.load_index(1, 0, &index).unwrap();
    ledger.adjust(|metadata| metadata.space = space);
    let missing = Missing::Counts(1);
    let free = || ledger.look(|metadata| metadata.space.free_for_data());
    let before = free();
    let error = now(ledger.supply(&device, Fault::Missing(missing))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(before - free(), 1000);
    assert!(!ledger.is_poisoned());
    // Somebody else has read it since: nothing is read again.
    now(ledger.supply(&device, Fault::Missing(Missing::Counts(2)))).unwrap();
    device.take_calls();
    now(ledger.supply(&device, Fault::Missing(Missing::Counts(2)))).unwrap();
    assert_eq!(device.take_calls(), []);
}
