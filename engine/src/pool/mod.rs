//! The public face of the engine: pools, their volumes, snapshots and clones, and the I/O of what is attached.

mod report;

pub use report::*;

use crate::clock::Clock;
use crate::device::Device;
use crate::error::Result;
use crate::name::{Name, VolumePath};
use crate::units::{PoolId, Timestamp, VolumeId};
use std::path::PathBuf;
use std::sync::Arc;

/// What a new pool is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its name.
    pub name: Name,
    /// Its identity, drawn at random by the caller.
    pub id: PoolId,
    /// Its size in blocks; the device holds at least as many.
    pub blocks: u64,
    /// The time.
    pub created: Timestamp,
}

/// Where the redo records that no flush has covered yet stand, outside the process, so that a kill loses none.
#[derive(Clone, Debug)]
pub enum RingPlace {
    /// Nowhere: a killed process loses what was not flushed, as a power cut does.
    Nowhere,
    /// A file on a tmpfs, made if it is not there.
    File {
        /// The file.
        path: PathBuf,
        /// The kernel's boot id: a ring of another boot is stale.
        boot_id: [u8; 16],
    },
}

/// How to open a pool.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Change nothing: replay in memory only.
    pub read_only: bool,
    /// Blocks that the device holds now.
    pub device_blocks: u64,
    /// Where unflushed redo records stand.
    pub ring: RingPlace,
    /// The clock.
    pub clock: Arc<dyn Clock>,
}

/// What a pool's superblock says of it, without opening the pool.
#[derive(Clone, Debug)]
pub struct PoolLabel {
    /// Its name.
    pub name: Name,
    /// Its identity.
    pub id: PoolId,
    /// Its size in blocks.
    pub blocks: u64,
    /// Whether it was closed properly.
    pub is_clean: bool,
}

/// An open pool, shared by all threads that serve it.
#[derive(Debug)]
pub struct Pool {}

/// A volume or a snapshot that a frontend serves.
#[derive(Debug)]
pub struct Attached {}

impl Pool {
    /// Writes an empty pool; the device's content is gone.
    pub async fn create<D: Device>(_device: &D, _options: CreateOptions) -> Result<()> { unimplemented!() }
    /// Reads the label of a pool.
    pub async fn label<D: Device>(_device: &D, _device_blocks: u64) -> Result<PoolLabel> { unimplemented!() }
    /// Opens a pool: reads the checkpoint, replays the journal and the ring.
    pub async fn open<D: Device>(_device: &D, _options: OpenOptions) -> Result<Self> { unimplemented!() }
    /// Makes everything durable and marks the pool closed. Fails if something is attached.
    pub async fn close<D: Device>(&self, _device: &D) -> Result<()> { unimplemented!() }
    /// The pool's name.
    pub fn name(&self) -> Name { unimplemented!() }
    /// The pool's identity.
    pub fn id(&self) -> PoolId { unimplemented!() }
    /// The state.
    pub fn status(&self) -> PoolStatus { unimplemented!() }
    /// The counters.
    pub fn stats(&self) -> PoolStats { unimplemented!() }
    /// Takes the device's blocks up to `blocks` into use.
    pub async fn grow<D: Device>(&self, _device: &D, _blocks: u64) -> Result<()> { unimplemented!() }
    /// Makes an empty volume.
    pub async fn create_volume<D: Device>(&self, _device: &D, _name: &Name, _options: VolumeOptions) -> Result<VolumeId> { unimplemented!() }
    /// Removes volumes and snapshots, or with `dry_run` says what that would free. `recursive`: a volume's snapshots too.
    pub async fn remove<D: Device>(&self, _device: &D, _targets: &[VolumePath], _recursive: bool, _dry_run: bool) -> Result<Removal> { unimplemented!() }
    /// Renames a volume (its snapshots follow), or a snapshot within its volume.
    pub async fn rename<D: Device>(&self, _device: &D, _from: &VolumePath, _to: &VolumePath) -> Result<()> { unimplemented!() }
    /// Changes a volume's size. Shrinking needs `allow_shrink` and an unattached volume.
    pub async fn resize<D: Device>(&self, _device: &D, _volume: &Name, _bytes: u64, _allow_shrink: bool) -> Result<()> { unimplemented!() }
    /// Takes snapshots of one or several volumes at one point in time; durable on return.
    pub async fn snapshot<D: Device>(&self, _device: &D, _targets: &[VolumePath]) -> Result<()> { unimplemented!() }
    /// Makes a volume that begins as the snapshot is.
    pub async fn clone_snapshot<D: Device>(&self, _device: &D, _snapshot: &VolumePath, _volume: &Name) -> Result<VolumeId> { unimplemented!() }
    /// Turns a volume back to one of its snapshots; newer snapshots stay. The caller keeps writers away meanwhile.
    pub async fn rollback<D: Device>(&self, _device: &D, _snapshot: &VolumePath) -> Result<()> { unimplemented!() }
    /// Where `to` differs from `from`, in order; adjacent runs of one kind are one.
    pub async fn diff<D: Device>(&self, _device: &D, _from: &VolumePath, _to: &VolumePath) -> Result<Vec<DiffExtent>> { unimplemented!() }
    /// All volumes and snapshots, by name, snapshots by age after their volume. Counts unique blocks by a walk.
    pub async fn list<D: Device>(&self, _device: &D) -> Result<Vec<Entry>> { unimplemented!() }
    /// Gives the I/O of a volume, or of a snapshot (always read-only), to a frontend; refused while somebody has it.
    pub fn attach(self: &Arc<Self>, _path: &VolumePath, _read_only: bool) -> Result<Arc<Attached>> { unimplemented!() }
    /// Makes all acknowledged writes durable.
    pub async fn flush<D: Device>(&self, _device: &D) -> Result<()> { unimplemented!() }
    /// Writes a checkpoint.
    pub async fn checkpoint<D: Device>(&self, _device: &D) -> Result<()> { unimplemented!() }
    /// One step of what runs in the background (commit, checkpoint, reclaim): true while there is more to do at once.
    pub async fn maintain<D: Device>(&self, _device: &D) -> Result<bool> { unimplemented!() }
    /// Waits until [`Pool::maintain`] is wanted before its usual time (each 100 ms); for the background thread.
    pub async fn maintenance_wanted(&self) { unimplemented!() }
    /// Holds every reference against every count. Reads all metadata; the pool may be open read-only.
    pub async fn check<D: Device>(&self, _device: &D, _progress: &mut dyn FnMut(u64, u64)) -> Result<CheckReport> { unimplemented!() }
}

impl Attached {
    /// What is attached.
    pub fn path(&self) -> VolumePath { unimplemented!() }
    /// Its number.
    pub fn id(&self) -> VolumeId { unimplemented!() }
    /// Its size in bytes, now.
    pub fn bytes(&self) -> u64 { unimplemented!() }
    /// Its logical sector.
    pub fn sector_bytes(&self) -> u32 { unimplemented!() }
    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool { unimplemented!() }
    /// Its counters.
    pub fn stats(&self) -> VolumeStats { unimplemented!() }
    /// Fills `buffer` from byte `offset`; both in whole sectors. `buffer` is aligned to a block.
    pub async fn read<D: Device>(&self, _device: &D, _offset: u64, _buffer: &mut [u8]) -> Result<()> { unimplemented!() }
    /// Writes `buffer` at byte `offset`, in whole sectors. Acknowledged, not durable.
    pub async fn write<D: Device>(&self, _device: &D, _offset: u64, _buffer: &[u8]) -> Result<()> { unimplemented!() }
    /// Makes all acknowledged writes durable, on every queue.
    pub async fn flush<D: Device>(&self, _device: &D) -> Result<()> { unimplemented!() }
    /// Unmaps the whole blocks of the range; they read as zeros.
    pub async fn discard<D: Device>(&self, _device: &D, _offset: u64, _bytes: u64) -> Result<()> { unimplemented!() }
    /// Zeroes the range to the byte; `keep_space`: blocks stay allocated (NOUNMAP).
    pub async fn write_zeroes<D: Device>(&self, _device: &D, _offset: u64, _bytes: u64, _keep_space: bool) -> Result<()> { unimplemented!() }
    /// Gives the volume back to the pool. Idempotent.
    pub fn detach(&self) { unimplemented!() }
}
