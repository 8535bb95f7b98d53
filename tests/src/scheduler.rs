//! Tasks on one thread, polled in an order that a seed decides: the same seed gives the same interleaving.

use fastrand::Rng;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// A task of a run.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Turns without any task ending after which a run counts as hung.
const TURNS_MAX: u64 = 5_000_000;

/// How often those who are slow are chosen anew, in turns.
const SLOW_TURNS: u32 = 300;
/// How much rarer a slow task gets its turn.
const SLOW_FACTOR: u8 = 100;

/// Polls the tasks until all have ended. `stop` ends the run early, whatever is under way: a crash.
///
/// In half of the runs some tasks are slow for a while, as a device's latency varies: what the others do meanwhile, a
/// whole checkpoint say, comes between two steps of a slow one.
///
/// # Panics
///
/// When the tasks wait for each other for ever.
pub fn run(mut tasks: Vec<Task<'_>>, rng: &mut Rng, mut stop: impl FnMut() -> bool) {
    // Tasks are polled whether they were woken or not, so a lost wake-up does not show here.
    let mut context = Context::from_waker(Waker::noop());
    let mut turns = 0;
    let has_slow = rng.bool();
    let mut is_slow = vec![false; tasks.len()];
    while !tasks.is_empty() && !stop() {
        if has_slow && rng.u32(..SLOW_TURNS) == 0 {
            is_slow.fill_with(|| rng.u8(..3) == 0);
        }
        let index = rng.usize(..tasks.len());
        turns += 1;
        assert!(turns < TURNS_MAX, "the tasks wait for each other");
        if is_slow[index] && rng.u8(..SLOW_FACTOR) > 0 {
            continue;
        }
        if let Poll::Ready(()) = tasks[index].as_mut().poll(&mut context) {
            drop(tasks.swap_remove(index));
            is_slow.swap_remove(index);
            turns = 0;
        }
    }
}
