//! Committing: making what was acknowledged durable, once for all who ask.

use super::{Ledger, Ring, State};
use crate::device::{BlockBuf, Device};
use crate::error::Result;
use crate::format::journal::{BlockHeader, encode_blocks};
use crate::sync::AsyncMutexGuard;
use crate::units::{BLOCK_LEN, Extent, Seq};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A commit that takes less is not worth waiting for others with.
const GATHERS_FROM_NS: u64 = 500_000;

/// How long a commit may wait for others to join it: a part of what the commit before it took, and a limit.
const GATHER_SHARE: u64 = 10;
const GATHER_NS_MAX: u64 = 5_000_000;

/// How often it looks meanwhile whether they are there.
const GATHER_STEPS: u64 = 8;

/// Where the journal goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    /// The journal's place.
    pub(crate) place: Extent,
    /// The number of the next block to be written.
    pub(crate) next: u64,
    /// The CRC of the block before it.
    pub(crate) chain: u32,
    /// The oldest block that the last checkpoint does not cover.
    pub(crate) oldest: u64,
    /// The opening of the pool that writes.
    pub(crate) session: u64,
}

/// What the commit lock guards.
#[derive(Debug)]
pub(crate) struct Commit {
    pub(crate) tail: Tail,
    /// Records that a checkpoint covers were left out behind the tail: until it is durable nothing may follow them.
    pub(crate) has_gap: bool,
    /// A checkpoint wrote the blocks before the tail, and no flush has covered them yet. A block that follows one says
    /// that it was durable, so nothing may be written behind them until they are.
    is_volatile: bool,
    /// Requests up to this one are covered.
    covered: u64,
    pace: Pace,
}

/// How the last commit went: the best guess at the next one.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Requests that it covered.
    requests: u64,
    took_ns: u64,
}

impl Pace {
    /// How long to wait at a time for those who shared the last commit; none if that does not pay.
    fn gather_step(self) -> Option<Duration> {
        let pays = self.requests > 1 && self.took_ns >= GATHERS_FROM_NS;
        let whole = (self.took_ns / GATHER_SHARE).min(GATHER_NS_MAX);
        pays.then(|| Duration::from_nanos(whole / GATHER_STEPS))
    }
}

/// Records that a commit took.
#[derive(Debug)]
pub(crate) struct Batch {
    framed: Vec<u8>,
    relies_on_data: bool,
    first: Seq,
    /// The number after the last.
    pub(crate) end: Seq,
}

/// What came of a commit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    /// Everything acknowledged before is durable.
    Done,
    /// The journal has no room: a checkpoint makes everything durable instead.
    JournalFull,
}

impl Commit {
    pub(crate) fn new(tail: Tail) -> Self {
        Self {
            tail,
            has_gap: false,
            is_volatile: false,
            covered: 0,
            pace: Pace::default(),
        }
    }

    fn free_blocks(&self) -> u64 {
        self.tail.place.count - (self.tail.next - self.tail.oldest)
    }

    /// Whether so many pending bytes surely fit. A block holds more than 3,500 of them, whatever its records' sizes.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        !self.has_gap && (bytes as u64 / 3500) < self.free_blocks()
    }
}

impl State {
    /// Takes the records that wait.
    pub(crate) fn take_pending(&mut self) -> Batch {
        let first = self.pending_first;
        self.pending_first = self.next_seq;
        Batch {
            framed: std::mem::take(&mut self.pending),
            relies_on_data: std::mem::take(&mut self.pending_relies_on_data),
            first,
            end: self.next_seq,
        }
    }

    /// Everything before `end` is durable.
    pub(crate) fn settle(&mut self, end: Seq) {
        self.metadata.space.settle(Seq(end.0.saturating_sub(1)));
        if let Some(ring) = &mut self.ring {
            ring.trim(end);
        }
    }

    /// Makes the ring's file at `path` anew.
    pub(crate) fn put_ring_back(&mut self, path: &Path) -> Result<()> {
        self.ring
            .as_mut()
            .map_or(Ok(()), |ring| ring.put_back(path))
    }

    /// Replaces the ring.
    pub(crate) fn set_ring(&mut self, ring: Option<Ring>) {
        self.ring = ring;
    }
}

impl Ledger {
    /// Makes everything that was acknowledged before the call durable.
    pub(crate) async fn commit<D: Device>(&self, device: &D) -> Result<Committed> {
        self.check_poison()?;
        let request = self.asked.take();
        let mut commit = self.commit.lock().await;
        self.check_poison()?;
        if commit.covered >= request {
            return Ok(Committed::Done);
        }
        self.gather(device, &commit).await;
        let began_ns = self.clock.monotonic_ns();
        let covers = self.asked.taken();
        let batch = {
            let mut state = self.state.write();
            if !commit.fits(state.pending.len()) {
                return Ok(Committed::JournalFull);
            }
            state.take_pending()
        };
        if batch.relies_on_data || (commit.is_volatile && !batch.framed.is_empty()) {
            self.flush_device(device).await?;
        }
        self.write_batch(device, &mut commit, &batch).await?;
        self.flush_device(device).await?;
        commit.is_volatile = false;
        if !batch.framed.is_empty() {
            self.set_durable(batch.end);
        }
        commit.pace = Pace {
            requests: covers - commit.covered,
            took_ns: self.clock.monotonic_ns().saturating_sub(began_ns),
        };
        commit.covered = covers;
        self.committed.fetch_add(1, Ordering::Relaxed);
        Ok(Committed::Done)
    }

    /// Waits a little for those who shared the last commit, where commits take long. They have had their answer at the
    /// same moment, so they ask again at nearly the same moment, and whoever comes first would leave the others to the
    /// next commit. Linux's ext4 journal does the same.
    async fn gather<D: Device>(&self, device: &D, commit: &Commit) {
        let Some(step) = commit.pace.gather_step() else {
            return;
        };
        for _ in 0..GATHER_STEPS {
            if self.asked.taken() - commit.covered >= commit.pace.requests {
                return;
            }
            device.pause(step).await;
        }
    }

    /// Everything before `end` is durable.
    pub(crate) fn set_durable(&self, end: Seq) {
        self.state.write().settle(end);
        self.durable.raise(end.0.saturating_sub(1));
    }

    /// Keeps commits away while a checkpoint finds its cut.
    pub(crate) async fn hold_commits(&self) -> AsyncMutexGuard<'_, Commit> {
        self.commit.lock().await
    }

    /// What the lock guards, for a checkpoint's freeze.
    pub(crate) fn freeze<T>(&self, freeze: impl FnOnce(&mut State) -> T) -> T {
        freeze(&mut self.state.write())
    }

    /// Writes a batch that a checkpoint took, if it fits; the journal is then whole up to the freeze. It is not flushed:
    /// the next commit or the checkpoint's end does that.
    pub(crate) async fn write_if_fits<D: Device>(
        &self,
        device: &D,
        commit: &mut Commit,
        batch: &Batch,
    ) -> Result<bool> {
        if !commit.fits(batch.framed.len()) {
            return Ok(false);
        }
        self.write_batch(device, commit, batch).await?;
        commit.is_volatile |= !batch.framed.is_empty();
        Ok(true)
    }

    async fn write_batch<D: Device>(
        &self,
        device: &D,
        commit: &mut Commit,
        batch: &Batch,
    ) -> Result<()> {
        if batch.framed.is_empty() {
            return Ok(());
        }
        let tail = &mut commit.tail;
        let header = BlockHeader {
            metadata: self.metadata_id,
            number: tail.next,
            chain: tail.chain,
            first_seq: batch.first,
            batch: tail.next,
            session: tail.session,
        };
        let (blocks, chain) = self.poison_on(encode_blocks(&batch.framed, header))?;
        let mut rest = blocks.as_slice();
        while !rest.is_empty() {
            let position = tail.next % tail.place.count;
            let until_wrap = usize::try_from(tail.place.count - position).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(rest.len().min(until_wrap).min(64));
            let mut buffer = BlockBuf::zeroed(now.len());
            for (place, block) in buffer.chunks_exact_mut(BLOCK_LEN).zip(now) {
                place.copy_from_slice(block);
            }
            let at = tail.place.start.plus(position);
            self.poison_on(device.write(at.offset(), &buffer).await)?;
            tail.next += now.len() as u64;
            rest = later;
        }
        tail.chain = chain;
        Ok(())
    }

    /// Blocks of the journal in use, and all of them; none while a commit is under way.
    pub(crate) fn journal_usage(&self) -> Option<(u64, u64)> {
        let commit = self.commit.try_lock()?;
        Some((
            commit.tail.next - commit.tail.oldest,
            commit.tail.place.count,
        ))
    }
}
