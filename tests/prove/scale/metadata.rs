//! How many bytes of metadata there are for data that was written block by block at random, and for data written in order.

use super::Setting;
use super::kit::{Bench, ratio};
use super::ram::Ram;
use blockfork::pool::{Attached, Redirect};
use blockfork::units::BLOCK_BYTES;
use fastrand::Rng;
use score::{Card, Target};

const RANDOM_PERCENT_MAX: f64 = 0.35;
const SEQUENTIAL_PERCENT_MAX: f64 = 0.02;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let blocks = setting.pick(1 << 20, 1 << 22);
    let mut rng = Rng::with_seed(setting.seed);
    let at_random = percent(blocks, |bench, volume| {
        bench.fill_at_random(volume, blocks, &mut rng);
    });
    let in_order = percent(blocks, |bench, volume| bench.fill(volume));
    card.add(
        "metadata in percent of 4k data written at random",
        at_random,
        Target::AtMost(RANDOM_PERCENT_MAX),
    );
    card.add(
        "metadata in percent of data written in order",
        in_order,
        Target::AtMost(SEQUENTIAL_PERCENT_MAX),
    );
}

/// Metadata in percent of so many blocks that `fill` writes. Everything that the engine keeps for them counts, with both
/// places of each count page; the journal and the superblock copies, which every pool has once, do not.
fn percent(blocks: u64, fill: impl FnOnce(&Bench<Ram>, &Attached)) -> f64 {
    let bench = Bench::create(Ram::new(blocks + blocks / 16), blocks + blocks / 16);
    let used = |bench: &Bench<Ram>| bench.pool.status().used_bytes / BLOCK_BYTES;
    bench.settle();
    let fixed = used(&bench);
    let volume = bench.volume("v", blocks, Redirect::Shared);
    fill(&bench, &volume);
    bench.settle();
    let pages = used(&bench) - fixed - blocks;
    let counts = bench.device.count_pages();
    eprintln!("prove: {blocks} blocks: {pages} pages of maps and catalog, {counts} of counts");
    volume.detach();
    100.0 * ratio(pages + counts, blocks)
}
