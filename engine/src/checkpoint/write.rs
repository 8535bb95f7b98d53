//! Writing a checkpoint.

use super::{catalog, write_superblocks};
use crate::device::{BlockBuf, Device};
use crate::error::{ErrorKind, Result};
use crate::format::counts::{encode_counts, encode_index};
use crate::format::layout::{Slot, index_slot, region_slot};
use crate::format::map_page;
use crate::format::page::{PageBytes, PageIdentity, PageKind, PagePtr};
use crate::format::superblock::Superblock;
use crate::journal::{Ledger, State};
use crate::map::FrozenPage;
use crate::space::{Fault, FrozenSpace, KeptPages};
use crate::sync::{AsyncMutex, AsyncMutexGuard, Watermark};
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Extent, Generation, MetadataId, Pba, Seq};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Pages are written in runs of at most this many.
const RUN_BLOCKS: usize = 64;
/// Shorter runs of freed blocks are not worth a discard.
const DISCARD_BLOCKS_MIN: u64 = 16;

/// So many freed blocks are made free under one hold of the lock.
const FREED_BLOCKS_MAX: u64 = 512;
/// What a checkpoint rests while somebody uses the pool: between two such holds, or whoever waits for the lock would have
/// it after the last of them; and between two runs of pages, which the device below serves in turn with what others write.
const REST: Duration = Duration::from_micros(100);
/// It rests at most about so often for each of the two: the journal's other half must suffice until it is done.
const RESTS_MAX: usize = 4096;

/// Room of the file system below that is kept back for a checkpoint, in blocks; a small pool keeps less.
const BALLAST_BLOCKS_MAX: u64 = 4096;

/// Writes checkpoints, one at a time, and remembers the last.
///
/// On a sparse file a checkpoint needs room of the file system below. Some is kept back for it, as a ballast; where that
/// is not enough either, what was frozen waits, and the next attempt begins with it. The journal has its room always, so
/// that a removal can be recorded meanwhile.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    current: AsyncMutex<Current>,
    /// Whether one waits for room of the file system below.
    lacks_room: AtomicBool,
    durable: Watermark,
    written: AtomicU64,
    last_ns: AtomicU64,
}

/// What one lock guards.
#[derive(Debug)]
pub(crate) struct Current {
    /// The last checkpoint that is durable.
    pub(crate) superblock: Superblock,
    /// One that lacked room of the file system below.
    unfinished: Option<Unfinished>,
    has_ballast: bool,
}

/// A checkpoint from its freeze on.
#[derive(Debug)]
struct Unfinished {
    frozen: Frozen,
    /// The number after the last record that it covers.
    end: Seq,
    /// The first journal block that it does not cover, and the CRC of the one before.
    cut: u64,
    chain: u32,
}

/// What comes after a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The pool goes on.
    GoOn,
    /// The same, and somebody uses it: freed blocks are not given back to the device below. A discard holds up every write
    /// of a file system for some milliseconds, and what is freed under load is soon taken again. The checkpoint rests
    /// between its parts.
    Yield,
    /// The same, and somebody may wait for the freed blocks: it does not rest.
    Hasten,
    /// The pool goes on, and somebody reads what the checkpoint names: all of that is kept until
    /// [`crate::space::SpaceMap::stop_keeping`], whatever checkpoints follow.
    Keep,
    /// Nothing: the pool is closed.
    Close,
}

/// Everything a checkpoint writes.
#[derive(Debug)]
struct Frozen {
    generation: Generation,
    map: Vec<FrozenPage>,
    catalog: Vec<(PagePtr, PageBytes)>,
    space: FrozenSpace,
    pending: Vec<Extent>,
    kept: Option<KeptPages>,
    catalog_top: Option<PagePtr>,
    catalog_level: u8,
    catalog_slots: u64,
    next_id: u64,
    blocks: u64,
}

impl Checkpoints {
    /// The checkpoint that `superblock` names is the current one.
    pub(crate) fn new(superblock: Superblock) -> Self {
        Self {
            durable: Watermark::new(superblock.generation.0),
            current: AsyncMutex::new(Current {
                superblock,
                unfinished: None,
                has_ballast: false,
            }),
            lacks_room: AtomicBool::new(false),
            written: AtomicU64::new(0),
            last_ns: AtomicU64::new(0),
        }
    }

    /// The last durable generation, how many were written since the pool was opened, and how long the last took.
    pub(crate) fn progress(&self) -> (Generation, u64, u64) {
        (
            Generation(self.durable.get()),
            self.written.load(Ordering::Relaxed),
            self.last_ns.load(Ordering::Relaxed),
        )
    }

    /// Whether a checkpoint waits for room of the file system below.
    pub(crate) fn lacks_room(&self) -> bool {
        self.lacks_room.load(Ordering::Relaxed)
    }

    /// Keeps checkpoints away: what the last one wrote stays as it is on disk.
    pub(crate) async fn hold(&self) -> AsyncMutexGuard<'_, Current> {
        self.current.lock().await
    }

    /// Changes the superblock and makes that durable, without a checkpoint.
    pub(crate) async fn restate<D: Device>(
        &self,
        device: &D,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        let mut current = self.current.lock().await;
        change(&mut current.superblock);
        write_superblocks(device, &current.superblock, async || device.flush().await).await
    }

    /// Takes the room that commits and checkpoints need of the file system below, as far as it has it.
    pub(crate) async fn take_room<D: Device>(&self, device: &D) {
        let mut current = self.current.lock().await;
        let journal = current.superblock.journal;
        let bytes = journal.count * BLOCK_BYTES;
        if let Err(error) = device.allocate(journal.start.offset(), bytes) {
            tracing::warn!(%error, "the journal has not all of its room in the file system");
        }
        current.hold_ballast(device);
    }

    /// Writes a checkpoint of everything applied before the call.
    pub(crate) async fn write<D: Device>(
        &self,
        ledger: &Ledger,
        device: &D,
        ending: Ending,
        restate: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        let mut current = self.current.lock().await;
        self.write_next(&mut current, ledger, device, ending, restate)
            .await
    }

    /// Writes a checkpoint of everything applied before the call, and keeps what it names. The next one does not begin
    /// before the caller lets go of this one.
    pub(crate) async fn write_kept<D: Device>(
        &self,
        ledger: &Ledger,
        device: &D,
    ) -> Result<AsyncMutexGuard<'_, Current>> {
        let mut current = self.current.lock().await;
        let written = self.write_next(&mut current, ledger, device, Ending::Keep, |_| {});
        if let Err(error) = written.await {
            ledger.adjust(|metadata| metadata.space.stop_keeping());
            return Err(error);
        }
        Ok(current)
    }

    /// Writes a checkpoint, unless somebody has written one since `seen` was the last: many may find the same lack
    /// of room at once, and one checkpoint serves them all.
    pub(crate) async fn write_after<D: Device>(
        &self,
        seen: Generation,
        ledger: &Ledger,
        device: &D,
    ) -> Result<()> {
        let mut current = self.current.lock().await;
        if current.superblock.generation > seen {
            return Ok(());
        }
        self.write_next(&mut current, ledger, device, Ending::Hasten, |_| {})
            .await
    }

    async fn write_next<D: Device>(
        &self,
        current: &mut Current,
        ledger: &Ledger,
        device: &D,
        ending: Ending,
        restate: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        let started = ledger.clock.monotonic_ns();
        if current.unfinished.is_some() {
            self.finish(current, ledger, device, Ending::Hasten, |_| {})
                .await?;
        }
        let closing = ledger.gate.closing().await;
        let mut commit = ledger.hold_commits().await;
        ledger.check_poison()?;
        let (frozen, batch) = loop {
            let attempt = ledger.freeze(|state| {
                let frozen = freeze(state)?;
                if ending == Ending::Keep {
                    state.metadata.space.keep(frozen.generation);
                }
                closing.flip();
                Ok((frozen, state.take_pending()))
            });
            match attempt {
                Ok(frozen) => break frozen,
                Err(fault) => ledger.supply(device, fault).await?,
            }
        };
        // The data that the frozen maps name, before anything durable names it.
        ledger.flush_device(device).await?;
        // Where the journal has no room for what the checkpoint covers, nobody may append behind the gap.
        commit.has_gap = !ledger.write_if_fits(device, &mut commit, &batch).await?;
        let (cut, chain) = (commit.tail.next, commit.tail.chain);
        drop(commit);
        // Whoever looked something up before the freeze may still use what was released before it.
        closing.drained().await;
        current.unfinished = Some(Unfinished {
            frozen,
            end: batch.end,
            cut,
            chain,
        });
        let restate = |superblock: &mut Superblock| {
            superblock.is_clean = ending == Ending::Close;
            restate(superblock);
        };
        self.finish(current, ledger, device, ending, restate)
            .await?;
        self.last_ns
            .store(ledger.clock.monotonic_ns() - started, Ordering::Relaxed);
        Ok(())
    }

    /// Writes what was frozen. Where the file system below has no room for it, it stays for the next attempt.
    async fn finish<D: Device>(
        &self,
        current: &mut Current,
        ledger: &Ledger,
        device: &D,
        ending: Ending,
        restate: impl FnOnce(&mut Superblock),
    ) -> Result<()> {
        ledger.check_poison()?;
        let Some(unfinished) = current.unfinished.take() else {
            return Ok(());
        };
        let frozen = &unfinished.frozen;
        let mut written = write_pages(device, ledger.metadata_id, frozen, ending).await;
        if lacks_room(&written) {
            device.release_ballast();
            current.has_ballast = false;
            written = write_pages(device, ledger.metadata_id, frozen, ending).await;
        }
        self.lacks_room
            .store(lacks_room(&written), Ordering::Relaxed);
        if lacks_room(&written) {
            // Nothing durable names these pages yet, and whole writes were refused: they are written again.
            current.unfinished = Some(unfinished);
            return written;
        }
        ledger.poison_on(written)?;
        ledger.flush_device(device).await?;
        let mut next = current.superblock.clone();
        next.generation = frozen.generation;
        next.blocks = frozen.blocks;
        next.is_clean = false;
        next.journal_block = unfinished.cut;
        next.journal_chain = unfinished.chain;
        next.seq = unfinished.end;
        next.next_id = frozen.next_id;
        next.catalog = frozen.catalog_top;
        next.catalog_level = frozen.catalog_level;
        next.catalog_slots = frozen.catalog_slots;
        next.counts.clone_from(&frozen.space.top);
        restate(&mut next);
        let flush = async || ledger.flush_device(device).await;
        ledger.poison_on(write_superblocks(device, &next, flush).await)?;
        current.superblock = next;

        self.durable.raise(frozen.generation.0);
        ledger.set_durable(unfinished.end);
        let mut commit = ledger.hold_commits().await;
        commit.tail.oldest = unfinished.cut;
        commit.has_gap = false;
        drop(commit);
        ledger.adjust(|metadata| metadata.map.set_durable(frozen.generation));
        free(ledger, device, &frozen.pending, ending).await;
        // No durable state leads to these slots any more, and the next checkpoint has not begun.
        discard_slots(device, &frozen.space.vacated).await;
        current.hold_ballast(device);
        if let Some(pages) = unfinished.frozen.kept {
            ledger.adjust(|metadata| metadata.space.ripen(pages));
        }
        self.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Current {
    fn hold_ballast<D: Device>(&mut self, device: &D) {
        if !self.has_ballast {
            let blocks = (self.superblock.blocks / 256).min(BALLAST_BLOCKS_MAX);
            self.has_ballast = device.hold_ballast(blocks * BLOCK_BYTES);
        }
    }
}

fn lacks_room(written: &Result<()>) -> bool {
    matches!(written, Err(error) if error.kind() == ErrorKind::OutOfSpace)
}

fn freeze(state: &mut State) -> Result<Frozen, Fault> {
    let metadata = &mut state.metadata;
    let catalog = catalog::shadow(metadata)?;
    let generation = metadata.map.generation();
    let top = metadata
        .catalog_places
        .last()
        .and_then(|level| level.first());
    Ok(Frozen {
        generation,
        catalog,
        catalog_top: top.copied().flatten(),
        catalog_level: u8::try_from(metadata.catalog_places.len().saturating_sub(1))
            .unwrap_or(u8::MAX),
        catalog_slots: metadata.catalog.slot_count() as u64,
        next_id: metadata.catalog.next_id().0,
        map: metadata.map.freeze(),
        pending: metadata.space.take_pending(),
        kept: metadata.space.take_kept(),
        space: metadata.space.freeze(generation),
        blocks: metadata.space.blocks(),
    })
}

/// A page of a checkpoint, not encoded yet.
enum Page<'a> {
    Map(&'a FrozenPage),
    Encoded(&'a PageBytes),
    Counts(&'a [u16; 1984], PageKind),
    Index(&'a crate::format::counts::Index, u8),
}

async fn write_pages<D: Device>(
    device: &D,
    metadata: MetadataId,
    frozen: &Frozen,
    ending: Ending,
) -> Result<()> {
    let generation = frozen.generation;
    let mut pages: Vec<(Pba, Page<'_>)> = Vec::new();
    pages.extend(
        frozen
            .map
            .iter()
            .map(|page| (page.ptr.pba, Page::Map(page))),
    );
    pages.extend(
        frozen
            .catalog
            .iter()
            .map(|(ptr, bytes)| (ptr.pba, Page::Encoded(bytes))),
    );
    for region in &frozen.space.regions {
        let place = |high| region_slot(region.region, region.slot, high);
        pages.push((place(false), Page::Counts(&region.low, PageKind::Counts)));
        if let Some(high) = &region.high {
            pages.push((place(true), Page::Counts(high, PageKind::CountsHigh)));
        }
    }
    for (level, index, slot, content) in &frozen.space.index {
        pages.push((
            index_slot(*level, *index, *slot),
            Page::Index(content, *level),
        ));
    }
    pages.sort_unstable_by_key(|(pba, _)| *pba);

    let mut buffer = BlockBuf::zeroed(RUN_BLOCKS);
    let runs_per_rest = 1 + pages.len() / RESTS_MAX;
    let mut runs = 0_usize;
    let mut rest = pages.as_slice();
    while let Some((first, _)) = rest.first() {
        let length = rest
            .iter()
            .take(RUN_BLOCKS)
            .zip(first.0..)
            .take_while(|((pba, _), expected)| pba.0 == *expected)
            .count();
        let (run, later) = rest.split_at(length);
        for ((pba, page), place) in run.iter().zip(buffer.chunks_exact_mut(BLOCK_LEN)) {
            place.copy_from_slice(&encode(page, *pba, metadata, generation));
        }
        device
            .write(first.offset(), &buffer[..length * BLOCK_LEN])
            .await?;
        rest = later;
        runs += 1;
        if ending == Ending::Yield && runs.is_multiple_of(runs_per_rest) {
            device.pause(REST).await;
        }
    }
    Ok(())
}

fn encode(page: &Page<'_>, pba: Pba, metadata: MetadataId, generation: Generation) -> PageBytes {
    let identity = |kind, level| PageIdentity {
        metadata,
        kind,
        level,
        ptr: PagePtr { pba, generation },
    };
    match page {
        Page::Map(frozen) => {
            let identity = identity(PageKind::Map, frozen.page.level);
            map_page::encode(&frozen.page.node, frozen.page.mapped, identity)
        }
        Page::Encoded(bytes) => **bytes,
        Page::Counts(halves, kind) => encode_counts(halves, identity(*kind, 0)),
        Page::Index(index, level) => encode_index(index, identity(PageKind::CountsIndex, *level)),
    }
}

/// Freed blocks, as runs.
struct Freed {
    /// Given back to the device below.
    given_back: Vec<Extent>,
    /// Not given back; the background work does that, a region at a time.
    kept: Vec<Extent>,
}

/// Lets blocks be handed out again that were pending at the freeze. Until then nobody takes them, so that no discard hits
/// what somebody wrote.
async fn free<D: Device>(ledger: &Ledger, device: &D, pending: &[Extent], ending: Ending) {
    let freed = match ending {
        Ending::Yield | Ending::Hasten => Freed {
            given_back: Vec::new(),
            kept: pending.to_vec(),
        },
        Ending::GoOn | Ending::Keep | Ending::Close => discard(device, pending).await,
    };
    let blocks: u64 = pending.iter().map(|extent| extent.count).sum();
    let pieces_per_rest = 1 + blocks / (FREED_BLOCKS_MAX * RESTS_MAX as u64);
    for (runs, is_stale) in [(&freed.kept, true), (&freed.given_back, false)] {
        for (done, some) in (1_u64..).zip(pieces(runs)) {
            ledger.adjust(|metadata| metadata.space.reuse(&some, is_stale));
            if ending == Ending::Yield && done.is_multiple_of(pieces_per_rest) {
                device.pause(REST).await;
            }
        }
    }
}

/// Runs in pieces, each short enough to be freed under one hold of the lock.
fn pieces(runs: &[Extent]) -> impl Iterator<Item = Vec<Extent>> {
    let mut rest = runs.iter().copied();
    let mut cut: Option<Extent> = None;
    std::iter::from_fn(move || {
        let mut piece = Vec::new();
        let mut room = FREED_BLOCKS_MAX;
        while room > 0 {
            let Some(run) = cut.take().or_else(|| rest.next()) else {
                break;
            };
            let count = run.count.min(room);
            piece.push(Extent::new(run.start, count));
            room -= count;
            if count < run.count {
                cut = Some(Extent::new(run.start.plus(count), run.count - count));
            }
        }
        (!piece.is_empty()).then_some(piece)
    })
}

/// Gives the slots of regions back to the device below that stand on disk no more.
async fn discard_slots<D: Device>(device: &D, regions: &[u64]) {
    let mut runs: Vec<Extent> = Vec::new();
    for region in regions {
        // Low and high halves, slot A, then slot B.
        let slots = Extent::new(region_slot(*region, Slot::A, false), 4);
        match runs.last_mut() {
            Some(last) if last.end() == slots.start => last.count += slots.count,
            _ => runs.push(slots),
        }
    }
    for run in runs {
        if let Err(error) = device
            .discard(run.start.offset(), run.count * BLOCK_BYTES)
            .await
        {
            tracing::warn!(%error, "room of block counts could not be given back");
            return;
        }
    }
}

/// Gives freed blocks back to the device below, in runs.
async fn discard<D: Device>(device: &D, freed: &[Extent]) -> Freed {
    let mut sorted = freed.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<Extent> = Vec::new();
    for extent in sorted {
        match runs.last_mut() {
            Some(last) if last.end() == extent.start => last.count += extent.count,
            _ => runs.push(extent),
        }
    }
    let (mut given_back, short): (Vec<Extent>, Vec<Extent>) = runs
        .into_iter()
        .partition(|run| run.count >= DISCARD_BLOCKS_MIN);
    let mut done = 0;
    for run in &given_back {
        let bytes = run.count * BLOCK_LEN as u64;
        if let Err(error) = device.discard(run.start.offset(), bytes).await {
            // A discard is advice: the blocks are free all the same.
            tracing::warn!(%error, "freed space could not be given back");
            break;
        }
        done += 1;
    }
    let refused = given_back.split_off(done);
    Freed {
        given_back,
        kept: [short, refused].concat(),
    }
}
