//! Histories of concurrent requests on blocks, and whether one order explains them.
//!
//! Each block is a register. A history is linearizable if every request can be given one moment between its call and
//! its answer so that each read finds what the write before it wrote (Herlihy and Wing, 1990); registers are checked
//! one by one, because linearizability is local. A snapshot reads all its blocks, of one volume or several, and must
//! besides be one cut of the writes: what was answered before something in it was called is in it too.

mod cut;
mod register;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a block holds before anything is written, and after a discard.
pub const ZEROS: u64 = 0;

/// Names a block: the volume in the upper half, the block in the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The volume.
    pub volume: u32,
    /// The block.
    pub lba: u64,
}

/// What was done to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It was to hold this stamp; no other write has it, unless it is [`ZEROS`].
    Write(u64),
    /// It was found to hold this stamp.
    Read(u64),
}

/// When a request was called and answered; the moments of a history are all different.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The call.
    pub called: u64,
    /// The answer.
    pub answered: u64,
}

/// One request on one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When.
    pub span: Span,
    /// What.
    pub action: Action,
}

/// A snapshot, and what was found in it later.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When it was taken.
    pub span: Span,
    /// The stamp of each block.
    pub content: BTreeMap<Place, u64>,
}

/// Everything that was asked for, and what came out.
#[derive(Debug, Default)]
pub struct History {
    clock: AtomicU64,
    blocks: Mutex<BTreeMap<Place, Vec<Operation>>>,
    snapshots: Mutex<Vec<Snapshot>>,
}

impl History {
    /// A moment, later than all before.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Notes a request that was called at `called` and is answered now, on `places` one after the other.
    pub fn note(&self, called: u64, actions: impl IntoIterator<Item = (Place, Action)>) {
        let span = self.span(called);
        let mut blocks = self.blocks.lock().unwrap();
        for (place, action) in actions {
            let operation = Operation { span, action };
            blocks.entry(place).or_default().push(operation);
        }
    }

    /// The span of what was called at `called` and is answered now.
    pub fn span(&self, called: u64) -> Span {
        Span {
            called,
            answered: self.now(),
        }
    }

    /// Notes a snapshot with what it holds.
    pub fn note_snapshot(&self, span: Span, content: BTreeMap<Place, u64>) {
        let snapshot = Snapshot { span, content };
        self.snapshots.lock().unwrap().push(snapshot);
    }

    /// How many requests on single blocks were noted.
    pub fn len(&self) -> u64 {
        let blocks = self.blocks.lock().unwrap();
        blocks
            .values()
            .map(|operations| operations.len() as u64)
            .sum()
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether one order explains it all.
    ///
    /// # Errors
    ///
    /// Says what no order explains.
    pub fn check(&self) -> Result<(), String> {
        let blocks = self.blocks.lock().unwrap();
        let snapshots = self.snapshots.lock().unwrap();
        let mut with_snapshots = blocks.clone();
        for snapshot in snapshots.iter() {
            for (place, stamp) in &snapshot.content {
                with_snapshots.entry(*place).or_default().push(Operation {
                    span: snapshot.span,
                    action: Action::Read(*stamp),
                });
            }
        }
        for (place, operations) in &with_snapshots {
            register::check(operations)
                .map_err(|fact| format!("volume {}, block {}: {fact}", place.volume, place.lba))?;
        }
        for (number, snapshot) in snapshots.iter().enumerate() {
            cut::check(snapshot, &blocks)
                .map_err(|fact| format!("snapshot {number} ({:?}): {fact}", snapshot.span))?;
        }
        Ok(())
    }

    /// Whether `stamp` may be in a block after a crash, when a flush was called at `flushed` and had ended: it is what
    /// the block held then, or something later.
    ///
    /// # Errors
    ///
    /// Says that it is older, or nobody's.
    pub fn check_survivor(&self, place: Place, stamp: u64, flushed: u64) -> Result<(), String> {
        let blocks = self.blocks.lock().unwrap();
        let span = Span {
            called: flushed,
            answered: u64::MAX,
        };
        let content = BTreeMap::from([(place, stamp)]);
        cut::check(&Snapshot { span, content }, &blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Place = Place { volume: 1, lba: 7 };
    const B: Place = Place { volume: 2, lba: 7 };

    fn note(history: &History, place: Place, called: u64, answered: u64, action: Action) {
        let span = Span { called, answered };
        let operation = Operation { span, action };
        let mut blocks = history.blocks.lock().unwrap();
        blocks.entry(place).or_default().push(operation);
    }

    fn snapshot(history: &History, called: u64, answered: u64, content: [(Place, u64); 2]) {
        history.note_snapshot(Span { called, answered }, content.into());
    }

    #[test]
    fn a_read_of_what_was_overwritten_before_is_found() {
        let history = History::default();
        note(&history, A, 1, 2, Action::Write(1));
        note(&history, A, 3, 4, Action::Write(2));
        note(&history, A, 5, 6, Action::Read(1));
        assert!(history.check().is_err());
    }

    #[test]
    fn a_lost_write_is_found() {
        for found in [ZEROS, 9] {
            let history = History::default();
            note(&history, A, 1, 2, Action::Write(1));
            note(&history, A, 3, 4, Action::Read(found));
            assert!(history.check().is_err(), "{found}");
        }
    }

    #[test]
    fn a_write_that_comes_back_is_found() {
        let history = History::default();
        note(&history, A, 1, 10, Action::Write(1));
        note(&history, A, 2, 11, Action::Write(2));
        for (at, stamp) in [(12, 1), (14, 2), (16, 1)] {
            note(&history, A, at, at + 1, Action::Read(stamp));
        }
        assert!(history.check().is_err());
    }

    #[test]
    fn a_snapshot_holds_what_was_answered_before_and_not_what_was_called_after() {
        for (stamps, is_fine) in [([1, 0], true), ([0, 0], false), ([1, 2], false)] {
            let history = History::default();
            note(&history, A, 1, 2, Action::Write(1));
            note(&history, B, 6, 7, Action::Write(2));
            snapshot(&history, 3, 5, [(A, stamps[0]), (B, stamps[1])]);
            assert_eq!(history.check().is_ok(), is_fine, "{stamps:?}");
        }
    }

    #[test]
    fn a_cut_that_each_queue_takes_for_itself_is_found() {
        for (stamps, is_fine) in [
            ([0, 0], true),
            ([1, 0], true),
            ([1, 2], true),
            ([0, 2], false),
        ] {
            let history = History::default();
            // Both while the snapshot is taken, one after the other, in different volumes.
            note(&history, A, 2, 3, Action::Write(1));
            note(&history, B, 4, 5, Action::Write(2));
            snapshot(&history, 1, 9, [(A, stamps[0]), (B, stamps[1])]);
            assert_eq!(history.check().is_ok(), is_fine, "{stamps:?}");
        }
    }

    #[test]
    fn a_snapshot_does_not_lose_what_one_before_it_had() {
        let history = History::default();
        note(&history, A, 1, 20, Action::Write(1));
        snapshot(&history, 2, 3, [(A, 1), (B, 0)]);
        snapshot(&history, 4, 5, [(A, 0), (B, 0)]);
        assert!(history.check().is_err());
    }
}
