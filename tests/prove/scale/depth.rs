//! A clone of a snapshot of a clone, and so on: reads and writes of the last one beside those of the first, in turns.

use super::Setting;
use super::kit::{Bench, median_rate};
use super::ram::Ram;
use blockfork::device::BlockBuf;
use blockfork::pool::{Attached, Redirect};
use fastrand::Rng;
use score::{Card, Target};
use std::sync::Arc;

/// 128 MiB: the map of both together stays in the processor's cache as well as that of one.
const VOLUME_BLOCKS: u64 = 1 << 15;
const POOL_BLOCKS: u64 = 1 << 23;
/// What each generation changes of what it was made from.
const CHANGES: u64 = 16;
const KEPT_MIN: f64 = 0.95;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let depth = setting.pick(200, 1_000);
    let rounds = setting.pick(15, 51);
    let count = setting.pick(20_000, 50_000);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(), POOL_BLOCKS);
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
        bench.read_rate(volume, count, &mut rng)
    });
    // All of both is owned by others too, and is redirected.
    let mut round = 0;
    let redirected = in_turns(pair, rounds, |volume| {
        round += 1;
        let snapshot = format!("{}@r{round}", volume.path());
        bench.snapshot(&snapshot);
        let rate = bench.write_rate(volume, count / 8, &mut rng);
        bench.remove(&snapshot, false);
        bench.settle();
        rate
    });
    for volume in pair {
        (0..VOLUME_BLOCKS).for_each(|lba| bench.write(volume, lba, &block));
    }
    bench.settle();
    let in_place = in_turns(pair, rounds, |volume| {
        bench.write_rate(volume, count, &mut rng)
    });
    for (metric, kept) in [
        ("4k reads of the deepest as a part of the first's", reads),
        ("4k writes to shared blocks, likewise", redirected),
        ("4k writes in place, likewise", in_place),
    ] {
        card.add(metric, kept, Target::AtLeast(KEPT_MIN));
    }
}

/// The second one's median rate as a part of the first's. Who begins alternates.
fn in_turns(
    [first, second]: [&Arc<Attached>; 2],
    rounds: usize,
    mut measure: impl FnMut(&Arc<Attached>) -> f64,
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
    median_rate(&of_second) / median_rate(&of_first)
}
