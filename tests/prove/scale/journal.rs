//! Opening after a crash at the worst moment, whatever filled the journal; and writes while a checkpoint is written, beside
//! those while none is.

use super::Setting;
use super::kit::{Bench, Over, path, permille, ratio, seconds, timed};
use super::sparse::{Hurried, Place};
use blockfork::device::{BlockBuf, Device};
use blockfork::pool::{Attached, Redirect};
use blockfork::units::BLOCK_BYTES;
use fastrand::Rng;
use futures_lite::future::block_on;
use score::{Card, Target};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) const SECONDS_MAX: f64 = 1.0;
const SLOWER_MAX: f64 = 1.5;
/// Blocks within which the order of what is built is random.
const WINDOW: u64 = 1 << 18;

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
        for _ in 0..10_000 {
            bench.write(volume, rng.u64(..blocks), &block);
        }
    });
    crashed("discards", &mut |bench, volume| {
        for _ in 0..10_000 {
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
        for _ in 0..10_000 {
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

/// The p99 of 4k writes that had a checkpoint under way, beside that of those that had none.
fn checkpoints(setting: &Setting, card: &mut Card) {
    let blocks = setting.pick(1 << 17, 1 << 20);
    let wanted = setting.pick(8, 40);
    let mut rng = Rng::with_seed(setting.seed);
    let place = Place::new(&setting.folder, "checkpoints", 2 * blocks);
    let bench = Bench::create(place.device(), 2 * blocks);
    // Every write changes the map.
    let volume = bench.volume("v", blocks, Redirect::Always);
    bench.fill(&volume);
    bench.settle();
    let block = BlockBuf::zeroed(1);
    let ours = beside_checkpoints(
        wanted,
        || block_on(bench.pool.checkpoint(&bench.device)).expect("a checkpoint"),
        || bench.write(&volume, rng.u64(..blocks), &block),
    );
    // What the same requests cost without the engine: the disk's share.
    let device = &bench.device;
    let pages = BlockBuf::zeroed(16);
    let write = |lba: u64, blocks: &[u8]| {
        block_on(device.write(lba * BLOCK_BYTES, blocks)).expect("a write of the device");
    };
    let flush = || block_on(device.flush()).expect("a flush of the device");
    let (first, last) = (blocks / 2, blocks);
    let mut other = Rng::with_seed(setting.seed);
    let alone = beside_checkpoints(
        wanted.min(8),
        || {
            flush();
            (0..64).for_each(|_| write(other.u64(first..last), &pages));
            flush();
            for copy in [first, last] {
                write(copy, &block);
                flush();
            }
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

/// The p99 of `write` with a `checkpoint` under way as a multiple of what it is otherwise. There is one each second.
fn beside_checkpoints(
    wanted: u64,
    mut checkpoint: impl FnMut() + Send,
    mut write: impl FnMut(),
) -> f64 {
    let (over, is_going) = (Over::default(), AtomicBool::new(false));
    let (mut with, mut without) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            let _end = over.at_the_end();
            for _ in 0..wanted {
                thread::sleep(Duration::from_secs(1));
                is_going.store(true, Ordering::Relaxed);
                checkpoint();
                is_going.store(false, Ordering::Relaxed);
            }
        });
        while !over.is() {
            let began_with = is_going.load(Ordering::Relaxed);
            let ((), ns) = timed(&mut write);
            if began_with || is_going.load(Ordering::Relaxed) {
                with.push(ns);
            } else {
                without.push(ns);
            }
        }
    });
    let (during, otherwise) = (permille(&with, 990), permille(&without, 990));
    eprintln!(
        "prove: p99 of {} writes with a checkpoint under way {during} ns, of {} others {otherwise} ns",
        with.len(),
        without.len()
    );
    ratio(during, otherwise)
}
