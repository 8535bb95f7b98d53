//! The endless day: a snapshot every so many writes, the newest ones kept, the oldest deleted, on and on. What the last tenth
//! of it does beside the first, and what is used in the end.

use super::Setting;
use super::kit::{Bench, path, rate, ratio, timed};
use super::ram::Ram;
use blockfork::device::BlockBuf;
use blockfork::pool::Redirect;
use blockfork::units::BLOCK_BYTES;
use fastrand::Rng;
use score::{Card, Target};

/// 1 GiB.
const VOLUME_BLOCKS: u64 = 1 << 18;
const POOL_BLOCKS: u64 = 1 << 20;
const WRITES_EACH: u64 = 1_000;
const KEPT: u64 = 50;
const SPEED_KEPT_MIN: f64 = 0.95;
const USED_MAX: f64 = 1.02;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let snapshots: u64 = setting.pick(500, 1_000);
    let mut rng = Rng::with_seed(setting.seed);
    let bench = Bench::create(Ram::new(POOL_BLOCKS), POOL_BLOCKS);
    bench.settle();
    let used = || bench.pool.status().used_bytes / BLOCK_BYTES;
    let empty = used();
    let volume = bench.volume("v", VOLUME_BLOCKS, Redirect::Shared);
    bench.fill(&volume);
    bench.settle();
    let block = BlockBuf::zeroed(1);
    let mut tenths = Vec::new();
    bench.beside(|| {
        for tenth in 0..10_u64 {
            let ((), ns) = timed(|| {
                for number in tenth * snapshots / 10..(tenth + 1) * snapshots / 10 {
                    for _ in 0..WRITES_EACH {
                        bench.write(&volume, rng.u64(..VOLUME_BLOCKS), &block);
                    }
                    bench.snapshot(&format!("v@s{number}"));
                    if let Some(oldest) = number.checked_sub(KEPT) {
                        bench.remove(&format!("v@s{oldest}"), false);
                    }
                }
            });
            tenths.push(rate(snapshots / 10 * WRITES_EACH, ns));
        }
    });
    eprintln!("prove: writes a second, tenth by tenth: {tenths:.0?}");
    bench.settle();
    card.at_least("writes", snapshots * WRITES_EACH, snapshots * WRITES_EACH);
    if let (Some(first), Some(last)) = (tenths.first(), tenths.last()) {
        card.add(
            "speed of the last tenth as a part of the first's",
            last / first,
            Target::AtLeast(SPEED_KEPT_MIN),
        );
    }
    let left: Vec<_> = (snapshots - KEPT..snapshots)
        .map(|number| path(&format!("v@s{number}")))
        .collect();
    let unique = bench.blocks_of(&left);
    card.add(
        "space used as a multiple of what is live and unique to snapshots",
        ratio(used() - empty, VOLUME_BLOCKS + unique),
        Target::AtMost(USED_MAX),
    );
    card.none("leaks and damage", bench.complaints());
    volume.detach();
    bench.remove("v", true);
    bench.settle();
    card.none("blocks in use after everything was removed", used() - empty);
}
