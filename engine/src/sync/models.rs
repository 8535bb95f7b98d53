//! Every lock-free cell in every order that the memory model allows, with at most three threads; no bound on
//! preemptions. Each model has a twin that uses the cell wrongly, which loom must find: so the model can fail.
//!
//! `RUSTFLAGS="--cfg loom_cells" cargo test -p blockfork-engine --lib --target-dir target/loom sync::models`

use super::{Epochs, Event, Latch, Published, Signal, Sleeper, Tickets, Watermark};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::model::Builder;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex, RwLock};
use loom::thread;
use std::process::Command;
use std::sync::atomic::AtomicU64 as Executions;

/// Tells a process to run the broken twin.
const BROKEN: &str = "BLOCKFORK_BROKEN_TWIN";

/// Runs the model in all its orders, and its broken twin until loom says `fault`.
#[expect(
    clippy::print_stderr,
    reason = "the counts are figures of the scorecard"
)]
fn explore(name: &str, fault: &str, model: fn(broken: bool)) {
    let is_broken = std::env::var_os(BROKEN).is_some();
    let executions = std::sync::Arc::new(Executions::new(0));
    let counted = std::sync::Arc::clone(&executions);
    Builder::new().check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model(is_broken);
    });
    if is_broken {
        return;
    }
    // In a process of its own: loom aborts where threads wait for each other.
    let test = std::thread::current().name().map(str::to_owned).unwrap();
    let twin = Command::new(std::env::current_exe().unwrap())
        .args([&test, "--exact", "--nocapture", "--test-threads=1"])
        .env(BROKEN, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&twin.stderr);
    assert!(
        !twin.status.success() && said.contains(fault),
        "{name}: the broken twin was not found: {said}"
    );
    let executions = executions.load(Ordering::Relaxed);
    eprintln!("loom {name}: {executions} executions, broken twin found");
}

/// Accesses that must not meet: loom objects where two are not ordered.
#[derive(Default)]
struct Block(UnsafeCell<()>);

impl Block {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(())))
    }

    fn use_it(&self) {
        self.0.with(|_| ());
    }

    fn reuse_it(&self) {
        self.0.with_mut(|_| ());
    }
}

#[test]
fn nobody_uses_a_block_after_its_epoch_drained() {
    explore("epochs", "Causality violation", |broken| {
        let epochs = Arc::new(Epochs::default());
        let block = Block::new();
        // Both are inside before the flip; that entering and flipping exclude each other is the other model's.
        let inside = [epochs.enter(), epochs.enter()];
        let readers = inside.map(|epoch| {
            let (epochs, block) = (epochs.clone(), block.clone());
            thread::spawn(move || {
                block.use_it();
                epochs.leave(epoch);
            })
        });
        epochs.flip();
        if !broken {
            block_on(epochs.drained());
        }
        block.reuse_it();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn an_epoch_drains_again_after_it_was_used_again() {
    explore("epochs twice", "Causality violation", |broken| {
        let epochs = Arc::new(Epochs::default());
        let gone = Arc::new(RwLock::new(0));
        let blocks = [Block::new(), Block::new()];
        let reader = {
            let (epochs, gone, blocks) = (epochs.clone(), gone.clone(), blocks.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    let (first, epoch) = {
                        let gone = gone.read().unwrap();
                        (*gone, epochs.enter())
                    };
                    blocks.iter().skip(first).for_each(|block| block.use_it());
                    epochs.leave(epoch);
                }
            })
        };
        for (number, block) in (1..).zip(&blocks) {
            {
                let mut gone = gone.write().unwrap();
                *gone = number;
                epochs.flip();
            }
            // The second epoch has the first one's parity back.
            if !broken || number == 1 {
                block_on(epochs.drained());
            }
            block.reuse_it();
        }
        reader.join().unwrap();
    });
}

#[test]
fn whoever_asked_before_the_work_began_is_covered_by_it() {
    explore("tickets", "answered and not durable", |broken| {
        let tickets = Arc::new(Tickets::default());
        let pending = Arc::new(Mutex::new(0_usize));
        // What is covered, and what is durable.
        let commit = Arc::new(Mutex::new((0, 0_usize)));
        let ask = move |who: usize| {
            *pending.lock().unwrap() |= 1 << who;
            let request = tickets.take();
            let mut commit = commit.lock().unwrap();
            if commit.0 < request {
                let before = tickets.taken();
                let batch = std::mem::take(&mut *pending.lock().unwrap());
                commit.1 |= batch;
                commit.0 = if broken { tickets.taken() } else { before };
            }
            assert!(commit.1 & 1 << who != 0, "answered and not durable");
        };
        let other = {
            let ask = ask.clone();
            thread::spawn(move || ask(0))
        };
        ask(1);
        other.join().unwrap();
    });
}

#[test]
fn who_sees_a_watermark_sees_what_lies_below_it() {
    explore("watermark", "Causality violation", |broken| {
        let mark = Arc::new(Watermark::new(0));
        let blocks = [Block::new(), Block::new()];
        let raisers: Vec<_> = (0..2)
            .map(|number| {
                let (mark, block) = (mark.clone(), blocks[number].clone());
                thread::spawn(move || {
                    if broken {
                        mark.raise(1 << number);
                    }
                    block.reuse_it();
                    mark.raise(1 << number);
                })
            })
            .collect();
        let first = mark.get();
        let second = mark.get();
        assert!(first <= second, "it fell");
        match first {
            1 => blocks[0].use_it(),
            2 => blocks[1].use_it(),
            _ => {}
        }
        raisers
            .into_iter()
            .for_each(|raiser| raiser.join().unwrap());
    });
}

#[test]
fn nobody_succeeds_after_the_failure_that_set_the_latch() {
    explore("latch", "success after a failure", |broken| {
        let poisoned = Arc::new(Latch::default());
        let why = Block::new();
        // Flushes so far: the first one fails, as the kernel reports a lost write once.
        let flushing = Arc::new(Mutex::new(0));
        let flush = {
            let (poisoned, why) = (poisoned.clone(), why.clone());
            move || {
                let mut flushes = flushing.lock().unwrap();
                if !broken && poisoned.is_set() {
                    return;
                }
                *flushes += 1;
                assert!(*flushes == 1, "success after a failure");
                why.reuse_it();
                poisoned.set();
            }
        };
        let others: Vec<_> = (0..2).map(|_| thread::spawn(flush.clone())).collect();
        if poisoned.is_set() {
            why.use_it();
        }
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

#[test]
fn who_sees_a_published_number_sees_what_came_before() {
    explore("published", "Causality violation", |broken| {
        let size = Arc::new(Published::new(0));
        let entry = Block::new();
        let resizer = {
            let (size, entry) = (size.clone(), entry.clone());
            thread::spawn(move || {
                if broken {
                    size.set(1);
                }
                entry.reuse_it();
                size.set(1);
            })
        };
        let reader = {
            let (size, entry) = (size.clone(), entry.clone());
            thread::spawn(move || {
                if size.get() == 1 {
                    entry.use_it();
                }
            })
        };
        if size.get() == 1 {
            entry.use_it();
        }
        resizer.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn no_raised_signal_is_lost() {
    explore("signal", "deadlock", |broken| {
        let signal = Arc::new(Signal::new(false));
        let work = Arc::new(AtomicUsize::new(0));
        let raiser = {
            let (signal, work) = (signal.clone(), work.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    if broken {
                        signal.raise();
                    }
                    work.fetch_add(1, Ordering::Relaxed);
                    if !broken {
                        signal.raise();
                    }
                }
            })
        };
        // A lost signal is a deadlock, which loom reports.
        while work.load(Ordering::Relaxed) < 2 {
            block_on(signal.take());
        }
        raiser.join().unwrap();
    });
}

#[test]
fn an_event_is_not_lost_between_looking_and_waiting() {
    explore("event", "deadlock", |broken| {
        let event = Arc::new(Event::default());
        let happened = Arc::new(AtomicUsize::new(0));
        let other = {
            let (event, happened) = (event.clone(), happened.clone());
            thread::spawn(move || {
                if broken {
                    event.notify_all();
                }
                happened.store(1, Ordering::Relaxed);
                if !broken {
                    event.notify_all();
                }
            })
        };
        block_on(event.wait_for(|| (happened.load(Ordering::Relaxed) == 1).then_some(())));
        other.join().unwrap();
    });
}

/// What a sleeping thread is woken by: it stays rung until it was heard.
#[derive(Default)]
struct Bell(Mutex<bool>, Condvar);

impl Bell {
    fn ring(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut is_rung = self.0.lock().unwrap();
        while !*is_rung {
            is_rung = self.1.wait(is_rung).unwrap();
        }
        *is_rung = false;
    }
}

#[test]
fn nobody_sleeps_while_there_is_work() {
    explore("sleeper", "deadlock", |broken| {
        let sleeper = Arc::new(Sleeper::default());
        let bell = Arc::new(Bell::default());
        // The work's own queue orders nothing.
        let work = Arc::new(AtomicUsize::new(0));
        let bringer = {
            let (sleeper, bell, work) = (sleeper.clone(), bell.clone(), work.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    work.fetch_add(1, Ordering::Relaxed);
                    if sleeper.must_be_woken() {
                        bell.ring();
                    }
                }
            })
        };
        loop {
            if !broken {
                sleeper.lie_down();
            }
            let found = work.load(Ordering::Relaxed);
            if broken {
                sleeper.lie_down();
            }
            if found == 2 {
                break;
            }
            bell.wait();
            sleeper.get_up();
        }
        bringer.join().unwrap();
    });
}
