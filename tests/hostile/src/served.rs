//! Hostile command lines against a pool that is served, while a client of one of its volumes works.

use super::load::{Load, Met};
use super::machine::Machine;
use super::{Plan, arguments, guarded, seeded};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

const CASES: u64 = 2000;
const SAMPLE: u64 = 60;
/// What may end the client's work by right, and what makes the pool so large that a check of it takes long.
const BY_RIGHT: [&str; 4] = ["destroy", "export", "detach", "grow"];

/// What the client met; how many cases ran, and which failed.
pub(crate) fn run(program: &Path, plan: &Plan) -> (Met, (u64, Vec<String>)) {
    let machine = Machine::new(program);
    let mut daemon = machine.serve();
    let load = Load::new(&machine, plan.seed);
    arguments::furnish(&machine);
    let numbers = plan.numbers(CASES, SAMPLE);
    let (count, end) = (numbers.end - numbers.start, numbers.end);
    let next = AtomicU64::new(numbers.start);
    let failures = Mutex::new(Vec::new());
    let fail = |fact: String| failures.lock().unwrap().push(fact);
    let is_over = AtomicBool::new(false);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= end {
                break;
            }
            if let Err(fact) = guarded(|| one(&machine, seeded(plan, number))) {
                fail(format!("served:{number}: {fact}"));
            }
        }
    };
    let met = thread::scope(|scope| {
        let load = scope.spawn(|| load.run(&is_over));
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        let (met, ended) = load.join().unwrap();
        if let Err(fact) = ended {
            fail(format!("served: {fact}"));
        }
        met
    });
    if !daemon.is_alive() {
        fail("served: the daemon died".into());
    }
    drop(daemon);
    if let Err(fact) = machine.is_sound() {
        fail(format!("served: {fact}"));
    }
    (met, (count, failures.into_inner().unwrap()))
}

fn one(machine: &Machine, mut rng: fastrand::Rng) -> Result<(), String> {
    let words = loop {
        let words = arguments::words(&mut rng);
        if !words
            .iter()
            .any(|word| BY_RIGHT.iter().any(|it| word == it))
        {
            break words;
        }
    };
    let said = machine.run(&words);
    let shown = format!("{words:?}");
    said.is_documented(arguments::codes(&words))
        .map_err(|fact| format!("{shown:.400}: {fact}"))
}
