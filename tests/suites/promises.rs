//! The promises, one scenario each: what a power cut, a full pool or a damaged page must not do.

use blockfork::device::BlockBuf;
use blockfork::error::ErrorKind;
use blockfork::pool::{Redirect, VolumeOptions};
use blockfork_tests::fixture::{attach, open, path, pool, put, reclaim, stamp, volume};
use blockfork_tests::sim_device::{Loss, SimDevice};
use fastrand::Rng;
use futures_lite::future::{block_on, poll_once, yield_now};

/// The data reached the disk, records that no flush covered did not.
fn cut_power_after_the_data(device: &SimDevice) {
    device.restart(Loss::None, &mut Rng::with_seed(1));
}

#[test]
fn a_block_that_an_unflushed_write_left_is_not_written_in_place() {
    let (device, pool) = pool(8192);
    let a = volume(&device, &pool, "a", 2048);
    put(&device, &a, 0, 8, 1).unwrap();
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    block_on(pool.clone_snapshot(&device, &path("a@s"), &"b".parse().unwrap())).unwrap();
    block_on(pool.remove(&device, &[path("a@s")], false, false)).unwrap();
    reclaim(&device, &pool);
    let b = attach(&pool, "b");
    put(&device, &b, 5, 1, 3).unwrap();
    put(&device, &a, 5, 1, 2).unwrap();
    drop((a, b, pool));
    cut_power_after_the_data(&device);
    let pool = open(&device).unwrap();
    let found = stamp(&device, &attach(&pool, "b"), 5);
    assert!(
        found == 1 || found == 3,
        "b reads {found}, which was written to a"
    );
}

#[test]
fn a_leaf_that_an_unflushed_discard_left_is_not_written_in_place() {
    let (device, pool) = pool(8192);
    let a = volume(&device, &pool, "a", 2048);
    put(&device, &a, 0, 1024, 1).unwrap();
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    block_on(pool.clone_snapshot(&device, &path("a@s"), &"b".parse().unwrap())).unwrap();
    block_on(pool.remove(&device, &[path("a@s")], false, false)).unwrap();
    reclaim(&device, &pool);
    block_on(pool.checkpoint(&device)).unwrap();
    let b = attach(&pool, "b");
    block_on(a.discard(&device, 0, 512 * 4096)).unwrap();
    put(&device, &b, 5, 1, 2).unwrap();
    drop((a, b, pool));
    cut_power_after_the_data(&device);
    let pool = open(&device).unwrap();
    let found = stamp(&device, &attach(&pool, "a"), 5);
    assert!(
        found == 0 || found == 1,
        "a reads {found}, which was written to b"
    );
}

#[test]
fn reclaiming_a_third_owner_does_not_hide_an_unflushed_release() {
    let (device, pool) = pool(8192);
    // More leaves than one step of the background work returns, so that no checkpoint follows it.
    let leaves = 100;
    let a = volume(&device, &pool, "a", leaves * 512);
    for leaf in 0..leaves {
        put(&device, &a, leaf * 512, 8, 1).unwrap();
    }
    block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
    block_on(pool.clone_snapshot(&device, &path("a@s"), &"b".parse().unwrap())).unwrap();
    let b = attach(&pool, "b");
    // Leaves of their own for all three, all naming the same block.
    put(&device, &a, 0, 1, 3).unwrap();
    put(&device, &b, 0, 1, 4).unwrap();
    block_on(pool.remove(&device, &[path("a@s")], false, false)).unwrap();
    put(&device, &a, 5, 1, 5).unwrap();
    assert!(
        block_on(pool.maintain(&device)).unwrap(),
        "the reclaim goes on"
    );
    put(&device, &b, 5, 1, 2).unwrap();
    drop((a, b, pool));
    cut_power_after_the_data(&device);
    let pool = open(&device).unwrap();
    let found = stamp(&device, &attach(&pool, "a"), 5);
    assert!(
        found == 5 || found == 1,
        "a reads {found}, which was written to b"
    );
}

#[test]
fn a_pool_without_a_free_block_can_be_emptied_and_reopened() {
    let (device, pool) = pool(4096);
    let sparse = volume(&device, &pool, "sparse", 512 * 500);
    for leaf in 0..500 {
        put(&device, &sparse, leaf * 512, 2, 1).unwrap();
    }
    block_on(pool.snapshot(&device, &[path("sparse@s")])).unwrap();
    drop(volume(&device, &pool, "t", 8));
    for number in 0..75 {
        block_on(pool.snapshot(&device, &[path(&format!("t@x{number}"))])).unwrap();
    }
    block_on(pool.checkpoint(&device)).unwrap();
    let filler = volume(&device, &pool, "fill", 4096);
    let mut filled = 0;
    while put(&device, &filler, filled, 1, 1).is_ok() {
        filled += 1;
    }
    block_on(pool.flush(&device)).unwrap();
    // A discard below a snapshot needs a page and frees nothing: at some point it is refused, and nothing else is.
    for leaf in 0..500 {
        if let Err(error) = block_on(sparse.discard(&device, leaf * 512 * 4096, 4096)) {
            assert_eq!(error.kind(), ErrorKind::OutOfSpace);
            break;
        }
    }
    put(&device, &filler, 0, 1, 9).unwrap();
    block_on(pool.flush(&device)).unwrap();
    block_on(pool.checkpoint(&device)).unwrap();
    block_on(pool.rollback(&device, &path("t@x3"))).unwrap();
    block_on(pool.remove(&device, &[path("t")], true, false)).unwrap();
    drop((sparse, filler));
    reclaim(&device, &pool);
    drop(pool);
    device.restart(Loss::All, &mut Rng::with_seed(1));
    let pool = open(&device).unwrap();
    block_on(pool.remove(&device, &[path("fill")], true, false)).unwrap();
    reclaim(&device, &pool);
    block_on(pool.checkpoint(&device)).unwrap();
    let sparse = attach(&pool, "sparse");
    put(&device, &sparse, 0, 512, 7).unwrap();
    let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
}

#[test]
fn a_write_into_a_grown_pool_survives_a_power_cut_at_any_moment() {
    for delay in 0..40 {
        let (device, pool) = pool(4096);
        let a = volume(&device, &pool, "a", 8192);
        let mut filled = 0;
        while put(&device, &a, filled, 1, 1).is_ok() {
            filled += 1;
        }
        block_on(pool.checkpoint(&device)).unwrap();
        device.grow(8192);
        let is_flushed = block_on(async {
            let mut grow = std::pin::pin!(pool.grow(&device, 8192));
            let mut write = std::pin::pin!(async {
                let mut buffer = BlockBuf::zeroed(600);
                buffer.fill(9);
                for _ in 0..delay {
                    yield_now().await;
                }
                a.write(&device, filled * 4096, &buffer).await?;
                a.flush(&device).await
            });
            for _ in 0..500 {
                if let Some(written) = poll_once(write.as_mut()).await {
                    return written.is_ok();
                }
                if poll_once(grow.as_mut()).await.is_some() {
                    return false;
                }
            }
            false
        });
        drop((a, pool));
        device.restart(Loss::All, &mut Rng::with_seed(1));
        let pool = open(&device).unwrap();
        if is_flushed {
            assert_eq!(
                stamp(&device, &attach(&pool, "a"), filled + 599),
                9,
                "delay {delay}"
            );
        }
        let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
        assert_eq!(
            (report.damage, report.leaked_blocks),
            (Vec::new(), 0),
            "delay {delay}"
        );
    }
}

#[test]
fn a_damaged_journal_block_that_was_durable_is_an_error() {
    let (device, pool) = pool(8192);
    let a = volume(&device, &pool, "a", 2048);
    for number in 1..4 {
        put(&device, &a, u64::from(number), 1, number).unwrap();
        block_on(a.flush(&device)).unwrap();
    }
    drop((a, pool));
    let mut seen = 0;
    device.with_bytes(|bytes| {
        for block in bytes
            .chunks_exact_mut(4096)
            .filter(|block| block.starts_with(b"BFjb"))
        {
            seen += 1;
            if seen == 3 {
                block[100] ^= 1;
            }
        }
    });
    assert_eq!(seen, 4);
    assert_eq!(open(&device).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn one_damaged_map_page_leaves_the_other_volumes_alone() {
    let (device, pool) = pool(8192);
    for name in ["a", "b"] {
        let attached = volume(&device, &pool, name, 2048);
        put(&device, &attached, 0, 8, 1).unwrap();
    }
    block_on(pool.close(&device)).unwrap();
    drop(pool);
    let mut damaged = false;
    device.with_bytes(|bytes| {
        let mut leaves = bytes
            .chunks_exact_mut(4096)
            .filter(|block| block.starts_with(b"BFpg") && block[40..42] == [1, 0]);
        if let Some(leaf) = leaves.next() {
            leaf[100] ^= 1;
            damaged = true;
        }
    });
    assert!(damaged);
    let pool = open(&device).unwrap();
    assert_eq!(block_on(pool.list(&device)).unwrap().len(), 2);
    let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!(report.damage.len(), 1);
    let (bad, good) = if report.damage[0].starts_with('a') {
        ("a", "b")
    } else {
        ("b", "a")
    };
    let attached = attach(&pool, bad);
    let mut buffer = BlockBuf::zeroed(1);
    let error = block_on(attached.read(&device, 0, &mut buffer)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().starts_with(bad), "{error}");
    drop(attached);
    block_on(pool.remove(&device, &[path(bad)], false, false)).unwrap();
    reclaim(&device, &pool);
    let attached = attach(&pool, good);
    put(&device, &attached, 0, 600, 2).unwrap();
    block_on(pool.checkpoint(&device)).unwrap();
    assert_eq!(stamp(&device, &attached, 599), 2);
}

/// Begins something that changes volumes, attaches a volume after so many turns of it, and ends it; whether the volume
/// could be attached, and what came of the change.
fn attach_beside<T>(
    change: impl Future<Output = T>,
    turns: usize,
    attach: impl FnOnce() -> blockfork::error::Result<std::sync::Arc<blockfork::pool::Attached>>,
) -> (Option<std::sync::Arc<blockfork::pool::Attached>>, T) {
    let mut change = std::pin::pin!(change);
    for _ in 0..turns {
        if let Some(done) = block_on(poll_once(change.as_mut())) {
            return (attach().ok(), done);
        }
    }
    let attached = attach().ok();
    (attached, block_on(change))
}

#[test]
fn what_is_attached_while_it_is_removed_is_not_removed() {
    for turns in 0..30 {
        let (device, pool) = pool(8192);
        drop(volume(&device, &pool, "a", 2048));
        let targets = [path("a")];
        let removing = pool.remove(&device, &targets, false, false);
        let (attached, removed) = attach_beside(removing, turns, || pool.attach(&path("a"), false));
        assert_ne!(attached.is_some(), removed.is_ok(), "after {turns} turns");
        if let Some(attached) = attached {
            put(&device, &attached, 0, 8, 1).unwrap();
        }
    }
}

#[test]
fn what_is_attached_while_its_size_changes_has_the_size_of_its_volume() {
    for (blocks, turns) in (0..40).flat_map(|turns| [(16, turns), (4096, turns)]) {
        let (device, pool) = pool(8192);
        let a = volume(&device, &pool, "a", 2048);
        put(&device, &a, 8, 64, 1).unwrap();
        drop(a);
        let name = "a".parse().unwrap();
        let resizing = pool.resize(&device, &name, blocks * 4096, true);
        let (attached, resized) = attach_beside(resizing, turns, || pool.attach(&path("a"), false));
        let size = if resized.is_ok() { blocks } else { 2048 };
        let attached = attached.unwrap_or_else(|| attach(&pool, "a"));
        assert_eq!(attached.bytes(), size * 4096, "after {turns} turns");
    }
}

#[test]
fn what_is_attached_while_it_is_rolled_back_has_the_size_of_then() {
    for turns in 0..40 {
        let (device, pool) = pool(8192);
        drop(volume(&device, &pool, "a", 2048));
        block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
        block_on(pool.resize(&device, &"a".parse().unwrap(), 4096 * 4096, false)).unwrap();
        let snapshot = path("a@s");
        let rolling = pool.rollback(&device, &snapshot);
        let (attached, rolled) = attach_beside(rolling, turns, || pool.attach(&path("a"), false));
        rolled.unwrap();
        let attached = attached.unwrap_or_else(|| attach(&pool, "a"));
        assert_eq!(attached.bytes(), 2048 * 4096, "after {turns} turns");
    }
}

/// What each entry of the list is held by.
fn held(device: &SimDevice, pool: &blockfork::pool::Pool) -> Vec<String> {
    let entries = block_on(pool.list(device)).unwrap();
    let held = |entry: &blockfork::pool::Entry| {
        let tags: Vec<&str> = entry.holds.iter().map(|tag| tag.as_str()).collect();
        format!("{} {}", entry.path, tags.join(","))
    };
    entries.iter().map(held).collect()
}

#[test]
fn a_hold_is_durable_when_it_is_answered_and_whole_whenever_the_power_goes() {
    let tag = "x".parse().unwrap();
    let both = [path("a@s"), path("a@t")];
    let (mut answered, mut came_early) = (0, 0);
    // Whether the hold or its release is interrupted, after how many steps, and what of the unflushed is lost.
    for (is_release, delay, seed) in (0..2 * 30 * 4).map(|n| (n % 2 == 0, n / 2 % 30, n / 60)) {
        let (device, pool) = pool(4096);
        drop(volume(&device, &pool, "a", 8));
        block_on(pool.snapshot(&device, &both)).unwrap();
        if is_release {
            block_on(pool.hold(&device, &tag, &both)).unwrap();
        }
        let is_answered = block_on(async {
            let change = async {
                if is_release {
                    pool.release(&device, &tag, &both).await
                } else {
                    pool.hold(&device, &tag, &both).await
                }
            };
            let mut change = std::pin::pin!(change);
            for _ in 0..delay {
                if let Some(answer) = poll_once(change.as_mut()).await {
                    answer.unwrap();
                    return true;
                }
            }
            false
        });
        drop(pool);
        let loss = if seed == 0 { Loss::All } else { Loss::Some };
        device.restart(loss, &mut Rng::with_seed(seed));
        let pool = open(&device).unwrap();
        let (with, without) = (["a ", "a@s x", "a@t x"], ["a ", "a@s ", "a@t "]);
        let (before, after) = if is_release {
            (with, without)
        } else {
            (without, with)
        };
        let found = held(&device, &pool);
        assert!(
            found == after || (!is_answered && found == before),
            "release {is_release}, delay {delay}, seed {seed}: {found:?}"
        );
        answered += u32::from(is_answered);
        came_early += u32::from(!is_answered && found == before);
        let removed = block_on(pool.remove(&device, &both[..1], false, false));
        if found == with {
            assert_eq!(removed.unwrap_err().kind(), ErrorKind::Busy);
        } else {
            removed.unwrap();
        }
        let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
        assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
    }
    assert!(answered > 0 && came_early > 0, "{answered}, {came_early}");
}

#[test]
fn what_a_shrink_cut_off_is_gone_once_the_size_is_durable() {
    let (old, new) = (2 * 4096, 4096 + 3 * 512);
    // Which call to the device is the first after the power goes, and what of the unflushed is lost.
    for (calls, seed) in (0..12).flat_map(|calls| (0..16).map(move |seed| (calls, seed))) {
        let (device, pool) = pool(4096);
        let options = VolumeOptions {
            bytes: old,
            sector_bytes: 512,
            redirect: Redirect::Shared,
        };
        let name = "a".parse().unwrap();
        block_on(pool.create_volume(&device, &name, options)).unwrap();
        put(&device, &attach(&pool, "a"), 0, 2, 1).unwrap();
        block_on(pool.flush(&device)).unwrap();
        device.fail_after(calls);
        let is_done = block_on(pool.resize(&device, &name, new, true)).is_ok();
        drop(pool);
        let loss = if seed == 0 { Loss::All } else { Loss::Some };
        device.restart(loss, &mut Rng::with_seed(seed));
        let pool = open(&device).unwrap();
        if attach(&pool, "a").bytes() == old {
            assert!(
                !is_done,
                "after {calls} calls, seed {seed}: the size came back"
            );
            continue;
        }
        block_on(pool.resize(&device, &name, old, false)).unwrap();
        let mut buffer = BlockBuf::zeroed(2);
        block_on(attach(&pool, "a").read(&device, 0, &mut buffer)).unwrap();
        let (kept, cut_off) = buffer.split_at(usize::try_from(new).unwrap());
        assert!(kept.iter().all(|byte| *byte == 1));
        assert!(
            cut_off.iter().all(|byte| *byte == 0),
            "after {calls} calls, seed {seed}: old bytes are back"
        );
    }
}

#[test]
fn a_removal_of_many_is_whole_whenever_the_power_goes() {
    let count = 1500;
    let mut outcomes = [0, 0];
    for (calls, seed) in (0..16).flat_map(|calls| (0..4).map(move |seed| (calls, seed))) {
        let (device, pool) = pool(4096);
        drop(volume(&device, &pool, "a", 8));
        drop(volume(&device, &pool, "b", 8));
        for first in (0..count).step_by(250) {
            // Numbers that do not follow each other, so that the removal takes several records.
            let name = |number| [format!("a@{number}"), format!("b@{number}")];
            let targets: Vec<_> = (first..first + 125)
                .flat_map(name)
                .map(|text| path(&text))
                .collect();
            block_on(pool.snapshot(&device, &targets)).unwrap();
        }
        device.fail_after(calls);
        let is_done = block_on(pool.remove(&device, &[path("a")], true, false)).is_ok();
        drop(pool);
        let loss = if seed == 0 { Loss::All } else { Loss::Some };
        device.restart(loss, &mut Rng::with_seed(seed));
        let pool = open(&device).unwrap();
        let left = pool.status().snapshots;
        let is_gone = pool.attach(&path("a"), false).is_err();
        let expected = if is_gone { 1 } else { 2 };
        assert_eq!(
            left,
            count / 2 * expected,
            "after {calls} calls, seed {seed}"
        );
        assert!(is_gone || !is_done, "after {calls} calls, seed {seed}");
        outcomes[usize::from(is_gone)] += 1;
        let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
        assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
    }
    assert!(outcomes.iter().all(|count| *count > 0), "{outcomes:?}");
}
