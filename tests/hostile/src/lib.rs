//! Hostile arguments, socket bytes, images and users against the real `ublkctl`, without ublk: cases by seed, each
//! ending with a documented exit code, one clear line, and a pool that a refusal did not change.

#![expect(
    clippy::disallowed_methods,
    reason = "a run of real processes is measured by a real clock"
)]

mod arguments;
mod images;
mod load;
mod machine;
mod neighbours;
mod served;
mod socket;

use load::Met;
use machine::Machine;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How much is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed of all cases.
    pub seed: u64,
    /// A sample.
    pub quick: bool,
    /// Only this case, `KIND:NUMBER`.
    pub only: Option<(String, u64)>,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Cases of each kind.
    pub cases: Vec<(&'static str, u64)>,
    /// How long each kind took.
    pub times: Vec<(&'static str, Duration)>,
    /// What failed, each with its kind and number: `arguments:17: ...`.
    pub failures: Vec<String>,
    /// The longest that a client of a daemon waited for an answer while others were hostile, in milliseconds.
    pub waited_ms_max: u64,
    /// What a client over NBD did meanwhile: operations that were right, and those that were not.
    pub io_operations: u64,
    /// Those that failed, or read what was not written.
    pub io_errors: u64,
    /// Cases that this machine could not run, and why.
    pub skipped: Vec<String>,
}

/// What a case is told.
pub(crate) struct Case<'a> {
    pub(crate) machine: &'a mut Machine,
    pub(crate) rng: fastrand::Rng,
    pub(crate) number: u64,
}

type Run = fn(Case<'_>) -> Result<(), String>;

/// A kind of cases that are independent of each other: its name, how many there are and are in a sample.
const KINDS: [(&str, u64, u64, Run); 3] = [
    ("arguments", 5000, 250, arguments::run),
    ("truncation", images::BOUNDARIES, 64, images::truncated),
    ("image", 1200, 60, images::changed),
];

impl Plan {
    /// The cases of a kind that run one behind another: the first of them make the sample.
    fn numbers(&self, all: u64, sample: u64) -> Range<u64> {
        match (&self.only, self.quick) {
            (Some((_, number)), _) => *number..number + 1,
            (None, true) => 0..sample,
            (None, false) => 0..all,
        }
    }
}

/// The choices of a case.
fn seeded(plan: &Plan, number: u64) -> fastrand::Rng {
    fastrand::Rng::with_seed(plan.seed.wrapping_mul(1 << 32) + number)
}

impl Outcome {
    /// All cases.
    pub fn total(&self) -> u64 {
        self.cases.iter().map(|(_, count)| count).sum()
    }

    fn note(&mut self, kind: &'static str, began: Instant, ended: (u64, Vec<String>)) {
        self.cases.push((kind, ended.0));
        self.times.push((kind, began.elapsed()));
        self.failures.extend(ended.1);
    }
}

/// Runs the plan with the program at `program`.
pub fn run(program: &Path, plan: &Plan) -> Outcome {
    // Where another user reaches it too, and before any other thread: a program that a child of another thread still has
    // open for writing cannot be started.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let own = folder.path().join("ublkctl");
    fs::copy(program, &own).unwrap();
    let program = own.as_path();
    let mut outcome = Outcome::default();
    let is_wanted = |kind: &str| plan.only.as_ref().is_none_or(|(only, _)| only == kind);
    for (kind, all, sample, case) in KINDS {
        if is_wanted(kind) {
            let began = Instant::now();
            let ended = each(program, plan, kind, (all, sample), case);
            outcome.note(kind, began, ended);
        }
    }
    let mut met = Met::default();
    for (kind, run) in [
        ("served", served::run as fn(&Path, &Plan) -> _),
        ("socket", socket::run),
    ] {
        if is_wanted(kind) {
            let began = Instant::now();
            let (here, ended) = run(program, plan);
            met.add(here);
            outcome.note(kind, began, ended);
        }
    }
    outcome.waited_ms_max = u64::try_from(met.waited.as_millis()).unwrap_or(u64::MAX);
    (outcome.io_operations, outcome.io_errors) = (met.operations, met.errors);
    if is_wanted("neighbours") {
        let began = Instant::now();
        let (skipped, ended) = neighbours::run(program, plan.quick);
        outcome.skipped = skipped;
        outcome.note("neighbours", began, ended);
    }
    outcome
}

/// Runs the cases of a kind on all processors, each processor with a machine of its own.
fn each(
    program: &Path,
    plan: &Plan,
    kind: &'static str,
    (all, sample): (u64, u64),
    run: Run,
) -> (u64, Vec<String>) {
    // A sample is spread over all numbers, which matters where a number is a place.
    let numbers: Vec<u64> = match &plan.only {
        Some((_, number)) => vec![*number],
        None if plan.quick => (0..sample).map(|index| index * all / sample).collect(),
        None => (0..all).collect(),
    };
    let next = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    let work = || {
        let mut machine = Machine::new(program);
        loop {
            let index = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap();
            let Some(&number) = numbers.get(index) else {
                break;
            };
            let case = Case {
                rng: seeded(plan, number),
                machine: &mut machine,
                number,
            };
            if let Err(fact) = guarded(|| run(case)) {
                failures
                    .lock()
                    .unwrap()
                    .push(format!("{kind}:{number}: {fact}"));
                machine = Machine::new(program);
            }
        }
        if let Err(fact) = machine.nothing_left_behind() {
            failures.lock().unwrap().push(format!("{kind}: {fact}"));
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    (numbers.len() as u64, failures.into_inner().unwrap())
}

/// A panic of the harness is a failure of its case.
pub(crate) fn guarded(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("a panic").to_owned())
    })
}
