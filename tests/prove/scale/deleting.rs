//! Deleting: how long `rm` takes whatever the size, what a busy neighbour notices while the space is returned, and what the
//! pool's file keeps.

use super::Setting;
use super::kit::{Bench, median, permille, ratio, seconds, timed};
use super::ram::Ram;
use super::sparse::Place;
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{BlockBuf, FileDevice};
use blockfork::pool::{Attached, Redirect};
use fastrand::Rng;
use score::{Card, Target};
use std::thread;
use std::time::Duration;

const LARGER_MAX: f64 = 1.5;
const SLOWER_MAX: f64 = 1.2;
const KEPT_PERCENT_MAX: f64 = 1.0;
const SMALL_BLOCKS: u64 = 1 << 12;
/// What is removed, in turn.
const KINDS: [&str; 5] = [
    "the oldest snapshot",
    "the newest snapshot",
    "a snapshot in the middle, with a clone",
    "an origin of clones, with its snapshots",
    "a clone, with its snapshots",
];
/// How long a neighbour is watched at most.
const RECLAIM_SECONDS_MAX: u64 = 120;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    returns_at_once(setting, card);
    on_a_file(setting, card);
}

fn returns_at_once(setting: &Setting, card: &mut Card) {
    let large = setting.pick(1 << 18, 1 << 22);
    let rounds = setting.pick(7, 15);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(4 * large), 4 * large);
    let mut times: [[Vec<u64>; 2]; KINDS.len()] = Default::default();
    for _ in 0..rounds {
        for (size, blocks) in [SMALL_BLOCKS, large].into_iter().enumerate() {
            build(&bench, blocks, &mut rng);
            for (kind, (target, recursive)) in [
                ("v@s0", false),
                ("v@s4", false),
                ("v@s2", false),
                ("o", true),
                ("c", true),
            ]
            .into_iter()
            .enumerate()
            {
                times[kind][size].push(timed(|| bench.remove(target, recursive)).1);
                bench.settle();
            }
            for rest in ["v", "oc"] {
                bench.remove(rest, true);
            }
            bench.settle();
        }
    }
    for (kind, [small, large]) in KINDS.iter().zip(&times) {
        let (small, large) = (median(small), median(large));
        eprintln!(
            "prove: removing {kind}: {small} ns of a small volume, {large} ns of a large one"
        );
        card.add(
            &format!("time to remove {kind}, of a large volume as a multiple of a small one"),
            ratio(large, small),
            Target::AtMost(LARGER_MAX),
        );
    }
}

/// A volume `v` with snapshots `s0` to `s4`, changes between them, and a clone `c` of the one in the middle, which has a
/// snapshot too; an origin `o` whose clone is `oc`.
fn build(bench: &Bench<Ram>, blocks: u64, rng: &mut Rng) {
    let block = BlockBuf::zeroed(1);
    let mut change = |volume: &Attached| {
        for _ in 0..16 {
            bench.write(volume, rng.u64(..blocks), &block);
        }
    };
    let volume = bench.volume("v", blocks, Redirect::Shared);
    bench.fill(&volume);
    for number in 0..5 {
        bench.snapshot(&format!("v@s{number}"));
        change(&volume);
    }
    volume.detach();
    bench.clone_snapshot("v@s2", "c");
    let clone = bench.attach("c");
    change(&clone);
    bench.snapshot("c@s");
    change(&clone);
    clone.detach();
    let origin = bench.volume("o", blocks, Redirect::Shared);
    bench.fill(&origin);
    bench.snapshot("o@s");
    bench.clone_snapshot("o@s", "oc");
    change(&origin);
    origin.detach();
    bench.settle();
}

fn on_a_file(setting: &Setting, card: &mut Card) {
    let big = setting.pick(1 << 17, 1 << 20);
    let small = setting.pick(1 << 15, 1 << 17);
    let watched = setting.pick(5, 20);
    let mut rng = Rng::with_seed(setting.seed);
    let pool_blocks = 2 * (big + small);
    let place = Place::new(&setting.folder, "deleting", pool_blocks);
    let bench = Bench::create(place.device(), pool_blocks);
    let empty = place.bytes_taken();
    let neighbour = bench.volume("neighbour", small, Redirect::Shared);
    bench.fill(&neighbour);
    let volume = bench.volume("big", big, Redirect::Shared);
    bench.fill_at_random(&volume, big, &mut rng);
    volume.detach();
    bench.settle();
    let peak = place.bytes_taken();
    busy_neighbour(&bench, &neighbour, watched, &mut rng, card);
    neighbour.detach();
    bench.remove("neighbour", true);
    bench.settle();
    // What is given back in idle moments has some.
    let mut kept = place.bytes_taken();
    loop {
        for _ in 0..20 {
            bench.step();
            thread::sleep(Duration::from_millis(100));
        }
        let before = std::mem::replace(&mut kept, place.bytes_taken());
        if kept >= before {
            break;
        }
    }
    eprintln!(
        "prove: the pool's file takes {} MiB empty, {} MiB at its peak, {} MiB in the end",
        empty >> 20,
        peak >> 20,
        kept >> 20
    );
    card.add(
        "percent of its peak that the file keeps beyond an empty pool's",
        100.0 * ratio(kept.saturating_sub(empty), peak),
        Target::AtMost(KEPT_PERCENT_MAX),
    );
}

/// Removes the volume `big` while `neighbour` is written.
fn busy_neighbour(
    bench: &Bench<FileDevice>,
    neighbour: &Attached,
    watched: u64,
    rng: &mut Rng,
    card: &mut Card,
) {
    let (before, during) = bench.beside(|| {
        let clock = SystemClock::new();
        let until = |limit: u64| clock.monotonic_ns() >= limit * 1_000_000_000;
        let before = bench.write_times(neighbour, rng, || until(watched));
        let began = clock.monotonic_ns();
        bench.remove("big", true);
        let mut looks = 0_u64;
        let is_returned = || {
            looks += 1;
            looks.is_multiple_of(64)
                && (bench.pool.status().reclaiming == 0 || until(watched + RECLAIM_SECONDS_MAX))
        };
        let during = bench.write_times(neighbour, rng, is_returned);
        let took = clock.monotonic_ns() - began;
        eprintln!("prove: the space was returned in {:.1} s", seconds(took));
        (before, during)
    });
    let (usual, busy) = (permille(&before, 990), permille(&during, 990));
    eprintln!(
        "prove: p99 of {} writes {usual} ns, of {} during the return of space {busy} ns",
        before.len(),
        during.len()
    );
    card.none(
        "removed volumes whose space was not returned",
        bench.pool.status().reclaiming,
    );
    card.add(
        "p99 of a neighbour's 4k writes during the return as a multiple of before",
        ratio(busy, usual),
        Target::AtMost(SLOWER_MAX),
    );
}
