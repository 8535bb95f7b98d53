//! What a pool may hold after a crash: the window oracle.
//!
//! Each block of each volume has a history of changes with the times when they were asked for and acknowledged. After
//! a crash it may hold what the last flush covered, or anything asked for later; never something older, never what
//! belongs elsewhere: each write has a stamp of its own. A snapshot holds exactly what it held when it was taken.
//! Operations on whole volumes took place or did not.

use crate::tape::Tick;
use std::collections::{BTreeMap, BTreeSet};

/// What a sector holds: 0 for zeros, else a number that no other write has.
pub type Stamp = u64;

/// Whether a block is read after a crash: all of those around which the scripts write, and a sample of what only fills.
fn is_looked_at(lba: u64) -> bool {
    lba < 1024 || lba.is_multiple_of(41)
}

/// The stamps of a block's eight sectors.
pub type Block = [Stamp; 8];

/// When something was asked for, when it ended, and whether it surely took place.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// When it was asked for.
    pub begun: Tick,
    /// When it ended, well or not; `Tick::MAX` while it is under way.
    pub ended: Tick,
    /// Whether it was acknowledged; what failed may have taken place or not.
    pub is_certain: bool,
}

impl Span {
    /// Something that always was.
    pub const ALWAYS: Self = Self {
        begun: 0,
        ended: 0,
        is_certain: true,
    };

    /// Surely took place before `moment`.
    fn is_done(&self, moment: Tick) -> bool {
        self.is_certain && self.ended < moment
    }

    /// May have taken place before `moment`.
    fn may_be_done(&self, moment: Tick) -> bool {
        self.begun < moment
    }
}

#[derive(Clone, Debug)]
struct Change {
    stamp: Stamp,
    span: Span,
}

/// A volume between two operations that concern it as a whole.
#[derive(Clone, Debug)]
struct Epoch {
    span: Span,
    name: String,
    blocks: u64,
    initial: BTreeMap<u64, Stamp>,
    changes: BTreeMap<u64, Vec<Change>>,
}

impl Epoch {
    fn initial(&self, lba: u64) -> Stamp {
        self.initial.get(&lba).copied().unwrap_or(0)
    }

    /// Whether a sector of block `lba` may hold `stamp`: nothing surely durable came after it.
    fn allows(&self, lba: u64, stamp: Stamp, moment: Tick, durable_before: Tick) -> bool {
        let changes = self.changes.get(&lba).map_or(&[][..], Vec::as_slice);
        let initial = Change {
            stamp: self.initial(lba),
            span: Span::ALWAYS,
        };
        let overtaken = |candidate: &Change| {
            changes.iter().any(|later| {
                later.span.is_done(durable_before) && later.span.begun > candidate.span.ended
            })
        };
        std::iter::once(&initial).chain(changes).any(|candidate| {
            candidate.stamp == stamp && candidate.span.may_be_done(moment) && !overtaken(candidate)
        })
    }
}

#[derive(Clone, Debug)]
struct Volume {
    epochs: Vec<Epoch>,
    removed: Option<Span>,
    /// A block that is written in place may tear between sectors.
    may_tear: bool,
}

#[derive(Clone, Debug)]
struct Snapshot {
    /// The volume's place in the list, and what it was then.
    volume: usize,
    epoch: usize,
    name: String,
    span: Span,
    removed: Option<Span>,
    blocks: u64,
    /// None: it was never acknowledged, so nobody read it.
    content: Option<BTreeMap<u64, Stamp>>,
}

fn may_exist(made: Span, removed: Option<Span>, moment: Tick) -> bool {
    made.may_be_done(moment) && !removed.is_some_and(|span| span.is_done(moment))
}

fn must_exist(made: Span, removed: Option<Span>, moment: Tick) -> bool {
    made.is_done(moment) && !removed.is_some_and(|span| span.may_be_done(moment))
}

/// What a device or a process does not lose at the crash that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The power went: what no flush covered may be gone.
    Power,
    /// The process died and its ring is there: everything acknowledged stays.
    Process,
}

/// A volume or a snapshot as a recovered pool has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FoundContent {
    /// Its size.
    pub blocks: u64,
    /// The blocks that were read, zeros left out.
    pub content: BTreeMap<u64, Block>,
}

impl FoundContent {
    fn block(&self, lba: u64) -> Block {
        self.content.get(&lba).copied().unwrap_or([0; 8])
    }
}

/// A recovered pool: its volumes, and their snapshots by both names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Found {
    /// By name.
    pub volumes: BTreeMap<String, FoundContent>,
    /// By the volume's name and their own.
    pub snapshots: BTreeMap<(String, String), FoundContent>,
}

/// Everything that was asked for, and when.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    volumes: Vec<Volume>,
    snapshots: Vec<Snapshot>,
    flushes: Vec<Span>,
}

impl Oracle {
    /// The blocks that ever held something, with their neighbours, as far as they are looked at.
    pub fn touched(&self) -> Vec<u64> {
        let mut held: BTreeSet<u64> = BTreeSet::new();
        for epoch in self.volumes.iter().flat_map(|volume| &volume.epochs) {
            held.extend(epoch.initial.keys());
            let changes = epoch.changes.iter();
            let written =
                changes.filter(|(_, changes)| changes.iter().any(|change| change.stamp != 0));
            held.extend(written.map(|(lba, _)| lba));
        }
        let near = held
            .iter()
            .flat_map(|lba| [lba.saturating_sub(1), *lba, lba + 1]);
        let near: BTreeSet<u64> = near.filter(|lba| is_looked_at(*lba)).collect();
        near.into_iter().collect()
    }

    fn index(&self, name: &str) -> usize {
        self.volumes
            .iter()
            .rposition(|volume| {
                volume.removed.is_none() && volume.epochs.last().unwrap().name == name
            })
            .expect("the script knows its volumes")
    }

    fn epoch(&mut self, name: &str) -> &mut Epoch {
        let index = self.index(name);
        self.volumes[index].epochs.last_mut().unwrap()
    }

    /// A volume's size.
    pub fn blocks(&self, name: &str) -> u64 {
        let index = self.index(name);
        self.volumes[index].epochs.last().unwrap().blocks
    }

    /// What a snapshot holds, if anybody knows.
    pub fn snapshot_content(&self, volume: &str, name: &str) -> Option<BTreeMap<u64, Stamp>> {
        let known = self.snapshot(volume, name)?;
        known.content.clone()
    }

    fn snapshot(&self, volume: &str, name: &str) -> Option<&Snapshot> {
        let volume = self.index(volume);
        let mut of = self.snapshots.iter();
        of.rfind(|snapshot| snapshot.volume == volume && snapshot.name == name)
    }

    /// Whether a snapshot of that name was acknowledged, and nobody asked for its removal.
    pub fn has_snapshot(&self, volume: &str, name: &str) -> bool {
        let known = self.snapshot(volume, name);
        known.is_some_and(|snapshot| snapshot.span.is_certain && snapshot.removed.is_none())
    }

    /// A snapshot's size.
    pub fn snapshot_blocks(&self, volume: &str, name: &str) -> u64 {
        self.snapshot(volume, name)
            .map_or(0, |snapshot| snapshot.blocks)
    }

    /// Writes were flushed.
    pub fn flushed(&mut self, span: Span) {
        self.flushes.push(span);
    }

    /// A volume was made, empty or with a snapshot's content.
    pub fn created(
        &mut self,
        name: &str,
        blocks: u64,
        initial: BTreeMap<u64, Stamp>,
        may_tear: bool,
        span: Span,
    ) {
        self.flushed(span);
        self.volumes.push(Volume {
            epochs: vec![Epoch {
                span,
                name: name.to_owned(),
                blocks,
                initial,
                changes: BTreeMap::new(),
            }],
            removed: None,
            may_tear,
        });
    }

    /// A block is being written (or zeroed: stamp 0), from `begun` on.
    pub fn writes(&mut self, volume: &str, lba: u64, stamp: Stamp, begun: Tick) {
        let span = Span {
            begun,
            ended: Tick::MAX,
            is_certain: false,
        };
        let changes = self.epoch(volume).changes.entry(lba).or_default();
        changes.push(Change { stamp, span });
    }

    /// What [`Oracle::writes`] began has ended.
    pub fn wrote(&mut self, volume: &str, lba: u64, span: Span) {
        let changes = self.epoch(volume).changes.entry(lba).or_default();
        let begun = changes
            .iter_mut()
            .rfind(|change| change.span.begun == span.begun);
        if let Some(change) = begun {
            change.span = span;
        }
    }

    /// A volume was rolled back to `content`, or resized or renamed and kept its own.
    pub fn became(
        &mut self,
        volume: &str,
        name: &str,
        blocks: u64,
        content: Option<BTreeMap<u64, Stamp>>,
        span: Span,
    ) {
        self.flushed(span);
        let index = self.index(volume);
        let epochs = &mut self.volumes[index].epochs;
        let mut next = epochs.last().unwrap().clone();
        next.span = span;
        name.clone_into(&mut next.name);
        next.blocks = blocks;
        if let Some(content) = content {
            next.initial = content;
            next.changes.clear();
        }
        next.initial.retain(|lba, _| *lba < blocks);
        next.changes.retain(|lba, _| *lba < blocks);
        epochs.push(next);
    }

    /// A snapshot was taken. Its content, as read afterwards, must be one cut of what was asked for.
    pub fn snapshotted(
        &mut self,
        volume: &str,
        name: &str,
        content: Option<BTreeMap<u64, Stamp>>,
        span: Span,
    ) {
        self.flushed(span);
        let volume = self.index(volume);
        let of = &self.volumes[volume];
        let epoch = of.epochs.last().unwrap();
        if let Some(content) = &content {
            let found = FoundContent {
                blocks: epoch.blocks,
                content: content
                    .iter()
                    .map(|(lba, stamp)| (*lba, [*stamp; 8]))
                    .collect(),
            };
            let judged = judge_cut(epoch, &found, span, false);
            assert!(judged.is_ok(), "snapshot {name}: {judged:?}");
        }
        self.snapshots.push(Snapshot {
            volume,
            epoch: of.epochs.len() - 1,
            name: name.to_owned(),
            span,
            removed: None,
            blocks: epoch.blocks,
            content,
        });
    }

    /// A snapshot, or a volume with its snapshots, was removed.
    pub fn removed(&mut self, volume: &str, snapshot: Option<&str>, span: Span) {
        self.flushed(span);
        let index = self.index(volume);
        for of in &mut self.snapshots {
            let is_it = snapshot.is_none_or(|name| of.name == name);
            if of.volume == index && is_it && of.removed.is_none() {
                of.removed = Some(span);
            }
        }
        if snapshot.is_none() {
            self.volumes[index].removed = Some(span);
        }
    }

    /// Holds a recovered pool against what a crash just before `moment` may have left.
    pub fn judge(&self, found: &Found, moment: Tick, crash: Crash) -> Result<(), String> {
        let durable_before = match crash {
            Crash::Process => moment,
            Crash::Power => {
                let done = self.flushes.iter().filter(|flush| flush.is_done(moment));
                done.map(|flush| flush.begun).max().unwrap_or(0)
            }
        };
        let window = Window {
            moment,
            durable_before,
        };
        let mut matched = Vec::new();
        for (name, content) in &found.volumes {
            matched.push(self.match_volume(name, content, found, window)?);
        }
        for (index, volume) in self.volumes.iter().enumerate() {
            let made = volume.epochs[0].span;
            if must_exist(made, volume.removed, moment) && !matched.contains(&index) {
                return Err(format!("volume {} is gone", volume.epochs[0].name));
            }
        }
        self.judge_groups(found, moment)
    }

    /// The volume that `content` is.
    fn match_volume(
        &self,
        name: &str,
        content: &FoundContent,
        found: &Found,
        window: Window,
    ) -> Result<usize, String> {
        let mut reasons = Vec::new();
        for (index, volume) in self.volumes.iter().enumerate() {
            if !may_exist(volume.epochs[0].span, volume.removed, window.moment) {
                continue;
            }
            let sure = volume
                .epochs
                .iter()
                .rposition(|epoch| epoch.span.is_done(window.moment));
            for epoch in &volume.epochs[sure.unwrap_or(0)..] {
                if epoch.name != name || !epoch.span.may_be_done(window.moment) {
                    continue;
                }
                let judged = judge_volume(volume, epoch, content, window)
                    .and_then(|()| self.judge_snapshots(index, name, found, window.moment));
                match judged {
                    Ok(()) => return Ok(index),
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        if reasons.is_empty() {
            return Err(format!("volume {name} should not be there"));
        }
        Err(format!("volume {name}: {}", reasons.join("; or ")))
    }

    fn judge_snapshots(
        &self,
        volume: usize,
        volume_name: &str,
        found: &Found,
        moment: Tick,
    ) -> Result<(), String> {
        let of_volume = || self.snapshots.iter().filter(|of| of.volume == volume);
        for ((of, name), content) in &found.snapshots {
            if of != volume_name {
                continue;
            }
            let known = of_volume().filter(|snapshot| {
                snapshot.name == *name && may_exist(snapshot.span, snapshot.removed, moment)
            });
            let judged: Vec<_> = known
                .map(|snapshot| self.judge_snapshot(snapshot, content, moment))
                .collect();
            if !judged.iter().any(Result::is_ok) {
                return Err(format!("snapshot {name} is not what was taken: {judged:?}"));
            }
        }
        for snapshot in of_volume() {
            let key = (volume_name.to_owned(), snapshot.name.clone());
            if must_exist(snapshot.span, snapshot.removed, moment)
                && !found.snapshots.contains_key(&key)
            {
                return Err(format!("snapshot {} is gone", snapshot.name));
            }
        }
        Ok(())
    }

    /// One that was acknowledged holds what it held then. Before, it may be another cut of what was under way: what is
    /// written in place while it is taken may be in it or not, and may be torn as in the volume.
    fn judge_snapshot(
        &self,
        snapshot: &Snapshot,
        found: &FoundContent,
        moment: Tick,
    ) -> Result<(), String> {
        if snapshot.span.is_done(moment) && snapshot.content.is_some() {
            return judge_same(snapshot, found);
        }
        let volume = &self.volumes[snapshot.volume];
        let epoch = &volume.epochs[snapshot.epoch];
        judge_cut(epoch, found, snapshot.span, volume.may_tear)
    }

    /// What one command made or removed is there as a whole or not at all.
    fn judge_groups(&self, found: &Found, moment: Tick) -> Result<(), String> {
        let mut made: BTreeMap<Tick, Vec<bool>> = BTreeMap::new();
        for snapshot in &self.snapshots {
            let under_way = snapshot.span.may_be_done(moment)
                && !snapshot.span.is_done(moment)
                && snapshot.removed.is_none();
            if under_way {
                let volume = &self.volumes[snapshot.volume];
                let is_there = volume.epochs.iter().any(|epoch| {
                    let key = (epoch.name.clone(), snapshot.name.clone());
                    found.snapshots.contains_key(&key)
                });
                made.entry(snapshot.span.begun).or_default().push(is_there);
            }
        }
        for group in made.values() {
            if group.iter().any(|there| *there) && !group.iter().all(|there| *there) {
                return Err("one command's snapshots are there in part".to_owned());
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Window {
    moment: Tick,
    durable_before: Tick,
}

fn judge_volume(
    volume: &Volume,
    epoch: &Epoch,
    content: &FoundContent,
    window: Window,
) -> Result<(), String> {
    judge_size(epoch.blocks, content)?;
    let known = epoch.changes.keys().chain(epoch.initial.keys());
    for lba in known.chain(content.content.keys()) {
        if *lba >= content.blocks || !is_looked_at(*lba) {
            continue;
        }
        let block = content.block(*lba);
        let is_torn = block.iter().any(|stamp| *stamp != block[0]);
        if is_torn && !volume.may_tear {
            return Err(format!("block {lba} is torn: {block:?}"));
        }
        for stamp in block {
            if !epoch.allows(*lba, stamp, window.moment, window.durable_before) {
                return Err(format!(
                    "block {lba} holds {stamp}, whose history is {} then {:?}, at {window:?}",
                    epoch.initial(*lba),
                    epoch.changes.get(lba)
                ));
            }
        }
    }
    Ok(())
}

fn judge_same(snapshot: &Snapshot, found: &FoundContent) -> Result<(), String> {
    let content = snapshot.content.iter().flatten();
    let expected: BTreeMap<u64, Stamp> = content.map(|(lba, stamp)| (*lba, *stamp)).collect();
    for lba in expected.keys().chain(found.content.keys()) {
        let stamp = expected.get(lba).copied().unwrap_or(0);
        if *lba < found.blocks && is_looked_at(*lba) && found.block(*lba) != [stamp; 8] {
            return Err(format!(
                "block {lba} holds {:?} instead of {stamp}",
                found.block(*lba)
            ));
        }
    }
    judge_size(snapshot.blocks, found)
}

fn judge_size(blocks: u64, found: &FoundContent) -> Result<(), String> {
    if found.blocks == blocks {
        Ok(())
    } else {
        Err(format!("has {} blocks instead of {blocks}", found.blocks))
    }
}

/// A snapshot's content is one cut of the order: what ended before it began is in, what began after it ended is out,
/// and with a write everything is in that ended before that write began.
fn judge_cut(
    epoch: &Epoch,
    found: &FoundContent,
    span: Span,
    may_tear: bool,
) -> Result<(), String> {
    let mut newest = span.begun;
    for (lba, changes) in &epoch.changes {
        let block = found.block(*lba);
        let is_in = |change: &&Change| change.stamp != 0 && block.contains(&change.stamp);
        if let Some(change) = changes.iter().find(is_in) {
            newest = newest.max(change.span.begun);
        }
    }
    let lbas = epoch.changes.keys().chain(epoch.initial.keys());
    for lba in lbas.chain(found.content.keys()) {
        let block = found.block(*lba);
        let is_torn = block.iter().any(|stamp| *stamp != block[0]);
        let is_allowed = |stamp: &Stamp| epoch.allows(*lba, *stamp, span.ended, newest);
        let is_seen = *lba < found.blocks && is_looked_at(*lba);
        if is_seen && (is_torn && !may_tear || !block.iter().all(is_allowed)) {
            return Err(format!(
                "block {lba} holds {block:?}, which is no cut of {:?}: taken at {span:?}, with one of {newest}",
                epoch.changes.get(lba)
            ));
        }
    }
    judge_size(epoch.blocks, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(begun: Tick, ended: Tick) -> Span {
        Span {
            begun,
            ended,
            is_certain: true,
        }
    }

    fn found(stamp: Stamp) -> Found {
        let content = FoundContent {
            blocks: 8,
            content: BTreeMap::from([(3, [stamp; 8])]),
        };
        Found {
            volumes: BTreeMap::from([("v".to_owned(), content)]),
            ..Found::default()
        }
    }

    fn oracle() -> Oracle {
        let mut oracle = Oracle::default();
        oracle.created("v", 8, BTreeMap::new(), false, span(1, 2));
        oracle.writes("v", 3, 100, 3);
        oracle.wrote("v", 3, span(3, 4));
        oracle.flushed(span(5, 6));
        oracle.writes("v", 3, 101, 7);
        oracle.wrote("v", 3, span(7, 8));
        oracle.writes("v", 3, 102, 9);
        oracle.wrote("v", 3, span(9, 10));
        oracle
    }

    fn is_allowed(stamp: Stamp, moment: Tick, crash: Crash) -> bool {
        oracle().judge(&found(stamp), moment, crash).is_ok()
    }

    #[test]
    fn after_a_power_cut_a_block_is_as_flushed_or_newer() {
        assert!(is_allowed(0, 5, Crash::Power));
        assert!(is_allowed(100, 6, Crash::Power));
        assert!(!is_allowed(0, 7, Crash::Power));
        assert!(is_allowed(101, 11, Crash::Power));
        assert!(!is_allowed(102, 9, Crash::Power));
        assert!(!is_allowed(777, 11, Crash::Power));
    }

    #[test]
    fn after_a_kill_a_block_is_as_acknowledged() {
        assert!(!is_allowed(101, 11, Crash::Process));
        assert!(is_allowed(102, 10, Crash::Process));
        assert!(is_allowed(101, 10, Crash::Process));
    }

    #[test]
    fn a_volume_that_was_acknowledged_is_there() {
        let empty = Found::default();
        assert!(oracle().judge(&empty, 2, Crash::Power).is_ok());
        assert!(oracle().judge(&empty, 3, Crash::Power).is_err());
    }

    #[test]
    fn a_mix_is_no_block() {
        let mut torn = found(101);
        let content = torn.volumes.get_mut("v").unwrap();
        content.content.get_mut(&3).unwrap()[7] = 102;
        assert!(oracle().judge(&torn, 11, Crash::Power).is_err());
    }

    #[test]
    #[should_panic(expected = "is no cut")]
    fn a_snapshot_without_an_acknowledged_write_is_no_cut() {
        let mut oracle = oracle();
        let content = BTreeMap::from([(3, 101)]);
        oracle.snapshotted("v", "s", Some(content), span(11, 12));
    }
}
