//! Tasks on one thread, polled in an order that a seed decides: the same seed gives the same interleaving.

use fastrand::Rng;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// A task of a run.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Turns without any task ending after which a run counts as hung.
const TURNS_MAX: u64 = 5_000_000;

/// Polls the tasks until all have ended. `stop` ends the run early, whatever is under way: a crash.
///
/// # Panics
///
/// When the tasks wait for each other for ever.
pub fn run(mut tasks: Vec<Task<'_>>, rng: &mut Rng, mut stop: impl FnMut() -> bool) {
    // Tasks are polled whether they were woken or not, so a lost wake-up does not show here.
    let mut context = Context::from_waker(Waker::noop());
    let mut turns = 0;
    while !tasks.is_empty() && !stop() {
        let index = rng.usize(..tasks.len());
        if let Poll::Ready(()) = tasks[index].as_mut().poll(&mut context) {
            drop(tasks.swap_remove(index));
            turns = 0;
        }
        turns += 1;
        assert!(turns < TURNS_MAX, "the tasks wait for each other");
    }
}
