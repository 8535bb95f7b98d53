//! Independent cases on all cores. A case that panics is a failure with its message, and the others go on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// A case that panicked.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The case's number.
    pub case: u64,
    /// What the panic said.
    pub message: String,
}

/// Runs `case` for each number of `cases`; what they returned and those that panicked, in the order of their numbers.
pub fn each<T: Send>(
    cases: std::ops::Range<u64>,
    case: impl Fn(u64) -> T + Sync,
) -> (Vec<T>, Vec<Failure>) {
    each_until(cases, false, case)
}

/// The same; with `first`, no case begins after one has failed.
pub fn each_until<T: Send>(
    cases: std::ops::Range<u64>,
    first: bool,
    case: impl Fn(u64) -> T + Sync,
) -> (Vec<T>, Vec<Failure>) {
    let next = AtomicU64::new(cases.start);
    let ended = Mutex::new((Vec::new(), Vec::new()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= cases.end {
                return;
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| case(number)));
            let mut ended = ended.lock().unwrap();
            match outcome {
                Ok(value) => ended.0.push((number, value)),
                Err(panic) => {
                    ended.1.push(Failure {
                        case: number,
                        message: message(panic.as_ref()),
                    });
                    if first {
                        next.store(cases.end, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let (mut values, mut failures) = ended.into_inner().unwrap();
    values.sort_by_key(|(number, _)| *number);
    failures.sort_by_key(|failure| failure.case);
    (
        values.into_iter().map(|(_, value)| value).collect(),
        failures,
    )
}

/// What a panic said.
pub fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message")
        .to_owned()
}
