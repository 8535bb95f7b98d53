//! Snapshots of one volume, each with a change before it: how long the last ones take beside the first, how long their
//! list takes, and what reads of the volume notice.

use super::Setting;
use super::kit::{Bench, PIECE, last_to_first, median, rate, seconds, timed};
use super::ram::Ram;
use blockfork::device::BlockBuf;
use blockfork::pool::Redirect;
use fastrand::Rng;
use futures_lite::future::block_on;
use score::{Card, Target};
use std::fmt::Write as _;

/// 512 MiB.
const VOLUME_BLOCKS: u64 = 1 << 17;
/// Room for 100,000 snapshots, each with a block and the pages above it.
const POOL_BLOCKS: u64 = 1 << 21;
const SLOWER_MAX: f64 = 1.5;
const LIST_SECONDS_MAX: f64 = 0.5;
const READS_KEPT_MIN: f64 = 0.95;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let wanted = setting.pick(10_000, 100_000);
    let pieces = setting.pick(1_000, 4_000);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(POOL_BLOCKS), POOL_BLOCKS);
    let volume = bench.volume("v", VOLUME_BLOCKS, Redirect::Shared);
    bench.fill(&volume);
    bench.settle();
    let block = BlockBuf::zeroed(1);
    let (mut times, mut speeds) = (Vec::new(), Vec::new());
    let mut curve = String::new();
    let mut next_point = 1;
    for number in 1..=wanted {
        bench.write(&volume, rng.u64(..VOLUME_BLOCKS), &block);
        let name = format!("v@s{number}");
        times.push(timed(|| bench.snapshot(&name)).1);
        if number % 64 == 0 {
            bench.step();
        }
        if number == next_point {
            let pieces: Vec<u64> = (0..pieces)
                .map(|_| timed(|| bench.read(&volume, PIECE, &mut rng)).1)
                .collect();
            let speed = rate(PIECE, median(&pieces));
            let recent = median(&times[times.len().saturating_sub(100)..]);
            eprintln!("prove: {number} snapshots: {recent} ns for one, {speed:.0} reads a second");
            writeln!(curve, "{number} {recent} {speed:.0}").expect("a string takes it");
            speeds.push(speed);
            next_point *= 10;
        }
    }
    if let Some(file) = &setting.curve {
        std::fs::write(file, curve).expect("the curve is written");
    }
    card.at_least(
        "snapshots of one volume",
        bench.pool.status().snapshots,
        wanted,
    );
    card.add(
        "time of the last 100 as a multiple of the first",
        last_to_first(&times),
        Target::AtMost(SLOWER_MAX),
    );
    if let (Some(first), Some(last)) = (speeds.first(), speeds.last()) {
        card.add(
            "4k reads with all of them as a part of those with one",
            last / first,
            Target::AtLeast(READS_KEPT_MIN),
        );
    }
    list(&bench, card, "seconds to list all of them", wanted);
    volume.detach();
    drop(volume);
    let bench = Bench::open(bench.close(), POOL_BLOCKS);
    list(&bench, card, "seconds to list them after opening", wanted);
}

fn list(bench: &Bench<Ram>, card: &mut Card, metric: &str, wanted: u64) {
    let (entries, ns) = timed(|| block_on(bench.pool.list(&bench.device)).expect("the list"));
    assert!(entries.len() as u64 > wanted, "some are missing");
    card.add(metric, seconds(ns), Target::AtMost(LIST_SECONDS_MAX));
}
