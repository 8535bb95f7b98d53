//! What a frontend serves: the I/O of one volume or snapshot.

use super::Pool;
use super::report::{Latency, VolumeStats};
use crate::datapath::{self, Counters, Io, RangeLocks, RequestCounters, Run};
use crate::device::{Destination, Device, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::Role;
use crate::name::VolumePath;
use crate::sync::{Latch, Published};
use crate::units::{BLOCK_BYTES, PoolId, VolumeId};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the pool keeps of an attached volume.
#[derive(Debug)]
pub(super) struct AttachedVolume {
    pub(super) id: VolumeId,
    pub(super) bytes: Published,
    pub(super) counters: Counters,
    locks: RangeLocks,
    sector_bytes: u32,
    redirects_always: bool,
    is_read_only: bool,
    /// How long a request waits that finds no space; 0 for not at all.
    pub(super) queue_seconds: Published,
    /// Whoever it is attached for is about to go.
    pub(super) is_going: Latch,
}

/// Which way the bytes of a request go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the device to the client.
    Read,
    /// From the client to the device.
    Write,
}

/// A read or a write that is one run of blocks on the device: the frontend moves the bytes itself, and then says so.
#[derive(Debug)]
pub struct Direct<'a> {
    run: datapath::Direct<'a>,
    attached: &'a Attached,
    transfer: Transfer,
    began: Option<u64>,
    bytes: usize,
}

impl Direct<'_> {
    /// Where the bytes are on the device.
    pub fn offset(&self) -> u64 {
        match &self.run {
            datapath::Direct::There { extent, .. } => extent.start.offset(),
            datapath::Direct::New(reserved) => reserved.offset(),
        }
    }

    /// How many there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All bytes were moved. False if the same request has to come once more, as a write of the whole.
    #[must_use]
    pub fn done(self) -> bool {
        let (attached, bytes) = (self.attached, self.bytes as u64);
        let counters = &attached.volume.counters;
        match self.run {
            datapath::Direct::There { .. } if self.transfer == Transfer::Read => {}
            datapath::Direct::There { extent, .. } => {
                let written = &counters.in_place_blocks;
                written.fetch_add(extent.count, Ordering::Relaxed);
            }
            datapath::Direct::New(reserved) => {
                if !reserved.publish() {
                    attached.request_counters(self.transfer).forget(self.bytes);
                    return false;
                }
                let written = &counters.redirected_blocks;
                written.fetch_add(bytes / BLOCK_BYTES, Ordering::Relaxed);
            }
        }
        let clock = &*attached.pool.ledger.clock;
        attached
            .request_counters(self.transfer)
            .end(self.began, clock);
        true
    }

    /// Not all bytes were moved: the same request comes once more, as a read or a write of the whole.
    pub fn give_up(self) {
        self.attached
            .request_counters(self.transfer)
            .forget(self.bytes);
    }
}

/// A volume or a snapshot that a frontend serves.
#[derive(Debug)]
pub struct Attached {
    pub(super) pool: Arc<Pool>,
    pub(super) volume: Arc<AttachedVolume>,
    first_path: VolumePath,
}

impl Attached {
    pub(super) fn new(pool: &Arc<Pool>, path: &VolumePath, read_only: bool) -> Result<Arc<Self>> {
        let clock = &pool.ledger.clock;
        // Before the look: a change that is announced later finds what is attached here.
        let mut attached = pool.attached.lock();
        let volume = pool.ledger.look(|metadata| {
            let entry = &metadata.catalog.find(path)?.entry;
            pool.check_withheld(entry.id, path)?;
            Ok::<_, Error>(AttachedVolume {
                id: entry.id,
                bytes: Published::new(entry.bytes),
                counters: Counters::new(&**clock),
                locks: RangeLocks::default(),
                sector_bytes: entry.sector_bytes,
                redirects_always: entry.redirects_always,
                is_read_only: read_only || matches!(entry.role, Role::Snapshot { .. }),
                queue_seconds: Published::new(0),
                is_going: Latch::default(),
            })
        })?;
        let volume = Arc::new(volume);
        if pool.changes.concern(volume.id) {
            let message = format!("{}/{path}: is being changed; try again", pool.name);
            return Err(Error::with(ErrorKind::Busy, message));
        }
        if attached.contains_key(&volume.id) {
            let message = format!("{}/{path}: is attached already", pool.name);
            return Err(Error::with(ErrorKind::Busy, message));
        }
        attached.insert(volume.id, Arc::clone(&volume));
        Ok(Arc::new(Self {
            pool: Arc::clone(pool),
            volume,
            first_path: path.clone(),
        }))
    }

    /// What is attached. It follows a rename.
    pub fn path(&self) -> VolumePath {
        // What is attached is never removed, so it always has a name.
        self.pool
            .path_of(self.volume.id)
            .unwrap_or_else(|_| self.first_path.clone())
    }

    /// The identity of the pool that it is in.
    pub fn pool_id(&self) -> PoolId {
        self.pool.id()
    }

    /// Its number.
    pub fn id(&self) -> VolumeId {
        self.volume.id
    }

    /// Its size in bytes, now.
    pub fn bytes(&self) -> u64 {
        self.volume.bytes.get()
    }

    /// Its logical sector.
    pub fn sector_bytes(&self) -> u32 {
        self.volume.sector_bytes
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.volume.is_read_only
    }

    /// Gives the volume back to the pool. Idempotent.
    pub fn detach(&self) {
        let mut attached = self.pool.attached.lock();
        if attached
            .get(&self.volume.id)
            .is_some_and(|held| Arc::ptr_eq(held, &self.volume))
        {
            attached.remove(&self.volume.id);
        }
    }

    fn io<'a, D>(&'a self, device: &'a D) -> Io<'a, D> {
        let volume = &*self.volume;
        self.pool
            .io(device, volume.id, volume.redirects_always, &volume.counters)
    }

    fn check_range(&self, offset: u64, bytes: u64) -> Result<()> {
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(Error::with(
                ErrorKind::Invalid,
                "a request beyond the volume's end",
            ));
        }
        let sector = u64::from(self.volume.sector_bytes);
        if !offset.is_multiple_of(sector) || !bytes.is_multiple_of(sector) {
            return Err(Error::with(
                ErrorKind::Invalid,
                "a request that does not consist of whole sectors",
            ));
        }
        Ok(())
    }

    fn check_change(&self, offset: u64, bytes: u64) -> Result<()> {
        if self.volume.is_read_only {
            return Err(Error::new(ErrorKind::ReadOnly));
        }
        self.check_range(offset, bytes)
    }

    /// On a volume whose sectors are smaller than a block, the whole blocks around a change are locked.
    async fn lock(&self, offset: u64, bytes: u64) -> Option<datapath::RangeGuard<'_>> {
        if u64::from(self.volume.sector_bytes) == BLOCK_BYTES {
            return None;
        }
        let range: Range<u64> = offset / BLOCK_BYTES..(offset + bytes).div_ceil(BLOCK_BYTES);
        Some(self.volume.locks.lock(range).await)
    }

    fn request_counters(&self, transfer: Transfer) -> &RequestCounters {
        match transfer {
            Transfer::Read => &self.volume.counters.reads,
            Transfer::Write => &self.volume.counters.writes,
        }
    }

    /// Where on the device the frontend may read or write `bytes` by itself; none if [`Attached::read`] or
    /// [`Attached::write`] is to do it, or to refuse it.
    pub fn direct(&self, transfer: Transfer, offset: u64, bytes: usize) -> Option<Direct<'_>> {
        let io = self.io(&());
        let run = match transfer {
            Transfer::Read => {
                self.check_range(offset, bytes as u64).ok()?;
                io.direct_read(offset, bytes)?
            }
            Transfer::Write => {
                self.check_change(offset, bytes as u64).ok()?;
                // Elsewhere, writers of parts of the same block wait for each other.
                if u64::from(self.volume.sector_bytes) != BLOCK_BYTES {
                    return None;
                }
                io.direct_write(offset, bytes)?
            }
        };
        let counters = self.request_counters(transfer);
        Some(Direct {
            run,
            attached: self,
            transfer,
            began: counters.begin(bytes, &*self.pool.ledger.clock),
            bytes,
        })
    }

    /// Fills `to` from byte `offset`; both in whole sectors. Memory is aligned to a block.
    pub async fn read<D, T>(&self, device: &D, offset: u64, to: &mut T) -> Result<()>
    where
        D: Device,
        T: Destination<D> + ?Sized,
    {
        self.check_range(offset, to.size() as u64)?;
        let (counters, clock) = (&self.volume.counters.reads, &*self.pool.ledger.clock);
        let began = counters.begin(to.size(), clock);
        let done = self.io(device).read(offset, to).await;
        counters.end(began, clock);
        done
    }

    /// What [`Attached::try_write`] does; where the volume was attached so, it waits for space. Others of the same queue go on.
    pub async fn write<D, S>(&self, device: &D, offset: u64, from: &S) -> Result<()>
    where
        D: Device,
        S: Source<D> + ?Sized,
    {
        self.patiently(device, async || self.try_write(device, offset, from).await)
            .await
    }

    /// Writes `from` at byte `offset`, in whole sectors. Acknowledged, not durable.
    pub(crate) async fn try_write<D, S>(&self, device: &D, offset: u64, from: &S) -> Result<()>
    where
        D: Device,
        S: Source<D> + ?Sized,
    {
        self.check_change(offset, from.size() as u64)?;
        let (counters, clock) = (&self.volume.counters.writes, &*self.pool.ledger.clock);
        let began = counters.begin(from.size(), clock);
        let _alone = self.lock(offset, from.size() as u64).await;
        let done = self.io(device).write(offset, from).await;
        match &done {
            // It comes again, and counts once.
            Err(error) if self.may_wait(error) => counters.forget(from.size()),
            Ok(()) | Err(_) => counters.end(began, clock),
        }
        done
    }

    /// Makes all acknowledged writes durable, on every queue.
    pub async fn flush<D: Device>(&self, device: &D) -> Result<()> {
        self.volume.counters.flushes.fetch_add(1, Ordering::Relaxed);
        if self.pool.is_read_only {
            return Ok(());
        }
        self.pool.flush(device).await
    }

    /// Unmaps the whole blocks of the range; they read as zeros.
    pub async fn discard<D: Device>(&self, device: &D, offset: u64, bytes: u64) -> Result<()> {
        self.check_change(offset, bytes)?;
        self.volume
            .counters
            .discards
            .fetch_add(1, Ordering::Relaxed);
        let _alone = self.lock(offset, bytes).await;
        self.io(device).discard(offset, bytes).await
    }

    /// What [`Attached::try_write_zeroes`] does; where the volume was attached so, it waits for space.
    pub async fn write_zeroes<D: Device>(
        &self,
        device: &D,
        offset: u64,
        bytes: u64,
        keep_space: bool,
    ) -> Result<()> {
        self.patiently(device, async || {
            self.try_write_zeroes(device, offset, bytes, keep_space)
                .await
        })
        .await
    }

    /// Zeroes the range to the byte; `keep_space`: blocks stay allocated (NOUNMAP).
    pub(crate) async fn try_write_zeroes<D: Device>(
        &self,
        device: &D,
        offset: u64,
        bytes: u64,
        keep_space: bool,
    ) -> Result<()> {
        self.check_change(offset, bytes)?;
        self.volume
            .counters
            .discards
            .fetch_add(1, Ordering::Relaxed);
        let _alone = self.lock(offset, bytes).await;
        self.io(device)
            .write_zeroes(offset, bytes, keep_space)
            .await
    }

    /// What is mapped from byte `offset` on, both in whole sectors: runs that alternate in kind, at least one, at most
    /// `runs_max`. They may end before the range does. A change that goes on at the same time is seen in part.
    pub async fn allocation<D: Device>(
        &self,
        device: &D,
        offset: u64,
        bytes: u64,
        runs_max: usize,
    ) -> Result<Vec<Run>> {
        self.check_range(offset, bytes)?;
        self.io(device).allocation(offset, bytes, runs_max).await
    }

    /// Its counters.
    pub fn stats(&self) -> VolumeStats {
        self.volume
            .stats(self.path(), self.pool.ledger.clock.monotonic_ns())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.detach();
    }
}

impl AttachedVolume {
    pub(super) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Requests since it was attached.
    pub(super) fn requests(&self) -> u64 {
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        load(&counters.reads.requests)
            + load(&counters.writes.requests)
            + load(&counters.flushes)
            + load(&counters.discards)
    }

    /// The counters, as of `now_ns`.
    pub(super) fn stats(&self, path: VolumePath, now_ns: u64) -> VolumeStats {
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let latency = |(count, [p50_ns, p99_ns, p999_ns], max_ns): (u64, [u64; 3], u64)| Latency {
            count,
            p50_ns,
            p99_ns,
            p999_ns,
            max_ns,
        };
        VolumeStats {
            path,
            attached_ns: now_ns.saturating_sub(counters.since_ns),
            reads: load(&counters.reads.requests),
            read_bytes: load(&counters.reads.bytes),
            writes: load(&counters.writes.requests),
            written_bytes: load(&counters.writes.bytes),
            flushes: load(&counters.flushes),
            discards: load(&counters.discards),
            redirected_blocks: load(&counters.redirected_blocks),
            in_place_blocks: load(&counters.in_place_blocks),
            read_latency: latency(counters.reads.latency.summary()),
            write_latency: latency(counters.writes.latency.summary()),
            snapshot_pause: latency(counters.snapshot_pause.summary()),
        }
    }
}
