//! Where blocks come to lie on the device: what is read in one piece is to be one piece there.

use blockfork::pool::{Attached, Transfer};
use blockfork_tests::fixture::{path, pool, put, stamp, volume};
use fastrand::Rng;
use futures_lite::future::block_on;

/// The runs on the device in which the blocks of a volume lie.
fn runs(attached: &Attached, blocks: u64) -> usize {
    let offset = |lba: u64| {
        let direct = attached.direct(Transfer::Read, lba * 4096, 4096);
        direct.expect("a mapped block").offset()
    };
    let breaks = (1..blocks).filter(|lba| offset(*lba) != offset(lba - 1) + 4096);
    breaks.count() + 1
}

const BLOCKS: u64 = 2048;

#[test]
fn a_volume_written_at_random_after_a_snapshot_stays_in_long_runs() {
    let (device, pool) = pool(8192);
    let attached = volume(&device, &pool, "a", BLOCKS);
    put(&device, &attached, 0, BLOCKS, 1).unwrap();
    assert!(runs(&attached, BLOCKS) <= 4);
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    let mut order: Vec<u64> = (0..BLOCKS).collect();
    Rng::with_seed(1).shuffle(&mut order);
    for lba in order {
        put(&device, &attached, lba, 1, 2).unwrap();
    }
    let runs = runs(&attached, BLOCKS);
    assert!(runs <= 72, "64 groups of 32 blocks lie in {runs} runs");
    for lba in 0..BLOCKS {
        assert_eq!(stamp(&device, &attached, lba), 2);
    }
}

#[test]
fn blocks_written_one_after_the_other_after_a_snapshot_lie_in_one_run() {
    let (device, pool) = pool(8192);
    let attached = volume(&device, &pool, "a", BLOCKS);
    put(&device, &attached, 0, BLOCKS, 1).unwrap();
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    for lba in 0..BLOCKS {
        put(&device, &attached, lba, 1, 2).unwrap();
    }
    // A region's counts, and pages, stand between the runs.
    assert!(runs(&attached, BLOCKS) <= 8);
}

#[test]
fn a_group_whose_places_are_taken_goes_elsewhere() {
    let (device, pool) = pool(8192);
    let attached = volume(&device, &pool, "a", BLOCKS);
    put(&device, &attached, 0, BLOCKS, 1).unwrap();
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    put(&device, &attached, 40, 1, 2).unwrap();
    // Somebody else takes everything that is free, then gives back what may lie anywhere.
    let other = volume(&device, &pool, "b", 8192);
    let mut taken = 0;
    while put(&device, &other, taken, 1, 3).is_ok() {
        taken += 1;
    }
    block_on(other.discard(&device, 0, 64 * 4096)).unwrap();
    block_on(pool.checkpoint(&device)).unwrap();
    for lba in 41..72 {
        put(&device, &attached, lba, 1, 4).unwrap();
    }
    for lba in 41..72 {
        assert_eq!(stamp(&device, &attached, lba), 4);
    }
    assert_eq!(stamp(&device, &attached, 40), 2);
    assert_eq!(stamp(&device, &attached, 72), 1);
}
