//! A few histories of four queues; `prove histories` runs many.

use blockfork_tests::queues;

#[test]
fn what_four_queues_see_on_threads_is_linearizable() {
    for seed in 0..4 {
        queues::on_threads(seed, 2000);
    }
}

#[test]
fn what_four_queues_see_in_seeded_order_is_linearizable() {
    for seed in 0..8 {
        eprintln!("seed {seed}");
        queues::as_tasks(seed, 2000);
    }
}
