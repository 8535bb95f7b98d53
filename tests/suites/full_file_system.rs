//! A sparse pool on a file system that is full: what needs no new room goes on, and nothing is lost.

use blockfork::device::Device;
use blockfork::error::ErrorKind;
use blockfork::pool::{Attached, Pool};
use blockfork_tests::fixture::{attach, open, path, pool, put, reclaim, stamp, volume};
use blockfork_tests::sim_device::SimDevice;
use futures_lite::future::block_on;
use std::sync::Arc;

const POOL_BLOCKS: u64 = 16384;
/// What the file system has beyond the pool's fixed part.
const ROOM_BLOCKS: usize = 3000;

/// A pool whose file system is full: `v` with 1000 blocks of 1, its snapshot `v@s`, 200 of those redirected with 2; `w`
/// with 200 exclusive blocks of 3.
fn full() -> (SimDevice, Arc<Pool>, Arc<Attached>, Arc<Attached>) {
    let (device, pool) = pool(POOL_BLOCKS);
    drop(pool);
    device.set_room(ROOM_BLOCKS);
    let pool = open(&device).unwrap();
    let v = volume(&device, &pool, "v", 4096);
    put(&device, &v, 0, 1000, 1).unwrap();
    let w = volume(&device, &pool, "w", 1024);
    put(&device, &w, 0, 200, 3).unwrap();
    block_on(pool.snapshot(&device, &[path("v@s")])).unwrap();
    put(&device, &v, 0, 200, 2).unwrap();
    block_on(pool.flush(&device)).unwrap();
    device.take_all_room();
    let refused = put(&device, &v, 2000, 100, 4).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfSpace);
    (device, pool, v, w)
}

fn assert_clean(device: &SimDevice, pool: &Pool) {
    let report = block_on(pool.check(device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
}

#[test]
fn a_refused_write_leaves_what_was_there() {
    let (device, pool, v, w) = full();
    assert_eq!(stamp(&device, &v, 2000), 0);
    assert_eq!(stamp(&device, &v, 0), 2);
    assert_eq!(stamp(&device, &v, 999), 1);
    assert_eq!(stamp(&device, &w, 199), 3);
    assert_eq!(stamp(&device, &attach(&pool, "v@s"), 0), 1);
    assert_clean(&device, &pool);
}

#[test]
fn exclusive_blocks_are_overwritten_and_flushed() {
    let (device, pool, _v, w) = full();
    for round in 5..15 {
        put(&device, &w, 0, 200, round).unwrap();
        block_on(pool.flush(&device)).unwrap();
    }
    assert_eq!(stamp(&device, &w, 100), 14);
}

#[test]
fn snapshots_rollbacks_discards_and_removals_are_recorded_and_outlive_a_crash() {
    let (device, pool, v, w) = full();
    block_on(pool.snapshot(&device, &[path("w@t")])).unwrap();
    block_on(w.discard(&device, 0, 100 * 4096)).unwrap();
    block_on(pool.flush(&device)).unwrap();
    v.detach();
    block_on(pool.rollback(&device, &path("v@s"))).unwrap();
    block_on(pool.remove(&device, &[path("v@s")], false, false)).unwrap();
    drop((v, w, pool));
    let pool = open(&device).unwrap();
    let (v, w) = (attach(&pool, "v"), attach(&pool, "w"));
    assert_eq!(stamp(&device, &v, 0), 1);
    assert_eq!(stamp(&device, &w, 0), 0);
    assert_eq!(stamp(&device, &w, 100), 3);
    assert_eq!(stamp(&device, &attach(&pool, "w@t"), 0), 3);
    assert_clean(&device, &pool);
}

#[test]
fn what_is_removed_makes_room_for_new_blocks() {
    let (device, pool, v, w) = full();
    v.detach();
    block_on(pool.remove(&device, &[path("v")], true, false)).unwrap();
    reclaim(&device, &pool);
    block_on(pool.checkpoint(&device)).unwrap();
    put(&device, &w, 200, 500, 7).unwrap();
    block_on(pool.flush(&device)).unwrap();
    assert_eq!(stamp(&device, &w, 699), 7);
    assert_clean(&device, &pool);
}

#[test]
fn a_checkpoint_without_any_room_is_written_when_there_is_some() {
    let (device, pool, v, w) = full();
    // Not even what was kept back is there.
    device.release_ballast();
    let taken = device.take_all_room();
    let refused = block_on(pool.checkpoint(&device)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfSpace);
    put(&device, &w, 0, 200, 8).unwrap();
    block_on(pool.flush(&device)).unwrap();
    block_on(pool.snapshot(&device, &[path("w@t")])).unwrap();
    let again = block_on(pool.checkpoint(&device)).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::OutOfSpace);
    device.give_room(taken);
    block_on(pool.checkpoint(&device)).unwrap();
    assert_eq!(stamp(&device, &v, 199), 2);
    assert_eq!(stamp(&device, &w, 0), 8);
    drop((v, w, pool));
    let pool = open(&device).unwrap();
    assert_eq!(stamp(&device, &attach(&pool, "w@t"), 0), 8);
    assert_eq!(stamp(&device, &attach(&pool, "v"), 500), 1);
    assert_clean(&device, &pool);
}
