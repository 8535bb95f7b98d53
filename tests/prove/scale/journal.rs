//! Opening after a crash at the worst moment, whatever filled the journal; and writes while a checkpoint is written, beside
//! those while none is.

use super::Setting;
use super::kit::{Bench, Over, path, permille, ratio, seconds, timed};
use super::sparse::{Hurried, Place};
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{BlockBuf, Device};
use blockfork::pool::{Attached, Redirect};
use blockfork::units::BLOCK_BYTES;
use fastrand::Rng;
use futures_lite::future::block_on;
use score::{Card, Target};
use std::thread;
use std::time::Duration;

pub(super) const SECONDS_MAX: f64 = 1.0;
const SLOWER_MAX: f64 = 1.5;
/// Blocks within which the order of what is built is random.
const WINDOW: u64 = 1 << 18;
/// Requests between two looks of the background thread, of which there are ten a second.
const AT_ONCE: u64 = 2_000;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    replay(setting, card);
    checkpoints(setting, card);
}

fn replay(setting: &Setting, card: &mut Card) {
    let blocks = setting.pick(1 << 20, 1 << 22);
    let mut rng = Rng::with_seed(setting.seed);
    let pool_blocks = 2 * blocks;
    let place = Place::new(&setting.folder, "journal", pool_blocks);
    let bench = Bench::create(Hurried(place.device()), pool_blocks);
    let volume = bench.volume("v", blocks, Redirect::Always);
    bench.fill_at_random(&volume, WINDOW, &mut rng);
    volume.detach();
    drop(volume);
    drop(bench.close());
    let block = BlockBuf::zeroed(1);
    let mut taken = 0;
    let mut crashed = |what: &str, cause: &mut dyn FnMut(&Bench<Hurried>, &Attached)| {
        let bench = Bench::open(Hurried(place.device()), pool_blocks);
        let volume = bench.attach("v");
        wear(&bench, || cause(&bench, &volume));
        drop(volume);
        drop(bench);
        let device = place.device();
        let (bench, ns) = timed(|| Bench::open(device, pool_blocks));
        drop(bench);
        let metric = format!("seconds to open after a crash amid {what}");
        card.add(&metric, seconds(ns), Target::AtMost(SECONDS_MAX));
    };
    crashed("writes", &mut |bench, volume| {
        for _ in 0..AT_ONCE {
            bench.write(volume, rng.u64(..blocks), &block);
        }
    });
    crashed("discards", &mut |bench, volume| {
        for _ in 0..AT_ONCE {
            discard(bench, volume, rng.u64(..blocks));
        }
    });
    crashed("snapshots and writes", &mut |bench, volume| {
        for _ in 0..50 {
            bench.snapshot(&format!("v@s{taken}"));
            taken += 1;
            for _ in 0..50 {
                bench.write(volume, rng.u64(..blocks), &block);
            }
        }
    });
    let mut is_removed = false;
    crashed("removals, volumes and clones", &mut |bench, _| {
        // The snapshots that the crash before has left go once.
        if !is_removed {
            is_removed = true;
            let snapshots: Vec<_> = (0..taken)
                .map(|number| path(&format!("v@s{number}")))
                .collect();
            for some in snapshots.chunks(64) {
                let removal = bench.pool.remove(&bench.device, some, false, false);
                block_on(removal).expect("a removal");
            }
        }
        for _ in 0..50 {
            bench.snapshot(&format!("v@t{taken}"));
            bench.clone_snapshot(&format!("v@t{taken}"), &format!("c{taken}"));
            bench.remove(&format!("c{taken}"), false);
            taken += 1;
        }
    });
}

fn discard(bench: &Bench<Hurried>, volume: &Attached, lba: u64) {
    let offset = lba * BLOCK_BYTES;
    block_on(volume.discard(&bench.device, offset, BLOCK_BYTES)).expect("a discard");
}

/// Changes of single blocks, at random, until the journal is full.
pub(super) fn wear_by_discards(bench: &Bench<Hurried>, volume: &Attached, rng: &mut Rng) {
    let blocks = volume.bytes() / BLOCK_BYTES;
    wear(bench, || {
        for _ in 0..AT_ONCE {
            discard(bench, volume, rng.u64(..blocks));
        }
    });
}

/// Lets `some` happen, with the background work in between, until that writes a checkpoint. Then lets as much happen
/// again, and half of it for what comes while a checkpoint is being written: there is no more to replay than that.
fn wear<D: Device>(bench: &Bench<D>, mut some: impl FnMut()) {
    let checkpoints = || bench.pool.stats().checkpoints;
    let mut once = || {
        some();
        block_on(bench.pool.flush(&bench.device)).expect("a flush");
    };
    let (before, mut rounds) = (checkpoints(), 0);
    while checkpoints() == before {
        once();
        bench.step();
        rounds += 1;
    }
    let before = checkpoints();
    for _ in 0..rounds + rounds / 2 {
        once();
    }
    assert_eq!(checkpoints(), before, "a checkpoint came between");
    let stats = bench.pool.stats();
    eprintln!(
        "prove: crash with {} of {} MiB of journal in use",
        stats.journal_used_bytes >> 20,
        stats.journal_bytes >> 20
    );
}

/// The p99 of 4k writes that had a checkpoint of the background work under way, beside that of those that had none.
fn checkpoints(setting: &Setting, card: &mut Card) {
    // Small, so that what is freed makes a checkpoint due each second or so.
    let blocks: u64 = 1 << 16;
    let wanted = setting.pick(8, 30);
    let mut rng = Rng::with_seed(setting.seed);
    let place = Place::new(&setting.folder, "checkpoints", 2 * blocks);
    place.allocate();
    let bench = Bench::create(place.device(), 2 * blocks);
    // Every write changes the map.
    let volume = bench.volume("v", blocks, Redirect::Always);
    bench.fill(&volume);
    bench.settle();
    let block = BlockBuf::zeroed(1);
    let written = || bench.pool.stats().checkpoints;
    let ours = beside(
        wanted,
        || {
            let before = written();
            let has_more = bench.step();
            if !has_more {
                thread::sleep(REST);
            }
            written() > before
        },
        || bench.write(&volume, rng.u64(..blocks), &block),
    );
    // What the same requests cost without the engine: the disk's share.
    let device = &bench.device;
    let write = |lba: u64, blocks: &[u8]| {
        block_on(device.write(lba * BLOCK_BYTES, blocks)).expect("a write of the device");
    };
    let flush = || block_on(device.flush()).expect("a flush of the device");
    let (first, last) = (blocks / 2, blocks);
    let mut other = Rng::with_seed(setting.seed);
    let mut is_due = false;
    let alone = beside(
        wanted,
        || {
            is_due = !is_due;
            if !is_due {
                thread::sleep(Duration::from_millis(500));
                return false;
            }
            flush();
            for _ in 0..RUNS {
                write(other.u64(first..last), &block);
                thread::sleep(PAGE_REST);
            }
            flush();
            for copy in [first, last] {
                write(copy, &block);
                flush();
            }
            true
        },
        || write(rng.u64(first..last), &block),
    );
    eprintln!("prove: the device alone, under the same requests: {alone:.2} times its p99");
    card.at_least("checkpoints under a load of writes", wanted, wanted);
    card.add(
        "p99 of 4k writes during a checkpoint as a multiple of otherwise",
        ours,
        Target::AtMost(SLOWER_MAX),
    );
    drop(volume);
}

/// How long the background thread rests where there is nothing to do.
const REST: Duration = Duration::from_millis(10);
/// Runs of pages that a checkpoint of such a pool writes, and how long it rests after each.
const RUNS: usize = 150;
const PAGE_REST: Duration = Duration::from_micros(100);

/// The p99 of `write` while `work` did what it then says it did, as a multiple of what it is otherwise; until it did that
/// so many times.
fn beside(wanted: u64, mut work: impl FnMut() -> bool + Send, mut write: impl FnMut()) -> f64 {
    let clock = SystemClock::new();
    let over = Over::default();
    let (times, windows) = thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _end = over.at_the_end();
            let mut windows = Vec::new();
            while (windows.len() as u64) < wanted {
                let began = clock.monotonic_ns();
                if work() {
                    windows.push(began..clock.monotonic_ns());
                }
            }
            windows
        });
        let mut times = Vec::new();
        while !over.is() {
            let began = clock.monotonic_ns();
            write();
            times.push(began..clock.monotonic_ns());
        }
        (times, worker.join().expect("the background work"))
    });
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut left = windows.as_slice();
    for time in times {
        while left.first().is_some_and(|window| window.end <= time.start) {
            left = &left[1..];
        }
        let is_beside = left.first().is_some_and(|window| window.start < time.end);
        let times = if is_beside { &mut with } else { &mut without };
        times.push(time.end - time.start);
    }
    let (during, otherwise) = (permille(&with, 990), permille(&without, 990));
    eprintln!(
        "prove: p99 of {} writes with a checkpoint under way {during} ns, of {} others {otherwise} ns",
        with.len(),
        without.len()
    );
    ratio(during, otherwise)
}
