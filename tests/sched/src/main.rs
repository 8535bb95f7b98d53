//! `sched`: small scenarios on a whole pool, each in many schedules. Shuttle decides at every lock, atomic and device
//! operation which thread goes on: half of the schedules at random, half by PCT (Burckhardt et al., 2010), which
//! finds a bug of small depth with a known probability. What happened must be linearizable and the pool whole.
//!
//! It is built with `--cfg shuttle`; `cargo x sched` does that. A failing schedule leaves its own description in a
//! file, which `--replay FILE` runs again.

#[cfg(shuttle)]
mod device;
#[cfg(shuttle)]
mod run;
#[cfg(shuttle)]
mod scenarios;
#[cfg(shuttle)]
mod world;

#[cfg(shuttle)]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(shuttle))]
fn main() {
    eprintln!("sched is built with RUSTFLAGS=\"--cfg shuttle\"; cargo x sched does that");
    std::process::exit(2);
}
