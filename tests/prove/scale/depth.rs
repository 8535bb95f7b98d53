//! A clone of a snapshot of a clone, and so on: reads and writes of the last one beside those of the first, in turns.

use super::Setting;
use super::kit::{Bench, PIECE, median, ratio, timed};
use super::ram::Ram;
use blockfork::device::BlockBuf;
use blockfork::pool::{Attached, Redirect};
use fastrand::Rng;
use score::{Card, Target};
use std::sync::Arc;

/// 128 MiB: the map of both together stays in the processor's cache as well as that of one.
const VOLUME_BLOCKS: u64 = 1 << 15;
const POOL_BLOCKS: u64 = 1 << 23;
/// What each generation changes of what it was made from. Few: data that many generations wrote lies scattered, and that is
/// not what depth costs.
const CHANGES: u64 = 1;
const KEPT_MIN: f64 = 0.95;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let depth = setting.pick(200, 1_000);
    let rounds = setting.pick(1_000, 4_000);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(POOL_BLOCKS), POOL_BLOCKS);
    let base = bench.volume("v0", VOLUME_BLOCKS, Redirect::Shared);
    bench.fill(&base);
    base.detach();
    let block = BlockBuf::zeroed(1);
    for level in 1..=depth {
        let snapshot = format!("v{}@s", level - 1);
        bench.snapshot(&snapshot);
        bench.clone_snapshot(&snapshot, &format!("v{level}"));
        let volume = bench.attach(&format!("v{level}"));
        for _ in 0..CHANGES {
            bench.write(&volume, rng.u64(..VOLUME_BLOCKS), &block);
        }
        volume.detach();
        bench.step();
    }
    bench.settle();
    card.at_least("clones, each of a snapshot of the one before", depth, depth);
    let first = bench.attach("v1");
    let last = bench.attach(&format!("v{depth}"));
    let pair = [&first, &last];
    let reads = in_turns(pair, rounds, |volume| {
        timed(|| bench.read(volume, PIECE, &mut rng)).1
    });
    // All of both is shared with a snapshot that is new each time.
    let mut number = 0;
    let redirected = in_turns(pair, rounds / 10, |volume| {
        number += 1;
        let snapshot = format!("{}@r{number}", volume.path());
        bench.snapshot(&snapshot);
        let ((), ns) = timed(|| bench.write_some(volume, PIECE, &mut rng));
        bench.remove(&snapshot, false);
        bench.settle();
        ns
    });
    for volume in pair {
        (0..VOLUME_BLOCKS).for_each(|lba| bench.write(volume, lba, &block));
    }
    bench.settle();
    let in_place = in_turns(pair, rounds, |volume| {
        timed(|| bench.write_some(volume, PIECE, &mut rng)).1
    });
    for (metric, kept) in [
        ("4k reads of the deepest as a part of the first's", reads),
        ("4k writes to shared blocks, likewise", redirected),
        ("4k writes in place, likewise", in_place),
    ] {
        card.add(metric, kept, Target::AtLeast(KEPT_MIN));
    }
}

/// The second one's speed as a part of the first's, from the medians of their times. Who begins alternates.
fn in_turns(
    [first, second]: [&Arc<Attached>; 2],
    rounds: usize,
    mut measure: impl FnMut(&Arc<Attached>) -> u64,
) -> f64 {
    let (mut of_first, mut of_second) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if round % 2 == 0 {
            of_first.push(measure(first));
            of_second.push(measure(second));
        } else {
            of_second.push(measure(second));
            of_first.push(measure(first));
        }
    }
    let (first, second) = (median(&of_first), median(&of_second));
    eprintln!("prove: {PIECE} requests: {first} ns of the first, {second} ns of the deepest");
    ratio(first, second)
}
