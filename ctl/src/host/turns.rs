//! The commands of one volume take turns. Those of different volumes do not wait for each other, however long one takes.

use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use parking_lot::{Condvar, Mutex};
use std::time::Duration;

/// How long a command waits for another one of the same volume, before it is refused.
const WAIT_NS_MAX: u64 = 30_000_000_000;

/// What a command works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// A volume without its snapshots, or a snapshot.
    One(VolumePath),
    /// A volume with all of its snapshots.
    Whole(Name),
}

impl Scope {
    /// A volume with its snapshots, or a snapshot.
    pub(super) fn below(path: &VolumePath) -> Self {
        match path.snapshot {
            None => Self::Whole(path.volume.clone()),
            Some(_) => Self::One(path.clone()),
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::One(a), Self::One(b)) => a == b,
            (Self::Whole(a), Self::Whole(b)) => a == b,
            (Self::Whole(volume), Self::One(path)) | (Self::One(path), Self::Whole(volume)) => {
                path.volume == *volume
            }
        }
    }
}

/// A command that has its turn.
#[derive(Debug)]
struct Taken {
    scopes: Vec<Scope>,
    action: &'static str,
    number: u64,
    since_ns: u64,
}

/// Who has which turn.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    given_back: Condvar,
    clock: SystemClock,
}

#[derive(Debug, Default)]
struct State {
    taken: Vec<Taken>,
    next_number: u64,
}

/// A turn; given back when dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    number: u64,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            given_back: Condvar::new(),
            clock: SystemClock::new(),
        }
    }

    /// Waits for the turn of all scopes together. After a while it is refused, with the command that has one of them.
    pub(super) fn take(
        &self,
        pool: &Name,
        action: &'static str,
        scopes: Vec<Scope>,
    ) -> Result<Turn<'_>> {
        self.take_within(WAIT_NS_MAX, pool, action, scopes)
    }

    fn take_within(
        &self,
        wait_ns_max: u64,
        pool: &Name,
        action: &'static str,
        scopes: Vec<Scope>,
    ) -> Result<Turn<'_>> {
        let began = self.clock.monotonic_ns();
        let mut state = self.state.lock();
        loop {
            let now = self.clock.monotonic_ns();
            let Some((taken, scope)) = state.blocker(&scopes) else {
                let number = state.next_number;
                state.next_number += 1;
                state.taken.push(Taken {
                    scopes,
                    action,
                    number,
                    since_ns: now,
                });
                return Ok(Turn {
                    turns: self,
                    number,
                });
            };
            let left_ns = wait_ns_max.saturating_sub(now - began);
            if left_ns == 0 {
                let path = match scope {
                    Scope::One(path) => path.to_string(),
                    Scope::Whole(volume) => volume.to_string(),
                };
                let (other, seconds) = (taken.action, (now - taken.since_ns) / 1_000_000_000);
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!(
                        "{pool}/{path}: cannot {action} it while another command does; its `{other}` has been running for {seconds} seconds"
                    ),
                ));
            }
            self.given_back
                .wait_for(&mut state, Duration::from_nanos(left_ns));
        }
    }
}

impl State {
    fn blocker<'a>(&'a self, scopes: &'a [Scope]) -> Option<(&'a Taken, &'a Scope)> {
        self.taken.iter().find_map(|taken| {
            let is_taken = |scope: &&Scope| taken.scopes.iter().any(|other| other.overlaps(scope));
            scopes.iter().find(is_taken).map(|scope| (taken, scope))
        })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.state.lock();
        state.taken.retain(|taken| taken.number != self.number);
        self.turns.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn one(path: &str) -> Vec<Scope> {
        vec![Scope::One(path.parse().unwrap())]
    }

    fn below(path: &str) -> Vec<Scope> {
        vec![Scope::below(&path.parse().unwrap())]
    }

    #[test]
    fn only_commands_of_the_same_volume_are_kept_waiting() {
        let (turns, pool) = (Turns::new(), "p".parse().unwrap());
        let take = |scopes| turns.take_within(0, &pool, "attach", scopes);
        let volume = take(one("v")).unwrap();
        // Its snapshots are others, until something concerns all of them.
        let snapshot = take(one("v@s")).unwrap();
        let other = take(below("w")).unwrap();
        let refused = take(one("v")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(
            refused.to_string().contains("p/v: cannot attach it"),
            "{refused}"
        );
        take(below("v")).unwrap_err();
        take(one("w@s")).unwrap_err();
        drop(volume);
        take(below("v")).unwrap_err();
        drop(snapshot);
        let whole = take(below("v")).unwrap();
        take(one("v@t")).unwrap_err();
        drop((whole, other));
        take([one("v@t"), below("w")].concat()).unwrap();
    }

    #[test]
    fn a_turn_that_is_given_back_goes_to_who_waits() {
        let (turns, pool) = (Turns::new(), "p".parse().unwrap());
        let first = turns.take(&pool, "attach", one("v")).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| turns.take(&pool, "detach", below("v")).map(drop));
            drop(first);
            second.join().unwrap().unwrap();
        });
    }
}
