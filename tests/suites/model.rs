//! A pool against its model: random operations, crashes and reopenings, compared block by block.

use blockfork_tests::model::Pair;
use blockfork_tests::parallel;

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("BLOCKFORK_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("BLOCKFORK_SEED is a number");
            seed..seed + 1
        }
        Err(_) => {
            let count = std::env::var("BLOCKFORK_SEEDS")
                .map_or(100, |text| text.parse().expect("a number"));
            0..count
        }
    }
}

fn run(pool_blocks: u64, with_ring: bool, offset: u64) {
    let (_, failures) = parallel::each_until(seeds(), true, |seed| {
        Pair::new(seed + offset, pool_blocks, with_ring).run(4, 60);
    });
    if let Some(failure) = failures.first() {
        panic!(
            "{}\nreplay: BLOCKFORK_SEED={} cargo test -p blockfork-tests --test model",
            failure.message, failure.case
        );
    }
}

#[test]
fn a_pool_equals_its_model_through_power_cuts() {
    run(8192, false, 0);
}

#[test]
fn a_pool_equals_its_model_when_it_is_nearly_full() {
    run(4096, false, 1_000_000);
}

#[test]
fn a_killed_process_loses_nothing_acknowledged() {
    run(8192, true, 2_000_000);
}
