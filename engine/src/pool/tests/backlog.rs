//! What is appended to the shared ring is bounded by the ring, whoever appends it and however many there are at once.

use super::*;
use crate::journal::{CHANGE_BYTES_MAX, Ring, RingOwner, ring_bytes};

const RING_BYTES: usize = 64 << 10;

/// Gives the pool a ring of 64 KiB, whose file is gone already.
fn use_a_small_ring(pool: &Pool, name: &str) {
    let process = std::process::id();
    let path = std::env::temp_dir().join(format!("blockfork-backlog-{name}-{process}"));
    let owner = RingOwner {
        pool: pool.id(),
        boot_id: [1; 16],
        session: 1,
    };
    let ring = Ring::create_sized(&path, owner, RING_BYTES).unwrap();
    std::fs::remove_file(path).unwrap();
    pool.ledger.freeze(|state| state.set_ring(Some(ring)));
}

#[test]
#[cfg_attr(miri, ignore = "needs a mapped file")]
fn writers_that_wait_for_one_page_do_not_overflow_the_ring_together() {
    let (memory, clock) = (Memory::default(), Arc::new(ManualClock::default()));
    let blocks = 16_384;
    make(&memory, blocks);
    let pool = open(&memory, blocks, Arc::clone(&clock) as Arc<dyn Clock>);
    let v = volume(&memory, &pool, "v", 8 * LEAF);
    for leaf in 0..8 {
        put(&memory, &v, leaf * LEAF, 1);
    }
    v.detach();
    now(pool.close(&memory)).unwrap();
    let pool = open(&memory, blocks, clock);
    use_a_small_ring(&pool, "writers");
    let (device, v) = (Hesitant(&memory), pool.attach(&path("v"), false).unwrap());
    let mut buffer = BlockBuf::zeroed(1);
    buffer.fill(9);
    // Each appends more than 40 bytes, and all of them find the ring empty when they begin.
    let (device, v, buffer) = (&device, &v, &buffer);
    let write = |lba: u64| Box::pin(async move { v.write(device, lba * 4096, &buffer[..]).await });
    let lbas = (0..8 * LEAF).filter(|lba| !lba.is_multiple_of(LEAF));
    let mut writes: Vec<_> = lbas.map(write).collect();
    assert!(writes.len() * 40 > 2 * RING_BYTES);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..10_000 {
        writes.retain_mut(|write| match write.as_mut().poll(&mut context) {
            Poll::Ready(written) => {
                written.unwrap();
                false
            }
            Poll::Pending => true,
        });
        if writes.is_empty() {
            return;
        }
    }
    panic!("{} writes wait for ever", writes.len());
}

#[test]
#[cfg_attr(miri, ignore = "needs a mapped file")]
fn more_snapshots_than_the_ring_has_room_for_are_removed_at_once() {
    let (device, clock) = (Memory::default(), Arc::new(ManualClock::default()));
    make(&device, 16_384);
    let pool = open(&device, 16_384, clock);
    volume(&device, &pool, "v", LEAF).detach();
    let count = 3000;
    for first in (0..count).step_by(250) {
        let targets: Vec<VolumePath> = (first..first + 250)
            .map(|number| path(&format!("v@{number}")))
            .collect();
        now(pool.snapshot(&device, &targets)).unwrap();
    }
    use_a_small_ring(&pool, "removal");
    let single = Record::Remove { id: VolumeId(1) };
    assert!(ring_bytes(&[single]) * count > RING_BYTES);
    let removal = now(pool.remove(&device, &[path("v")], true, false)).unwrap();
    assert_eq!(removal.ids.len(), count + 1);
    assert_eq!(pool.status().snapshots, 0);
    assert_eq!(pool.status().volumes, 0);
}

#[test]
fn every_entry_that_a_pool_can_have_is_removed_in_one_change() {
    for gap in [1, 2, 100, 1000, 100_000] {
        let ids: Vec<VolumeId> = (1..=crate::limits::VOLUMES_MAX as u64)
            .map(|number| VolumeId(number * gap))
            .collect();
        let records = Record::removals(&ids);
        assert!(ring_bytes(&records) <= CHANGE_BYTES_MAX, "{gap}");
        let removed = records.iter().flat_map(|record| {
            if let Record::RemoveAll { ids } = record {
                ids.clone()
            } else {
                assert_eq!(
                    record,
                    &Record::Remove {
                        id: ids[ids.len() - 1]
                    }
                );
                vec![ids[ids.len() - 1]]
            }
        });
        assert!(removed.eq(ids.iter().copied()), "{gap}");
    }
}
