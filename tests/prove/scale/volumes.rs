//! Many volumes in one pool, some of them clones of one image: how long the last ones take beside the first.

use super::Setting;
use super::kit::{Bench, first_and_last, last_to_first, timed};
use super::ram::Ram;
use blockfork::device::BlockBuf;
use blockfork::pool::Redirect;
use fastrand::Rng;
use score::{Card, Target};

/// The image: 1 GiB.
const IMAGE_BLOCKS: u64 = 1 << 18;
const VOLUME_BLOCKS: u64 = 1 << 18;
/// 256 GiB: a volume takes its blocks from a region of its own, while there are any.
const POOL_BLOCKS: u64 = 1 << 26;
/// One of so many is a clone of the image.
const CLONE_EACH: u64 = 10;
const SLOWER_MAX: f64 = 1.5;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let wanted = setting.pick(2_000, 10_000);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(POOL_BLOCKS), POOL_BLOCKS);
    let image = bench.volume("image", IMAGE_BLOCKS, Redirect::Shared);
    bench.fill(&image);
    bench.snapshot("image@base");
    bench.settle();
    let block = BlockBuf::zeroed(1);
    let (mut created, mut cloned) = (Vec::new(), Vec::new());
    for number in 1..=wanted {
        let name = format!("v{number}");
        if number % CLONE_EACH == 0 {
            cloned.push(timed(|| bench.clone_snapshot("image@base", &name)).1);
        } else {
            let make = || bench.create_volume(&name, VOLUME_BLOCKS, Redirect::Shared);
            created.push(timed(make).1);
        }
        let volume = bench.attach(&name);
        for _ in 0..4 {
            bench.write(&volume, rng.u64(..VOLUME_BLOCKS), &block);
        }
        volume.detach();
        if number % 64 == 0 {
            bench.step();
        }
    }
    image.detach();
    drop(image);
    card.at_least("volumes in one pool", bench.pool.status().volumes, wanted);
    card.at_least(
        "of them clones of one image",
        cloned.len() as u64,
        wanted / CLONE_EACH,
    );
    eprintln!(
        "prove: the first and the last took {:?} ns to create, {:?} ns to clone",
        first_and_last(&created),
        first_and_last(&cloned)
    );
    card.add(
        "time to create the last 100 as a multiple of the first",
        last_to_first(&created),
        Target::AtMost(SLOWER_MAX),
    );
    card.add(
        "time to clone the last 100 as a multiple of the first",
        last_to_first(&cloned),
        Target::AtMost(SLOWER_MAX),
    );
}
