//! Every crash point of a recorded workload, and at each the states in which a device may come back.
//!
//! A state is made of what a completed flush covered and a choice among everything else, at the device's sectors. The
//! choices are those of CrashMonkey and of SQLite's crash tests: none, all, each alone, all but each, every subset where
//! there are few, else random ones, and the first, last or any write torn; superblocks before everything else.

use crate::image::Image;
use crate::oracle::{Crash, Found, Oracle};
use crate::script::Script;
use crate::sim_device::SimDevice;
use crate::tape::{Action, Fate, Tape, Tick};
use crate::witness::{self, Witness};
use blockfork::error::ErrorKind;
use blockfork::pool::RingPlace;
use fastrand::Rng;
use futures_lite::future::block_on;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

/// Up to so many pending writes, every subset of them is a state.
const ALL_SUBSETS_MAX: usize = 8;
/// Beyond, so many random ones are.
const RANDOM_SUBSETS: usize = 192;
/// Torn states at each point.
const TORN: usize = 48;
/// Superblocks lie in the pool's first blocks.
const HEAD_BYTES: usize = 16 * 4096;

/// A workload as it ran: what the device saw, and what clients were told.
#[derive(Debug)]
pub struct Recording {
    /// The workload.
    pub name: &'static str,
    /// What the device was asked.
    pub tape: Tape,
    /// What clients asked and were told.
    pub oracle: Oracle,
    touched: Vec<u64>,
    recovered: Mutex<Recovered>,
}

/// What images recovered to, each kept once.
#[derive(Debug, Default)]
struct Recovered {
    by_image: FxHashMap<u64, Arc<Found>>,
    kept: FxHashSet<Arc<Found>>,
}

/// What was visited.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visited {
    /// Crash points.
    pub points: u64,
    /// States judged.
    pub states: u64,
    /// Different images recovered.
    pub images: u64,
}

/// What is left of each pending operation; the others are whole.
type Choice = Vec<(usize, Fate)>;

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Runs the script and records it.
pub fn record(script: &Script, seed: u64) -> Recording {
    let witness = Witness::new(script, RingPlace::Nowhere);
    witness.device().record();
    let mut rng = Rng::with_seed(seed);
    witness.run(&script.phases, &mut rng, || false);
    let is_full = |kind: &ErrorKind| *kind == ErrorKind::OutOfSpace;
    assert!(
        witness.errors().iter().all(is_full),
        "{}: {:?}, though nothing failed",
        script.name,
        witness.errors()
    );
    let tape = witness.device().take_tape();
    let oracle = witness.into_oracle();
    Recording {
        name: script.name,
        touched: oracle.touched(),
        tape,
        oracle,
        recovered: Mutex::default(),
    }
}

/// Opens a pool on what a crash left, and reads all of it; damage and leaks are failures.
pub fn recover(device: &SimDevice, touched: &[u64]) -> Result<Found, String> {
    let pool = witness::open(device, RingPlace::Nowhere)
        .map_err(|error| format!("the pool does not open: {error}"))?;
    let found = witness::find(device, &pool, touched).map_err(|error| error.to_string())?;
    let report = block_on(pool.check(device, &mut |_, _| {})).map_err(|e| e.to_string())?;
    if report.exit_code() != 0 {
        return Err(format!("pool check finds {report:?}"));
    }
    Ok(found)
}

impl Recording {
    /// The crash points: after each beginning and each end of an operation on the device.
    pub fn points(&self) -> Vec<Tick> {
        self.tape.moments()
    }

    /// What is durable at a point, and the choices for the rest.
    pub fn states(&self, point: Tick, seed: u64) -> (Image, Vec<usize>, Vec<Choice>) {
        let (pending, durable) = self.tape.at(point);
        let mut image = self.tape.base.clone();
        for index in &durable {
            self.tape.apply(&mut image, *index, Fate::Kept);
        }
        let choices = self.choices(&pending, &mut Rng::with_seed(seed ^ point));
        (image, durable, choices)
    }

    fn choices(&self, pending: &[usize], rng: &mut Rng) -> Vec<Choice> {
        let kept = |keep: &dyn Fn(usize) -> bool| -> Choice {
            let places = pending.iter().enumerate();
            places
                .filter(|(place, _)| keep(*place))
                .map(|(_, index)| (*index, Fate::Kept))
                .collect()
        };
        let count = pending.len();
        let mut choices = vec![kept(&|_| false), kept(&|_| true)];
        if count <= ALL_SUBSETS_MAX {
            for subset in 0..1_usize << count {
                choices.push(kept(&|place| subset >> place & 1 == 1));
            }
        } else {
            for one in 0..count {
                choices.push(kept(&|place| place != one));
                choices.push(kept(&|place| place == one));
            }
            for _ in 0..RANDOM_SUBSETS {
                let picks: Vec<bool> = (0..count).map(|_| rng.bool()).collect();
                choices.push(kept(&|place| picks[place]));
            }
        }
        let is_head = |place: usize| {
            matches!(&self.tape.operations[pending[place]].action,
                Action::Write(at, _) if *at < HEAD_BYTES)
        };
        choices.push(kept(&is_head));
        for number in 0..if count == 0 { 0 } else { TORN } {
            let torn = match number {
                0 => 0,
                1 => count - 1,
                _ => rng.usize(..count),
            };
            let picks: Vec<bool> = (0..count).map(|_| rng.bool()).collect();
            let sectors = self.tape.sectors(pending[torn]);
            let mut choice = kept(&|place| {
                place != torn
                    && match number % 3 {
                        0 => place < torn,
                        1 => true,
                        _ => picks[place],
                    }
            });
            let at = 1 + rng.usize(..sectors.max(2) - 1);
            let fate = if rng.bool() {
                Fate::First(at)
            } else {
                Fate::AllBut(at)
            };
            choice.push((pending[torn], fate));
            choice.sort_by_key(|(index, _)| *index);
            choices.push(choice);
        }
        let mut seen = FxHashSet::default();
        choices.retain(|choice| seen.insert(hash(choice)));
        choices
    }

    /// The device as a crash leaves it.
    pub fn image(&self, durable: &Image, choice: &Choice) -> Image {
        let mut image = durable.clone();
        for (index, fate) in choice {
            self.tape.apply(&mut image, *index, *fate);
        }
        image
    }

    /// Judges every state of one crash point.
    ///
    /// # Errors
    ///
    /// What the first bad state breaks, and how to make it again.
    pub fn visit(&self, point: Tick, seed: u64) -> Result<Visited, String> {
        let (durable_image, durable, choices) = self.states(point, seed);
        let mut visited = Visited {
            points: 1,
            ..Visited::default()
        };
        for (number, choice) in choices.iter().enumerate() {
            let failed = |reason: String| {
                format!(
                    "{} at point {point}, state {number}: {reason}; kept: {choice:?}",
                    self.name
                )
            };
            let mut applied = choice.clone();
            applied.extend(durable.iter().map(|index| (*index, Fate::Kept)));
            applied.sort_by_key(|(index, _)| *index);
            let key = hash(&applied);
            let known = self.recovered.lock().unwrap().by_image.get(&key).cloned();
            let found = if let Some(found) = known {
                found
            } else {
                let image = self.image(&durable_image, choice);
                let device = SimDevice::from_image(image, 512);
                let found = recover(&device, &self.touched).map_err(failed)?;
                visited.images += 1;
                self.recovered.lock().unwrap().keep(key, found)
            };
            // Just before the next thing that happens on the device.
            let moment = self.until(point);
            let judged = self.oracle.judge(&found, moment, Crash::Power);
            judged.map_err(failed)?;
            visited.states += 1;
        }
        Ok(visited)
    }

    /// The moment of the next thing that the device sees after `point`.
    fn until(&self, point: Tick) -> Tick {
        let operations = self.tape.operations.iter();
        let ticks = operations.flat_map(|operation| [Some(operation.begun), operation.ended]);
        let later = ticks.flatten().filter(|tick| *tick > point);
        later.min().unwrap_or(Tick::MAX)
    }

    /// Crashes again inside the recovery from a crash: whatever the second one leaves recovers to the same.
    ///
    /// # Errors
    ///
    /// What the first bad state breaks, and how to make it again.
    pub fn visit_nested(&self, point: Tick, seed: u64, most: usize) -> Result<Visited, String> {
        let (durable_image, _, mut choices) = self.states(point, seed);
        let mut rng = Rng::with_seed(seed ^ point ^ 0x6e65_7374);
        // None and all of the pending writes, and some others.
        let few = 2.min(choices.len());
        let (first, rest) = choices.split_at_mut(few);
        rng.shuffle(rest);
        let picked: Vec<Choice> = first
            .iter()
            .chain(rest.iter())
            .take(most)
            .cloned()
            .collect();
        let mut visited = Visited::default();
        for choice in &picked {
            let failed = |reason: String| {
                format!(
                    "{} at point {point}, nested: {reason}; kept: {choice:?}",
                    self.name
                )
            };
            let image = self.image(&durable_image, choice);
            let inner = self.record_recovery(&image).map_err(failed)?;
            visited.points += 1;
            visited.images += self.judge_recovery(&inner, &mut rng).map_err(failed)?;
            visited.states = visited.images;
        }
        Ok(visited)
    }

    fn record_recovery(&self, image: &Image) -> Result<(Tape, Found), String> {
        let opened = || {
            let device = SimDevice::from_image(image.clone(), 512);
            device.record();
            drop(witness::open(&device, RingPlace::Nowhere).map_err(|error| error.to_string())?);
            Ok::<_, String>((device.image(), device.take_tape()))
        };
        let (bytes, tape) = opened()?;
        if opened()?.0 != bytes {
            return Err("two recoveries from the same bytes leave different bytes".to_owned());
        }
        let device = SimDevice::from_image(image.clone(), 512);
        Ok((tape, recover(&device, &self.touched)?))
    }

    fn judge_recovery(&self, inner: &(Tape, Found), rng: &mut Rng) -> Result<u64, String> {
        let (tape, expected) = inner;
        let second = Recording {
            name: self.name,
            tape: tape.clone(),
            oracle: Oracle::default(),
            touched: self.touched.clone(),
            recovered: Mutex::default(),
        };
        let mut images = 0;
        for point in tape.moments() {
            let (durable, _, mut choices) = second.states(point, rng.u64(..));
            let few = 2.min(choices.len());
            let (first, rest) = choices.split_at_mut(few);
            rng.shuffle(rest);
            for choice in first.iter().chain(rest.iter()).take(4) {
                let device = SimDevice::from_image(second.image(&durable, choice), 512);
                let found = recover(&device, &self.touched)?;
                images += 1;
                if found != *expected {
                    return Err(format!(
                        "a crash after {point} of the recovery changes what is there: {choice:?}"
                    ));
                }
            }
        }
        Ok(images)
    }
}

impl Recovered {
    fn keep(&mut self, key: u64, found: Found) -> Arc<Found> {
        let found = Arc::new(found);
        let found = match self.kept.get(&found) {
            Some(same) => Arc::clone(same),
            None => {
                self.kept.insert(Arc::clone(&found));
                found
            }
        };
        self.by_image.insert(key, Arc::clone(&found));
        found
    }
}

/// What was seen of a workload: how many operations of each kind the device had.
pub fn census(recordings: &[Recording]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for recording in recordings {
        for (kind, count) in recording.tape.census() {
            *counts.entry(kind).or_default() += count;
        }
    }
    counts
}
