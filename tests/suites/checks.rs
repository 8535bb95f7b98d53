//! Checks and other looks at a pool beside everything that changes it: they delay nobody, and see one state.

use blockfork::error::ErrorKind;
use blockfork::pool::{CheckReport, Pool};
use blockfork_tests::fixture::{attach, path, pool, put, reclaim, stamp, volume};
use blockfork_tests::sim_device::SimDevice;
use fastrand::Rng;
use futures_lite::future::{block_on, poll_once};
use std::cell::Cell;
use std::pin::{Pin, pin};

/// So many turns end whatever does not wait for somebody else.
const TURNS_MAX: usize = 100_000;

/// What a future gives that waits for nobody but the device.
fn ends<T>(what: &str, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..TURNS_MAX {
        if let Some(value) = block_on(poll_once(future.as_mut())) {
            return value;
        }
    }
    panic!("{what}: waits for a check that makes no progress");
}

/// Gives a future so many turns; what it gave, if it ended.
fn turn<T>(future: &mut Pin<&mut impl Future<Output = T>>, turns: usize) -> Option<T> {
    (0..turns).find_map(|_| block_on(poll_once(future.as_mut())))
}

/// Lets a check come to where it reads the checkpoint that it wrote.
fn begin<T>(check: &mut Pin<&mut impl Future<Output = T>>, has_begun: &Cell<bool>) {
    while !has_begun.get() {
        assert!(turn(check, 1).is_none(), "it ended before it began to read");
    }
}

fn assert_clean(report: &CheckReport, when: &str) {
    assert_eq!(
        (&report.damage, report.leaked_blocks),
        (&Vec::new(), 0),
        "{when}"
    );
}

/// Writes, snapshots, clones, removals, rollbacks, returned space and checkpoints, by seed.
fn change(device: &SimDevice, pool: &std::sync::Arc<Pool>, rng: &mut Rng, step: u32) {
    let snapshot = |number: u32| path(&format!("a@s{number}"));
    match rng.u8(..8) {
        0 => {
            let targets = [snapshot(step)];
            ends("a snapshot", pool.snapshot(device, &targets)).unwrap();
        }
        1 => {
            let names = pool.snapshots_of(&"a".parse().unwrap()).unwrap();
            if let Some(entry) = rng.choice(names) {
                let gone = [entry.path];
                ends("a removal", pool.remove(device, &gone, false, false)).unwrap();
            }
        }
        2 => {
            for _ in 0..20 {
                ends("background work", pool.maintain(device)).unwrap();
            }
        }
        3 => ends("a checkpoint", pool.checkpoint(device)).unwrap(),
        4 => {
            let a = attach(pool, "a");
            let start = rng.u64(..3000) * 4096;
            ends("a discard", a.discard(device, start, 300 * 4096)).unwrap();
        }
        5 => {
            let names = pool.snapshots_of(&"a".parse().unwrap()).unwrap();
            if let Some(entry) = rng.choice(names) {
                ends("a rollback", pool.rollback(device, &entry.path)).unwrap();
            }
        }
        _ => {
            let a = attach(pool, "a");
            for _ in 0..8 {
                put(device, &a, rng.u64(..4000), 1 + rng.u64(..9), 7).unwrap();
            }
            ends("a flush", a.flush(device)).unwrap();
        }
    }
}

#[test]
fn a_check_that_stands_still_delays_no_flush_command_or_checkpoint() {
    for turns in [0, 1, 5, 12] {
        let (device, pool) = pool(16_384);
        let a = volume(&device, &pool, "a", 4096);
        put(&device, &a, 0, 2048, 1).unwrap();
        block_on(pool.snapshot(&device, &[path("a@s")])).unwrap();
        let has_begun = Cell::new(false);
        let mut progress = |_, _| has_begun.set(true);
        let mut check = pin!(pool.check(&device, &mut progress));
        begin(&mut check, &has_begun);
        let early = turn(&mut check, turns);
        let before = pool.stats();
        // So many that the journal goes around several times.
        for number in 0..5 * before.journal_bytes / 4096 {
            // Each has a record: a block goes, or comes.
            let lba = number / 2 % 2048;
            if number.is_multiple_of(2) {
                ends("a discard", a.discard(&device, lba * 4096, 4096)).unwrap();
            } else {
                put(&device, &a, lba, 1, 2).unwrap();
            }
            ends("a flush", a.flush(&device)).unwrap();
        }
        let next = [path("a@t")];
        ends("a snapshot", pool.snapshot(&device, &next)).unwrap();
        ends("a removal", pool.remove(&device, &next, false, false)).unwrap();
        let checkpoints = pool.stats().checkpoints;
        assert!(checkpoints > before.checkpoints + 2, "{turns} turns");
        let report = early.unwrap_or_else(|| block_on(check)).unwrap();
        assert_clean(&report, &format!("{turns} turns"));
        assert!(report.data_blocks >= 2048, "{report:?}");
    }
}

#[test]
fn a_check_sees_one_state_whatever_changes_meanwhile() {
    let seeds = std::env::var("BLOCKFORK_SEEDS").map_or(40, |text| text.parse().expect("a number"));
    for seed in 0..seeds {
        let mut rng = Rng::with_seed(seed);
        let (device, pool) = pool(24_576);
        drop(volume(&device, &pool, "a", 4096));
        put(&device, &attach(&pool, "a"), 0, 4096, 1).unwrap();
        for step in 0..20 {
            change(&device, &pool, &mut rng, step);
        }
        let has_begun = Cell::new(false);
        let mut progress = |_, _| has_begun.set(true);
        let mut check = pin!(pool.check(&device, &mut progress));
        begin(&mut check, &has_begun);
        let mut step = 20;
        let report = loop {
            let turns = rng.usize(..30);
            if let Some(report) = turn(&mut check, turns) {
                break report.unwrap();
            }
            if step < 400 {
                change(&device, &pool, &mut rng, step);
            }
            step += 1;
        };
        assert_clean(&report, &format!("seed {seed}, {step} steps"));
        let again = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
        assert_clean(&again, &format!("seed {seed}, after it"));
        // What was kept for the check is given back.
        block_on(pool.remove(&device, &[path("a")], true, false)).unwrap();
        reclaim(&device, &pool);
        block_on(pool.checkpoint(&device)).unwrap();
        block_on(pool.checkpoint(&device)).unwrap();
        let status = pool.status();
        assert_eq!(status.pending_bytes, 0, "seed {seed}");
    }
}

/// Overwrites all of a snapshotted volume again and again on a nearly full pool; how many writes went through. `turns` of a
/// check pass before that.
fn fill(turns: Option<usize>) -> (usize, Option<CheckReport>) {
    let (device, pool) = pool(8192);
    let a = volume(&device, &pool, "a", 512 * 400);
    for leaf in 0..400 {
        put(&device, &a, leaf * 512, 1, 1).unwrap();
    }
    let filler = volume(&device, &pool, "filler", 8192);
    let mut filled = 0;
    while pool.status().free_bytes > 500 * 4096 {
        put(&device, &filler, filled, 16, 1).unwrap();
        filled += 16;
    }
    block_on(pool.checkpoint(&device)).unwrap();
    let has_begun = Cell::new(false);
    let mut progress = |_, _| has_begun.set(true);
    let mut check = pin!(pool.check(&device, &mut progress));
    let early = turns.and_then(|turns| {
        begin(&mut check, &has_begun);
        turn(&mut check, turns)
    });
    let mut done = 0;
    for round in 2..30 {
        for leaf in 0..400 {
            // A block more for each leaf, which makes all pages above it anew after each checkpoint.
            let written = ends("a write", async {
                let mut buffer = blockfork::device::BlockBuf::zeroed(1);
                buffer.fill(round);
                a.write(&device, (leaf * 512 + u64::from(round % 2)) * 4096, &buffer)
                    .await
            });
            match written {
                Ok(()) => done += 1,
                Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfSpace),
            }
            if leaf % 50 == 0 {
                ends("a checkpoint", pool.checkpoint(&device)).unwrap();
            }
        }
        let gone = a.discard(&device, 4096, 4096);
        ends("a discard", gone).unwrap();
        for leaf in 0..400 {
            ends(
                "a discard",
                a.discard(&device, (leaf * 512 + 1) * 4096, 4096),
            )
            .unwrap();
        }
    }
    assert_eq!(stamp(&device, &a, 0), 28);
    let report = match (turns, early) {
        (None, _) => None,
        (_, Some(report)) => Some(report.unwrap()),
        _ => Some(block_on(check).unwrap()),
    };
    (done, report)
}

#[test]
fn a_check_takes_no_space_from_writers() {
    let (without, _) = fill(None);
    for turns in [0, 20, 60] {
        let (beside, report) = fill(Some(turns));
        assert_eq!(beside, without, "after {turns} turns");
        assert_clean(&report.unwrap(), &format!("{turns} turns"));
    }
}
