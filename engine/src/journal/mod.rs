//! The redo journal and the state it protects.
//!
//! A change is applied to the metadata in memory and appended as a record: to the pending bytes that the next commit
//! writes, and to the shared ring, which outlives a killed process. A commit flushes the data first if a record names
//! some, so that no record is durable before its data; then it writes the records and flushes. All who ask while one
//! commit runs share the next.

mod commit;
mod gate;
mod replay;
pub(crate) mod ring;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use commit::{Committed, Tail};
pub(crate) use gate::{Gate, Ticket};
pub(crate) use replay::{drop_cut_change, read_journal};
pub(crate) use ring::{CHANGE_BYTES_MAX, Ring, RingOwner, RingRecords};

use crate::clock::Clock;
use crate::device::{BlockBuf, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::format::counts::decode_counts;
use crate::format::journal::encode_framed;
use crate::format::layout::{Bounds, region_slot};
use crate::format::map_page;
use crate::format::page::{PageBytes, PageIdentity, PageKind, PagePtr};
use crate::format::record::Record;
use crate::limits::JOURNAL_PENDING_BYTES_MAX;
use crate::map::{MapPage, ReclaimStep};
use crate::metadata::{Metadata, Prepared};
use crate::space::{Fault, Missing};
use crate::sync::{AsyncMutex, Latch, RwLock, Tickets, Watermark};
use crate::units::{Generation, MetadataId, Pba, PoolId, Seq, VolumeId};
use commit::Commit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The state of an open pool, what changes it and what makes the changes durable.
#[derive(Debug)]
pub(crate) struct Ledger {
    state: RwLock<State>,
    /// Who uses blocks that were looked up.
    pub(crate) gate: Gate,
    commit: AsyncMutex<Commit>,
    flushing: AsyncMutex<()>,
    /// Commits asked for; one that begins after a request covers it.
    asked: Tickets,
    committed: AtomicU64,
    /// The last record that is durable.
    durable: Watermark,
    poisoned: Latch,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) pool: PoolId,
    pub(crate) metadata_id: MetadataId,
}

/// What one lock guards.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) metadata: Metadata,
    /// The number that the next record gets.
    next_seq: Seq,
    /// Framed records that no commit has taken yet; the first one's number.
    pending: Vec<u8>,
    pending_first: Seq,
    /// Whether one of them must not be durable before the data written before it.
    pending_relies_on_data: bool,
    ring: Option<Ring>,
}

impl State {
    fn is_backlogged(&self) -> bool {
        self.pending.len() >= JOURNAL_PENDING_BYTES_MAX
            || self.ring.as_ref().is_some_and(Ring::is_nearly_full)
    }

    /// Whether a change may append so many bytes, or as many as half of the ring if those are less.
    fn has_room(&self, bytes: usize) -> bool {
        let ring = self.ring.as_ref();
        !self.is_backlogged() && ring.is_none_or(|ring| ring.has_room(bytes))
    }
}

/// The bytes that these records take of the ring.
pub(crate) fn ring_bytes(records: &[Record]) -> usize {
    let mut framed = Vec::new();
    for record in records {
        encode_framed(record, true, &mut framed);
    }
    framed.len() + records.len() * ring::FRAME_BYTES
}

/// A change being made: the metadata, and the records of what was done to it.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    state: &'a mut State,
    /// There is room for records.
    may_append: bool,
}

impl Draft<'_> {
    /// The metadata, to look at and to reserve space in.
    pub(crate) fn metadata(&mut self) -> &mut Metadata {
        &mut self.state.metadata
    }

    /// Returns a step's worth of a removed tree's space. It is not in the journal: after a crash it is done again.
    pub(crate) fn reclaim(&mut self, id: VolumeId) -> Result<ReclaimStep, Fault> {
        let last = Seq(self.state.next_seq.0.saturating_sub(1));
        self.state.metadata.reclaim(id, last)
    }

    /// Applies one record and appends it.
    pub(crate) fn apply(&mut self, record: &Record) -> Result<(), Fault> {
        self.state.metadata.check_quota(record)?;
        let prepared = self.state.metadata.prepare(record)?;
        self.apply_prepared(record, prepared, false)?;
        Ok(())
    }

    /// Applies records that belong together: all are prepared before the first is applied, and after a crash either
    /// all are there or none.
    pub(crate) fn apply_all(&mut self, records: &[Record]) -> Result<(), Fault> {
        let mut prepared = Vec::with_capacity(records.len());
        for record in records {
            prepared.push(self.state.metadata.prepare(record)?);
        }
        for (index, (record, prepared)) in records.iter().zip(prepared).enumerate() {
            self.apply_prepared(record, prepared, index + 1 < records.len())?;
        }
        Ok(())
    }

    /// Applies a record that was prepared just now and appends it.
    pub(crate) fn apply_prepared(
        &mut self,
        record: &Record,
        prepared: Prepared,
        continues: bool,
    ) -> Result<()> {
        assert!(self.may_append, "room was made sure of before a record");
        let seq = self.state.next_seq;
        self.state.metadata.apply(record, prepared, seq)?;
        let at = self.state.pending.len();
        encode_framed(record, continues, &mut self.state.pending);
        if let Some(ring) = &mut self.state.ring {
            ring.append(seq, self.state.pending.get(at..).unwrap_or_default());
        }
        self.state.pending_relies_on_data |= record.relies_on_data();
        self.state.next_seq = seq.next();
        Ok(())
    }
}

impl Ledger {
    pub(crate) fn new(
        metadata: Metadata,
        next_seq: Seq,
        tail: Tail,
        ring: Option<Ring>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (pool, metadata_id) = (metadata.id, metadata.page_id);
        Self {
            state: RwLock::new(State {
                metadata,
                next_seq,
                pending: Vec::new(),
                pending_first: next_seq,
                pending_relies_on_data: false,
                ring,
            }),
            gate: Gate::default(),
            commit: AsyncMutex::new(Commit::new(tail)),
            flushing: AsyncMutex::new(()),
            asked: Tickets::default(),
            committed: AtomicU64::new(0),
            durable: Watermark::new(next_seq.0.saturating_sub(1)),
            poisoned: Latch::default(),
            clock,
            pool,
            metadata_id,
        }
    }

    /// Lets the next commit write records that are applied already: the last ones, as a ring has them.
    pub(crate) fn take_up(&self, records: RingRecords) {
        let mut state = self.state.write();
        if let Some((first, _)) = records.first() {
            state.pending_first = *first;
        }
        for (_, framed) in records {
            state.pending.extend(framed);
        }
        state.pending_relies_on_data |= !state.pending.is_empty();
    }

    /// The last record that is durable.
    pub(crate) fn durable(&self) -> Seq {
        Seq(self.durable.get())
    }

    /// Commits since the pool was opened.
    pub(crate) fn commits(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.is_set()
    }

    /// Refuses once a flush has failed.
    pub(crate) fn check_poison(&self) -> Result<()> {
        if self.is_poisoned() {
            Err(Error::new(ErrorKind::Poisoned))
        } else {
            Ok(())
        }
    }

    /// The kernel may drop unwritten pages after a failed flush or write of metadata, and a retry would then report
    /// success for what is gone: so this is for good.
    pub(crate) fn poison_on<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.poisoned.set();
            tracing::error!(%error, "the pool takes no more writes");
        }
        result
    }

    /// Flushes the device. One at a time: the kernel reports a failed write-back to one flush only, and whoever comes
    /// after must not take its own success for that of all.
    pub(crate) async fn flush_device<D: Device>(&self, device: &D) -> Result<()> {
        let _alone = self.flushing.lock().await;
        self.check_poison()?;
        self.poison_on(device.flush().await)
    }

    /// Looks at the metadata.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Metadata) -> T) -> T {
        look(&self.state.read().metadata)
    }

    /// Changes what is not in the journal: what a checkpoint alone makes durable.
    pub(crate) fn adjust<T>(&self, adjust: impl FnOnce(&mut Metadata) -> T) -> T {
        adjust(&mut self.state.write().metadata)
    }

    /// Looks at the metadata, reading what it lacks from `device`.
    pub(crate) async fn view<D: Device, T>(
        &self,
        device: &D,
        mut view: impl FnMut(&Metadata) -> Result<T, Fault>,
    ) -> Result<T> {
        loop {
            let (fault, ticket) = {
                let state = self.state.read();
                match view(&state.metadata) {
                    Ok(value) => return Ok(value),
                    // What is missing must not be reused while it is read.
                    Err(fault) => (fault, self.gate.enter()),
                }
            };
            self.supply(device, fault).await?;
            drop(ticket);
        }
    }

    /// Changes the metadata by records that take at most `bytes` of the ring, or half of it, reading what is missing from
    /// `device`. None where they have to wait for a commit: then nothing was changed. This is asked under the lock of the
    /// change, because many may wait for the same page and then append at once.
    pub(crate) async fn change<D: Device, T>(
        &self,
        device: &D,
        bytes: usize,
        change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<Option<T>> {
        self.change_if(device, |state| state.has_room(bytes), true, change)
            .await
    }

    /// Changes what is not in the journal, reading what is missing from `device`.
    pub(crate) async fn adjust_reading<D: Device, T>(
        &self,
        device: &D,
        mut adjust: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<T> {
        loop {
            let done = self.change_if(device, |_| true, false, &mut adjust).await?;
            if let Some(value) = done {
                return Ok(value);
            }
        }
    }

    async fn change_if<D: Device, T>(
        &self,
        device: &D,
        may_change: impl Fn(&State) -> bool,
        may_append: bool,
        mut change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<Option<T>> {
        loop {
            self.check_poison()?;
            let (fault, ticket) = {
                let mut state = self.state.write();
                if !may_change(&state) {
                    return Ok(None);
                }
                let mut draft = Draft {
                    state: &mut state,
                    may_append,
                };
                match change(&mut draft) {
                    Ok(value) => return Ok(Some(value)),
                    Err(fault) => (fault, self.gate.enter()),
                }
            };
            self.supply(device, fault).await?;
            drop(ticket);
        }
    }

    /// The same where nothing has to be read or flushed, and nothing refuses it; none otherwise, and then nothing was
    /// changed.
    pub(crate) fn change_now<T>(
        &self,
        change: impl FnOnce(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Option<T> {
        if self.is_poisoned() {
            return None;
        }
        let mut state = self.state.write();
        if state.is_backlogged() {
            return None;
        }
        let mut draft = Draft {
            state: &mut state,
            may_append: true,
        };
        change(&mut draft).ok()
    }

    /// Whether writers must wait for a commit before they append more.
    #[cfg(test)]
    pub(crate) fn is_backlogged(&self) -> bool {
        self.state.read().is_backlogged()
    }

    /// Whether records wait for a commit.
    pub(crate) fn has_pending(&self) -> bool {
        !self.state.read().pending.is_empty()
    }

    /// Reads what a fault says is missing.
    pub(crate) async fn supply<D: Device>(&self, device: &D, fault: Fault) -> Result<()> {
        match fault {
            Fault::Error(error) => Err(error),
            Fault::Missing(missing) => {
                let wanted = self.look(|metadata| {
                    let place = metadata.missing_place(missing);
                    (!metadata.has(missing)).then(|| (metadata.space.bounds(), place))
                });
                // Somebody else has read it since the lookup. A checkpoint may even have given it a new place, where
                // it is not written yet.
                let Some((bounds, place)) = wanted else {
                    return Ok(());
                };
                let read = read_missing(device, self.metadata_id, bounds, missing, place).await;
                self.state.write().metadata.supply_read(missing, read)
            }
        }
    }
}

/// Something that was missing, as read from the device.
#[derive(Debug)]
pub(crate) enum Supplied {
    Page(MapPage),
    Counts(Option<Box<[u16; 1984]>>, Option<Box<[u16; 1984]>>),
}

/// Where a region's counts stand.
type CountsPlace = Option<(crate::format::layout::Slot, Generation, bool)>;

impl Metadata {
    /// Whether what was missing is there by now.
    fn has(&self, missing: Missing) -> bool {
        match missing {
            Missing::Counts(region) => self.space.has_region(region),
            Missing::Page(..) => false,
        }
    }

    fn missing_place(&self, missing: Missing) -> CountsPlace {
        match missing {
            Missing::Counts(region) => self.space.region_place(region),
            Missing::Page(..) => None,
        }
    }

    /// Takes over what was read. Counts that cannot be read close their region to allocation, and nothing else.
    fn supply_read(&mut self, missing: Missing, read: Result<Supplied>) -> Result<()> {
        if self.has(missing) {
            return Ok(());
        }
        let supplied = read.and_then(|supplied| self.supply(missing, supplied));
        if let (Err(error), Missing::Counts(region)) = (&supplied, missing) {
            tracing::error!(%error, "no block of this region is given out any more");
            self.space.close_region(region);
        }
        // Here too, so that whoever reads fast cannot outrun the background work.
        self.evict();
        supplied
    }

    fn supply(&mut self, missing: Missing, supplied: Supplied) -> Result<()> {
        match (missing, supplied) {
            (Missing::Page(ptr, _), Supplied::Page(page)) => {
                self.map.insert_loaded(ptr, page);
                Ok(())
            }
            (Missing::Counts(region), Supplied::Counts(low, high)) => {
                self.space.load(region, low.as_deref(), high.as_deref())
            }
            (Missing::Page(..), Supplied::Counts(..))
            | (Missing::Counts(..), Supplied::Page(..)) => Ok(()),
        }
    }

    /// Does `change`, reading what it lacks from `device`; for those who own the metadata alone.
    pub(crate) async fn with_supply<D: Device, T>(
        &mut self,
        device: &D,
        mut change: impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<T> {
        loop {
            match change(self) {
                Ok(value) => return Ok(value),
                Err(Fault::Error(error)) => return Err(error),
                Err(Fault::Missing(missing)) => {
                    let place = self.missing_place(missing);
                    let bounds = self.space.bounds();
                    let read = read_missing(device, self.page_id, bounds, missing, place).await;
                    self.supply_read(missing, read)?;
                }
            }
        }
    }
}

/// What is read of the device at a time, in pieces.
const TOGETHER_MAX: usize = 1024;

impl Metadata {
    /// Reads all of these, many at a time. What cannot be read stays missing: whoever needs it tries again, and is told
    /// why not.
    pub(crate) async fn supply_all<D: Device>(&mut self, device: &D, missing: &[Missing]) {
        for some in missing.chunks(TOGETHER_MAX) {
            let wanted: Vec<_> = some
                .iter()
                .map(|missing| {
                    (
                        *missing,
                        pages_of(self.page_id, *missing, self.missing_place(*missing)),
                    )
                })
                .collect();
            let pages = wanted.iter().flat_map(|(_, pages)| pages);
            let mut blocks: Vec<_> = pages
                .map(|page| (page.ptr.pba.offset(), BlockBuf::zeroed(1)))
                .collect();
            let done = device.read_blocks(&mut blocks).await;
            let mut read = blocks
                .iter()
                .zip(done)
                .map(|((_, block), is_read)| block.first_chunk().filter(|_| is_read));
            for (missing, pages) in &wanted {
                let found: Vec<_> = read.by_ref().take(pages.len()).collect();
                let found: Option<Vec<_>> = found.into_iter().collect();
                let supplied =
                    found.map(|found| decode(*missing, pages, &found, self.space.bounds()));
                if let Some(Ok(supplied)) = supplied
                    && !self.has(*missing)
                {
                    drop(self.supply(*missing, supplied));
                }
            }
        }
    }
}

/// Reads one page.
pub(crate) async fn read_page<D: Device>(
    device: &D,
    pba: Pba,
    buffer: &mut BlockBuf,
) -> Result<PageBytes> {
    device.read(pba.offset(), buffer).await?;
    let page = buffer.first_chunk().copied();
    page.ok_or_else(|| Error::new(ErrorKind::Io))
}

async fn read_missing<D: Device>(
    device: &D,
    metadata: MetadataId,
    bounds: Bounds,
    missing: Missing,
    place: CountsPlace,
) -> Result<Supplied> {
    let mut buffer = BlockBuf::zeroed(1);
    let pages = pages_of(metadata, missing, place);
    let mut found = Vec::with_capacity(pages.len());
    for page in &pages {
        found.push(read_page(device, page.ptr.pba, &mut buffer).await?);
    }
    let found: Vec<&PageBytes> = found.iter().collect();
    decode(missing, &pages, &found, bounds)
}

/// The pages that say what is missing; none where the device has never had it.
fn pages_of(metadata: MetadataId, missing: Missing, place: CountsPlace) -> Vec<PageIdentity> {
    let identity = |kind, level, ptr| PageIdentity {
        metadata,
        kind,
        level,
        ptr,
    };
    match (missing, place) {
        (Missing::Page(ptr, level), _) => vec![identity(PageKind::Map, level, ptr)],
        (Missing::Counts(_), None) => Vec::new(),
        (Missing::Counts(region), Some((slot, generation, is_wide))) => {
            let half = |kind, high| {
                let pba = region_slot(region, slot, high);
                identity(kind, 0, PagePtr { pba, generation })
            };
            let mut halves = vec![half(PageKind::Counts, false)];
            halves.extend(is_wide.then(|| half(PageKind::CountsHigh, true)));
            halves
        }
    }
}

/// What was missing, of the pages that say it.
fn decode(
    missing: Missing,
    pages: &[PageIdentity],
    found: &[&PageBytes],
    bounds: Bounds,
) -> Result<Supplied> {
    let mut pages = pages.iter().zip(found);
    match missing {
        Missing::Page(_, level) => {
            let (identity, page) = pages.next().ok_or_else(|| Error::new(ErrorKind::Io))?;
            let (mapped, node) = map_page::decode(page, *identity, bounds)?;
            Ok(Supplied::Page(MapPage {
                level,
                mapped,
                node,
            }))
        }
        Missing::Counts(_) => {
            let mut halves = [None, None];
            for (half, (identity, page)) in halves.iter_mut().zip(pages) {
                *half = Some(Box::new(decode_counts(page, *identity)?));
            }
            let [low, high] = halves;
            Ok(Supplied::Counts(low, high))
        }
    }
}
