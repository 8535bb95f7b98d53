//! What a device was asked to do, so that a crash can be put after any of it.

use crate::image::{BLOCK, Image};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A moment: requests to the engine and to the device are numbered by one clock.
pub type Tick = u64;

/// What one operation changes.
#[derive(Clone, Debug)]
pub enum Action {
    /// Bytes put at an offset.
    Write(usize, Arc<[u8]>),
    /// A range of bytes that nobody needs; what it reads as is unspecified.
    Discard(usize, usize),
    /// Everything that ended before is durable.
    Flush,
    /// The device has so many blocks from now on.
    Grow(u64),
}

/// One operation with the times when it began and when it ended.
#[derive(Clone, Debug)]
pub struct Operation {
    /// What it does.
    pub action: Action,
    /// When it was submitted.
    pub begun: Tick,
    /// When it completed; none while it is under way.
    pub ended: Option<Tick>,
}

/// A recording: the bytes at its start, and everything done since.
#[derive(Clone, Debug)]
pub struct Tape {
    /// The bytes at the start, all durable.
    pub base: Image,
    /// The operations, in the order of their submission.
    pub operations: Vec<Operation>,
}

/// What a crash leaves of one pending operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Nothing of it.
    Lost,
    /// All of it.
    Kept,
    /// Its first sectors.
    First(usize),
    /// All but its first sectors.
    AllBut(usize),
}

/// Bytes that a device writes whole or not at all.
pub const SECTOR: usize = 512;
/// What a discarded byte reads as: something that nobody wrote.
const DISCARDED: u8 = 0xde;

impl Tape {
    /// The moments after which a crash may come: each operation's beginning and end, in order.
    pub fn moments(&self) -> Vec<Tick> {
        let ends = self
            .operations
            .iter()
            .filter_map(|operation| operation.ended);
        let begins = self.operations.iter().map(|operation| operation.begun);
        let mut ticks: Vec<Tick> = begins.chain(ends).collect();
        ticks.sort_unstable();
        ticks.dedup();
        ticks
    }

    /// The operations that a crash after `moment` may lose, and those that it cannot.
    pub fn at(&self, moment: Tick) -> (Vec<usize>, Vec<usize>) {
        let flushed = self
            .operations
            .iter()
            .filter(|operation| {
                matches!(operation.action, Action::Flush)
                    && operation.ended.is_some_and(|ended| ended <= moment)
            })
            .map(|operation| operation.begun)
            .max();
        let (mut pending, mut durable) = (Vec::new(), Vec::new());
        for (index, operation) in self.operations.iter().enumerate() {
            if operation.begun > moment || matches!(operation.action, Action::Flush) {
                continue;
            }
            let is_durable = match (operation.ended, flushed) {
                (Some(ended), Some(flushed)) => ended < flushed,
                _ => false,
            };
            if is_durable {
                durable.push(index);
            } else {
                pending.push(index);
            }
        }
        (pending, durable)
    }

    /// Does to `image` what a crash leaves of an operation.
    pub fn apply(&self, image: &mut Image, index: usize, fate: Fate) {
        match &self.operations[index].action {
            Action::Write(at, data) => {
                let kept = match fate {
                    Fate::Lost => 0..0,
                    Fate::Kept => 0..data.len(),
                    Fate::First(sectors) => 0..(sectors * SECTOR).min(data.len()),
                    Fate::AllBut(sectors) => (sectors * SECTOR).min(data.len())..data.len(),
                };
                image.write(at + kept.start, &data[kept]);
            }
            Action::Discard(at, bytes) if fate != Fate::Lost => {
                for start in (*at..at + bytes).step_by(BLOCK) {
                    image.write(start, &[DISCARDED; BLOCK]);
                }
            }
            Action::Grow(blocks) if fate != Fate::Lost => image.grow(*blocks),
            Action::Discard(..) | Action::Grow(_) | Action::Flush => {}
        }
    }

    /// Sectors that an operation writes; 1 where it cannot tear.
    pub fn sectors(&self, index: usize) -> usize {
        match &self.operations[index].action {
            Action::Write(_, data) => data.len() / SECTOR,
            Action::Discard(..) | Action::Grow(_) | Action::Flush => 1,
        }
    }

    /// How many operations of each kind there are.
    pub fn census(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for operation in &self.operations {
            let kind = match operation.action {
                Action::Write(..) => "writes",
                Action::Discard(..) => "discards",
                Action::Flush => "flushes",
                Action::Grow(_) => "growths",
            };
            *counts.entry(kind).or_default() += 1;
        }
        counts
    }
}
