//! Limits of volumes, on a pool in memory.

use super::*;
use crate::clock::ManualClock;
use crate::device::BlockBuf;
use crate::device::memory::{Memory, now};
use crate::pool::{
    Attached, CreateOptions, OpenOptions, Redirect, RingPlace, Transfer, VolumeOptions,
};
use crate::units::{BLOCK_LEN, PoolId, Timestamp};
use std::sync::Arc;

/// 16 MiB.
const BLOCKS: u64 = 4096;

pub(in crate::pool) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(in crate::pool) fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

fn open(device: &Memory) -> Arc<Pool> {
    open_by(device, Arc::default())
}

pub(in crate::pool) fn open_by(device: &Memory, clock: Arc<ManualClock>) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: 2 * BLOCKS,
        ring: RingPlace::Nowhere,
        clock,
    };
    Arc::new(now(Pool::open(device, options)).unwrap())
}

fn pool_options() -> CreateOptions {
    CreateOptions {
        name: name("p"),
        id: PoolId([7; 16]),
        blocks: BLOCKS,
        created: Timestamp(1),
    }
}

pub(in crate::pool) fn pool() -> (Memory, Arc<Pool>) {
    let device = Memory::default();
    now(Pool::create(&device, pool_options())).unwrap();
    let pool = open(&device);
    (device, pool)
}

pub(in crate::pool) fn options(blocks: u64) -> VolumeOptions {
    VolumeOptions {
        bytes: blocks * BLOCK_BYTES,
        sector_bytes: 4096,
        redirect: Redirect::Shared,
    }
}

pub(in crate::pool) fn quota(blocks: u64) -> Limits {
    Limits {
        quota_bytes: Some(blocks * BLOCK_BYTES),
        reserve_bytes: None,
    }
}

fn reserve(blocks: u64) -> Limits {
    Limits {
        quota_bytes: None,
        reserve_bytes: Some(blocks * BLOCK_BYTES),
    }
}

/// Writes blocks of a volume from `lba` on until nothing is free.
fn fill(device: &Memory, volume: &Attached, lba: u64) -> Error {
    let steps = (lba..)
        .step_by(64)
        .find(|lba| write(device, volume, *lba, 64).is_err());
    let mut rest = steps.unwrap()..;
    let error = rest
        .find_map(|lba| write(device, volume, lba, 1).err())
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::OutOfSpace, "{error}");
    error
}

fn set_aside_blocks(pool: &Pool) -> u64 {
    pool.status().set_aside_bytes / BLOCK_BYTES
}

/// An attached volume `w` of 8192 blocks.
fn other(device: &Memory, pool: &Arc<Pool>) -> Arc<Attached> {
    now(pool.create_volume(device, &name("w"), options(8192))).unwrap();
    pool.attach(&path("w"), false).unwrap()
}

pub(in crate::pool) fn set(limit: Limit, blocks: Option<u64>) -> [LimitChange; 1] {
    let bytes = blocks.map(|blocks| blocks * BLOCK_BYTES);
    [LimitChange { limit, bytes }]
}

/// A volume `v` of 2048 blocks.
pub(in crate::pool) fn volume(device: &Memory, pool: &Arc<Pool>, limits: Limits) -> Arc<Attached> {
    let v = name("v");
    now(pool.create_limited_volume(device, &v, options(2048), limits)).unwrap();
    pool.attach(&path("v"), false).unwrap()
}

pub(in crate::pool) fn write(
    device: &Memory,
    volume: &Attached,
    lba: u64,
    blocks: u64,
) -> Result<()> {
    let data = BlockBuf::zeroed(usize::try_from(blocks).unwrap());
    now(volume.write(device, lba * BLOCK_BYTES, &data[..]))
}

fn used_blocks(device: &Memory, pool: &Pool, of: &str) -> u64 {
    let entries = now(pool.list(device)).unwrap();
    let found = entries.iter().find(|entry| entry.path == path(of)).unwrap();
    found.used_bytes / BLOCK_BYTES
}

#[track_caller]
fn over_quota(done: Result<()>) -> String {
    let error = done.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OverQuota, "{error}");
    assert_eq!(error.errno(), libc::ENOSPC);
    error.to_string()
}

#[test]
fn a_quota_lets_exactly_so_many_blocks_be_mapped() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, quota(16));
    write(&device, &v, 0, 10).unwrap();
    let message = over_quota(write(&device, &v, 20, 10));
    assert!(
        message.contains("p/v") && message.contains("65536 bytes"),
        "{message}"
    );
    // What a full volume takes of a request, as a full pool does, is what there is room for.
    assert_eq!(used_blocks(&device, &pool, "v"), 16);
    // What is mapped can be overwritten, also where a snapshot redirects that, and across the end of a hole.
    write(&device, &v, 0, 10).unwrap();
    now(pool.snapshot(&device, &[path("v@s")])).unwrap();
    write(&device, &v, 0, 10).unwrap();
    over_quota(write(&device, &v, 9, 2));
    // A discard makes room for exactly as much.
    now(v.discard(&device, 0, 2 * BLOCK_BYTES)).unwrap();
    write(&device, &v, 100, 2).unwrap();
    over_quota(write(&device, &v, 102, 1));
    let zeroed = v.write_zeroes(&device, 200 * BLOCK_BYTES, BLOCK_BYTES, true);
    over_quota(now(zeroed));
    assert_eq!(used_blocks(&device, &pool, "v"), 16);
}

#[test]
fn writers_that_find_the_same_room_do_not_pass_the_quota_together() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, quota(9));
    // The short way is for what is in memory already.
    write(&device, &v, 2000, 1).unwrap();
    let begin = |lba: u64| {
        let direct = v.direct(Transfer::Write, lba * BLOCK_BYTES, 8 * BLOCK_LEN);
        direct.unwrap()
    };
    let (one, other, same) = (begin(0), begin(64), begin(0));
    assert!(one.done());
    assert!(!other.done(), "mapped 17 blocks under a quota of 9");
    over_quota(write(&device, &v, 64, 8));
    // Its blocks were holes when it began, and by now it maps nothing that is not mapped.
    assert!(same.done());
    assert!(
        v.direct(Transfer::Write, 64 * BLOCK_BYTES, BLOCK_LEN)
            .is_none()
    );
    assert_eq!(used_blocks(&device, &pool, "v"), 9);
}

#[test]
fn a_quota_counts_the_holes_of_a_run_that_is_mapped_in_part() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, quota(9));
    write(&device, &v, 2000, 1).unwrap();
    let direct = v.direct(Transfer::Write, 0, 8 * BLOCK_LEN).unwrap();
    write(&device, &v, 2, 3).unwrap();
    assert!(direct.done(), "5 holes and 3 mapped blocks are 8");
    assert_eq!(used_blocks(&device, &pool, "v"), 9);
}

#[test]
fn a_quota_is_changed_taken_away_and_never_set_below_what_is_mapped() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, Limits::default());
    write(&device, &v, 0, 20).unwrap();
    let set = |blocks| now(pool.set_limits(&device, &name("v"), &set(Limit::Quota, blocks)));
    let error = set(Some(19)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("81920 bytes that it maps"),
        "{error}"
    );
    set(Some(20)).unwrap();
    over_quota(write(&device, &v, 20, 1));
    set(Some(21)).unwrap();
    write(&device, &v, 20, 1).unwrap();
    over_quota(write(&device, &v, 21, 1));
    set(None).unwrap();
    write(&device, &v, 21, 100).unwrap();
    let odd = |bytes| {
        let change = LimitChange {
            limit: Limit::Quota,
            bytes: Some(bytes),
        };
        now(pool.set_limits(&device, &name("v"), &[change])).unwrap_err()
    };
    for bytes in [0, 4097, u64::MAX - 4095] {
        assert_eq!(odd(bytes).kind(), ErrorKind::Invalid);
    }
    let gone = now(pool.set_limits(&device, &name("w"), &[]));
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_quota_survives_the_journal_and_the_checkpoint() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, quota(16));
    write(&device, &v, 0, 10).unwrap();
    now(v.flush(&device)).unwrap();
    now(pool.create_volume(&device, &name("w"), options(8))).unwrap();
    now(pool.set_limits(&device, &name("w"), &set(Limit::Quota, Some(4)))).unwrap();
    let limits = |pool: &Pool| -> Vec<Limits> {
        let entries = now(pool.list(&device)).unwrap();
        entries.iter().map(|entry| entry.limits).collect()
    };
    device.cut_power();
    let pool = open(&device);
    assert_eq!(limits(&pool), [quota(16), quota(4)]);
    let v = pool.attach(&path("v"), false).unwrap();
    over_quota(write(&device, &v, 100, 7));
    v.detach();
    now(pool.close(&device)).unwrap();
    let pool = open(&device);
    assert_eq!(limits(&pool), [quota(16), quota(4)]);
    let v = pool.attach(&path("v"), false).unwrap();
    over_quota(write(&device, &v, 200, 1));
}

#[test]
fn replay_asks_no_quota_what_was_done_before_it_was_set() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, Limits::default());
    write(&device, &v, 0, 20).unwrap();
    now(v.discard(&device, 0, 10 * BLOCK_BYTES)).unwrap();
    let set = |blocks| now(pool.set_limits(&device, &name("v"), &set(Limit::Quota, blocks)));
    set(Some(10)).unwrap();
    now(v.flush(&device)).unwrap();
    device.cut_power();
    let pool = open(&device);
    assert_eq!(used_blocks(&device, &pool, "v"), 10);
}

#[test]
fn a_clone_starts_without_limits_and_a_rollback_keeps_the_volumes() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, Limits::default());
    write(&device, &v, 0, 20).unwrap();
    now(pool.snapshot(&device, &[path("v@s")])).unwrap();
    now(v.discard(&device, 0, 20 * BLOCK_BYTES)).unwrap();
    let set = |blocks| now(pool.set_limits(&device, &name("v"), &set(Limit::Quota, blocks)));
    set(Some(10)).unwrap();
    v.detach();
    now(pool.snapshot(&device, &[path("v@t")])).unwrap();
    now(pool.clone_snapshot(&device, &path("v@t"), &name("c"))).unwrap();
    // 20 blocks are mapped again, under a quota of 10.
    now(pool.rollback(&device, &path("v@s"))).unwrap();
    let entries = now(pool.list(&device)).unwrap();
    let limited: Vec<(String, Option<u64>)> = entries
        .iter()
        .map(|entry| (entry.path.to_string(), entry.limits.quota_bytes))
        .collect();
    let named = |text: &str, quota| (text.to_owned(), quota);
    let expected = [
        named("c", None),
        named("v", Some(10 * BLOCK_BYTES)),
        named("v@s", None),
        named("v@t", None),
    ];
    assert_eq!(limited, expected);
    let v = pool.attach(&path("v"), false).unwrap();
    write(&device, &v, 0, 20).unwrap();
    over_quota(write(&device, &v, 20, 1));
    now(v.discard(&device, 0, 11 * BLOCK_BYTES)).unwrap();
    write(&device, &v, 20, 1).unwrap();
    over_quota(write(&device, &v, 21, 1));
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn what_is_set_aside_is_left_to_its_volume() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, reserve(1024));
    assert_eq!(set_aside_blocks(&pool), 1024 + 4);
    let w = other(&device, &pool);
    let error = fill(&device, &w, 0);
    assert!(error.to_string().contains("set aside"), "{error}");
    assert!(
        w.direct(Transfer::Write, 8000 * BLOCK_BYTES, BLOCK_LEN)
            .is_none()
    );
    // What is mapped is overwritten all the same.
    write(&device, &w, 0, 64).unwrap();
    for lba in (0..1024).step_by(64) {
        write(&device, &v, lba, 64).unwrap();
        let mapped = lba + 64;
        assert!(set_aside_blocks(&pool) <= 1024 - mapped + 4);
    }
    assert_eq!(set_aside_blocks(&pool), 0);
    write(&device, &v, 0, 1024).unwrap();
    // Beyond its reserve it takes what everybody may take.
    fill(&device, &v, 1024);
    fill(&device, &w, 8000);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_snapshot_is_refused_before_a_write_has_to_be() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, reserve(1024));
    let w = other(&device, &pool);
    for lba in (0..1024).step_by(64) {
        write(&device, &v, lba, 64).unwrap();
    }
    fill(&device, &w, 0);
    let error = now(pool.snapshot(&device, &[path("w@s"), path("v@s")])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfSpace);
    assert!(error.to_string().contains("p/v"), "{error}");
    assert_eq!(
        used_blocks(&device, &pool, "w") + 1024,
        mapped_blocks(&device, &pool)
    );
    write(&device, &v, 0, 1024).unwrap();
    // One without a reserve could overwrite nothing either.
    let error = now(pool.snapshot(&device, &[path("w@t")])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfSpace);
    assert!(error.to_string().contains("p/w"), "{error}");
    write(&device, &w, 0, 100).unwrap();
    now(w.discard(&device, 0, 1200 * BLOCK_BYTES)).unwrap();
    while now(pool.maintain(&device)).unwrap() {}
    now(pool.checkpoint(&device)).unwrap();
    now(pool.snapshot(&device, &[path("v@s")])).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1024 + 4);
    fill(&device, &w, 0);
    for lba in (0..1024).step_by(64) {
        write(&device, &v, lba, 64).unwrap();
    }
    let again = now(pool.snapshot(&device, &[path("v@t")]));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::OutOfSpace);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_snapshot_is_refused_where_hardly_an_overwrite_could_follow() {
    let (device, pool) = pool();
    let w = other(&device, &pool);
    let snapshot = |of: &str| now(pool.snapshot(&device, &[path(of)]));
    fill(&device, &w, 0);
    assert_eq!(snapshot("w@a").unwrap_err().kind(), ErrorKind::OutOfSpace);
    // What was overwritten before still can be; and a volume without content has nothing to overwrite.
    write(&device, &w, 0, 100).unwrap();
    drop(volume(&device, &pool, Limits::default()));
    snapshot("v@a").unwrap();
    let least = BLOCKS / 128;
    now(w.discard(&device, 0, (least - 1) * BLOCK_BYTES)).unwrap();
    assert_eq!(snapshot("w@a").unwrap_err().kind(), ErrorKind::OutOfSpace);
    now(w.discard(&device, 0, least * BLOCK_BYTES)).unwrap();
    // No checkpoint since: these blocks are pending.
    snapshot("w@a").unwrap();
    write(&device, &w, least, 16).unwrap();
}

/// What all volumes and snapshots map.
fn mapped_blocks(device: &Memory, pool: &Pool) -> u64 {
    let entries = now(pool.list(device)).unwrap();
    entries.iter().map(|entry| entry.used_bytes).sum::<u64>() / BLOCK_BYTES
}

#[test]
fn a_reserve_is_changed_and_goes_with_its_volume() {
    let (device, pool) = pool();
    let v = volume(&device, &pool, Limits::default());
    let set = |blocks| now(pool.set_limits(&device, &name("v"), &set(Limit::Reserve, blocks)));
    write(&device, &v, 0, 100).unwrap();
    set(Some(1100)).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1000 + 4);
    assert_eq!(set(Some(2049)).unwrap_err().kind(), ErrorKind::Invalid);
    set(Some(50)).unwrap();
    assert_eq!(set_aside_blocks(&pool), 0);
    set(Some(1100)).unwrap();
    now(v.discard(&device, 0, 10 * BLOCK_BYTES)).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1010 + 4);
    now(v.flush(&device)).unwrap();
    v.detach();
    now(pool.rename(&device, &path("v"), &path("u"))).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1010 + 4);
    device.cut_power();
    let pool = open(&device);
    assert_eq!(set_aside_blocks(&pool), 1010 + 4);
    now(pool.snapshot(&device, &[path("u@s")])).unwrap();
    now(pool.clone_snapshot(&device, &path("u@s"), &name("c"))).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1100 + 5);
    now(pool.close(&device)).unwrap();
    let pool = open(&device);
    assert_eq!(set_aside_blocks(&pool), 1100 + 5);
    now(pool.rollback(&device, &path("u@s"))).unwrap();
    assert_eq!(set_aside_blocks(&pool), 1100 + 5);
    // Two reserves do not fit.
    let x = name("x");
    let large = pool.create_limited_volume(&device, &x, options(4096), reserve(2500));
    assert_eq!(
        now(large).map(drop).unwrap_err().kind(),
        ErrorKind::OutOfSpace
    );
    assert_eq!(now(pool.list(&device)).unwrap().len(), 3);
    now(pool.remove(&device, &[path("u")], true, false)).unwrap();
    assert_eq!(set_aside_blocks(&pool), 0);
}

#[track_caller]
fn refused(done: Result<()>) -> String {
    let error = done.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfSpace, "{error}");
    error.to_string()
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn without_overcommit_every_volume_can_be_written_whole() {
    let device = Memory::default();
    now(Pool::create_without_overcommit(&device, pool_options())).unwrap();
    let pool = open(&device);
    assert!(!pool.status().overcommit);
    let make = |pool: &Pool, text: &str, blocks| {
        let name = name(text);
        now(pool.create_volume(&device, &name, options(blocks))).map(drop)
    };
    make(&pool, "a", 1000).unwrap();
    let message = refused(make(&pool, "b", BLOCKS));
    assert!(
        message.contains("p/b") && message.contains("--no-overcommit"),
        "{message}"
    );
    let left = (1..BLOCKS)
        .rev()
        .find(|blocks| make(&pool, "b", *blocks).is_ok());
    let left = left.unwrap();
    assert!(left > 1500, "{left}");
    refused(make(&pool, "c", 1));
    let resize = |pool: &Pool, text: &str, blocks: u64| {
        now(pool.resize(&device, &name(text), blocks * BLOCK_BYTES, true))
    };
    refused(resize(&pool, "a", 1001));
    now(pool.snapshot(&device, &[path("b@s")])).unwrap();
    refused(now(pool.clone_snapshot(&device, &path("b@s"), &name("c"))).map(drop));
    resize(&pool, "b", left - 10).unwrap();
    make(&pool, "c", 10).unwrap();
    refused(now(pool.rollback(&device, &path("b@s"))));
    now(pool.remove(&device, &[path("c"), path("b@s")], false, false)).unwrap();
    resize(&pool, "b", left).unwrap();
    now(pool.close(&device)).unwrap();
    let pool = open(&device);
    refused(make(&pool, "c", 1));
    for (text, blocks) in [("a", 1000), ("b", left)] {
        let volume = pool.attach(&path(text), false).unwrap();
        for lba in 0..blocks {
            // Every other one first, so that no run is long.
            let lba = if 2 * lba < blocks {
                2 * lba
            } else {
                2 * (lba - blocks.div_ceil(2)) + 1
            };
            write(&device, &volume, lba, 1).unwrap();
        }
        assert_eq!(used_blocks(&device, &pool, text), blocks);
        volume.detach();
    }
    now(pool.grow(&device, 2 * BLOCKS)).unwrap();
    make(&pool, "c", 1000).unwrap();
}

#[test]
fn a_limit_that_cannot_be_is_damage_in_the_journal() {
    let record = |property: u8, value: u64| {
        let mut bytes = vec![13];
        bytes.extend(5_u64.to_le_bytes());
        bytes.push(property);
        bytes.extend(value.to_le_bytes());
        Record::decode(&bytes)
    };
    let quota = Record::SetProperty {
        id: VolumeId(5),
        property: Property::Quota,
        value: 8192,
    };
    assert_eq!(record(1, 8192).unwrap(), quota);
    let mut encoded = Vec::new();
    quota.encode(&mut encoded);
    assert_eq!(Record::decode(&encoded).unwrap(), quota);
    for (property, value) in [(0, 0), (3, 0), (1, 1), (2, 1 << 51), (2, u64::MAX - 4095)] {
        let error = record(property, value).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{property} {value}");
    }
}
