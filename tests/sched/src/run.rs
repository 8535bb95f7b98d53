//! Runs scenarios: both kinds of schedules on as many threads as there are cores.

use crate::device::Image;
use crate::scenarios::{ALL, Scenario};
use crate::world::{World, image};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How many schedules one seed begins; a failure is replayed by its file, so this only spreads the work.
const BATCH: usize = 500;
/// How often PCT changes its mind: the depth of the bugs that it finds with a known probability.
const DEPTH: usize = 3;

const USAGE: &str =
    "sched [--schedules N] [--seed N] [--failures FOLDER] [--replay FILE] [SCENARIO]";

struct Options {
    schedules: usize,
    seed: u64,
    failures: PathBuf,
    replay: Option<PathBuf>,
    only: Option<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options {
        schedules: 10_000,
        seed: 0,
        failures: std::env::temp_dir(),
        replay: None,
        only: None,
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--schedules" => options.schedules = words.next()?.parse().ok()?,
            "--seed" => options.seed = words.next()?.parse().ok()?,
            "--failures" => options.failures = words.next()?.into(),
            "--replay" => options.replay = Some(words.next()?.into()),
            _ if ALL.iter().any(|(name, _)| *name == word) => options.only = Some(word),
            _ => return None,
        }
    }
    Some(options)
}

/// Runs them; the last line is `schedules N failures N`.
pub(crate) fn main() -> ExitCode {
    let Some(options) = parse(std::env::args().skip(1)) else {
        let names: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: {USAGE}; scenarios: {}", names.join(" "));
        return ExitCode::from(2);
    };
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let scenarios: Vec<_> = ALL.iter().filter(|(name, _)| wanted(name)).collect();
    let begin = first_image();
    let (mut schedules, mut failures) = (0, 0);
    for (name, scenario) in &scenarios {
        let started = Instant::now();
        let share = options.schedules.div_ceil(scenarios.len());
        let (done, failed) = explore(name, *scenario, &begin, share, &options);
        eprintln!(
            "{name}: {done} schedules in {:.1} s",
            started.elapsed().as_secs_f64()
        );
        schedules += done;
        failures += usize::from(failed);
    }
    println!("schedules {schedules} failures {failures}");
    ExitCode::from(u8::from(failures > 0))
}

fn config(failures: &Path) -> Config {
    let mut config = Config::new();
    config.failure_persistence = FailurePersistence::File(Some(failures.to_owned()));
    config.stack_size = 256 << 10;
    config.max_steps = shuttle::MaxSteps::FailAfter(200_000);
    config.silence_warnings = true;
    config
}

/// The pool is made once, in the one schedule of a run of its own.
fn first_image() -> Image {
    let made = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&made);
    let runner = Runner::new(RandomScheduler::new_from_seed(0, 1), config(Path::new(".")));
    runner.run(move || *keep.lock().unwrap() = Some(image()));
    made.lock().unwrap().take().unwrap()
}

/// How many schedules ran, and whether one failed.
fn explore(
    name: &str,
    scenario: Scenario,
    begin: &Image,
    schedules: usize,
    options: &Options,
) -> (usize, bool) {
    let run = |scheduler: Box<dyn Scheduler + Send>, done: &Arc<AtomicUsize>| {
        let (begin, done) = (begin.clone(), Arc::clone(done));
        let body = move || {
            let world = World::new(begin.clone());
            for queue in scenario(&world) {
                queue.join().unwrap();
            }
            world.end();
            done.fetch_add(1, Ordering::Relaxed);
        };
        catch_unwind(AssertUnwindSafe(|| {
            Runner::new(scheduler, config(&options.failures)).run(body);
        }))
        .is_err()
    };
    let done = Arc::new(AtomicUsize::new(0));
    if let Some(file) = &options.replay {
        let replayed = ReplayScheduler::new_from_file(file).expect("the file holds a schedule");
        let failed = run(Box::new(replayed), &done);
        return (done.load(Ordering::Relaxed), failed);
    }
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || {
        loop {
            let batch = next.fetch_add(1, Ordering::Relaxed);
            if batch * BATCH >= schedules || failed.load(Ordering::Relaxed) {
                return;
            }
            let seed = options.seed + batch as u64;
            let count = BATCH.min(schedules - batch * BATCH);
            let scheduler: Box<dyn Scheduler + Send> = if batch % 2 == 0 {
                Box::new(RandomScheduler::new_from_seed(seed, count))
            } else {
                Box::new(PctScheduler::new_from_seed(seed, DEPTH, count))
            };
            if run(scheduler, &done) {
                eprintln!("replay: sched {name} --replay FILE, with the file named above");
                failed.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    (done.load(Ordering::Relaxed), failed.load(Ordering::Relaxed))
}
