//! What a pool tells about itself: plain values, which also are the shapes of `--json`.

use crate::name::{Name, VolumePath};
use crate::units::{Timestamp, VolumeId};
use serde::{Deserialize, Serialize};

/// Which writes go to newly allocated blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Redirect {
    /// Those to blocks that a snapshot or clone shares; the others go in place.
    #[default]
    Shared,
    /// Every write, so that a power cut never tears a block.
    Always,
}

/// What a write does that finds no space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It fails at once.
    #[default]
    Error,
    /// It waits for space, and fails after so many seconds.
    Queue {
        /// How many.
        seconds: u32,
    },
}

/// What a new volume is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOptions {
    /// Its size.
    pub bytes: u64,
    /// Its logical sector: 4096 or 512.
    pub sector_bytes: u32,
    /// Which of its writes are redirected.
    pub redirect: Redirect,
}

/// What a volume may take of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The most bytes that it maps.
    pub quota_bytes: Option<u64>,
    /// Bytes that are set aside for it: others leave it so much.
    pub reserve_bytes: Option<u64>,
}

/// One of [`Limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// [`Limits::quota_bytes`].
    Quota,
    /// [`Limits::reserve_bytes`].
    Reserve,
}

/// A limit that a volume gets, or loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitChange {
    /// Which.
    pub limit: Limit,
    /// Its value from now on; none takes it away.
    pub bytes: Option<u64>,
}

/// A volume or a snapshot in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The volume, or the snapshot of it.
    pub path: VolumePath,
    /// Its number in the pool.
    pub id: VolumeId,
    /// `volume` or `snapshot`.
    pub kind: EntryKind,
    /// The snapshot that it was cloned from or last rolled back to, if that still exists.
    pub origin: Option<VolumePath>,
    /// Its size.
    pub size_bytes: u64,
    /// Its logical sector.
    pub sector_bytes: u32,
    /// Which of its writes are redirected.
    pub redirect: Redirect,
    /// Bytes of blocks that it maps.
    pub used_bytes: u64,
    /// Bytes that removing it alone would free, map pages included.
    pub unique_bytes: u64,
    /// Bytes of blocks that it maps together with others.
    pub shared_bytes: u64,
    /// When it was made.
    pub created: Timestamp,
    /// The tags of its holds, which keep it from being removed; none on a volume.
    #[serde(default)]
    pub holds: Vec<Name>,
    /// What it may take; nothing for a snapshot.
    #[serde(flatten)]
    pub limits: Limits,
}

/// What the catalog alone knows of a volume or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutlineEntry {
    /// The volume, or the snapshot of it.
    pub path: VolumePath,
    /// Its number in the pool.
    pub id: VolumeId,
    /// The number of the snapshot that it was cloned from or last rolled back to, which may be gone.
    pub origin: Option<VolumeId>,
    /// When it was made.
    pub created: Timestamp,
    /// The tags of its holds; none on a volume.
    pub holds: Vec<Name>,
}

/// What an [`Entry`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// Writable.
    Volume,
    /// Never changes.
    Snapshot,
}

/// The state of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: Name,
    /// Its identity, as a UUID.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes that a write can still take.
    pub free_bytes: u64,
    /// Bytes of data blocks and metadata in use.
    pub used_bytes: u64,
    /// Bytes released, reusable after the next checkpoint.
    pub pending_bytes: u64,
    /// Bytes kept back for metadata.
    pub reserve_bytes: u64,
    /// Bytes of the free ones that are set aside for volumes with a reserve.
    #[serde(default)]
    pub set_aside_bytes: u64,
    /// Whether the volumes together may be larger than the pool.
    #[serde(default = "yes")]
    pub overcommit: bool,
    /// Volumes.
    pub volumes: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Removed volumes and snapshots whose space is still being returned.
    pub reclaiming: u64,
    /// Bytes that these still hold, at most: what others share with them does not come back.
    pub backlog_bytes: u64,
    /// The last durable checkpoint.
    pub generation: u64,
    /// When it was created.
    pub created: Timestamp,
    /// Whether an earlier flush failed, so that it takes no more writes.
    pub poisoned: bool,
    /// Faults found on the way that did not stop anything, such as a superblock copy that was damaged.
    pub warnings: Vec<String>,
}

/// What pools allow unless they were made otherwise.
fn yes() -> bool {
    true
}

/// What removing something frees, or would free.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// What goes, snapshots before their volume.
    pub targets: Vec<VolumePath>,
    /// Bytes that come back, where only that was asked: to know takes a walk over all that goes.
    pub freed_bytes: Option<u64>,
    /// The numbers of what goes, by which [`crate::pool::Pool::backlog`] knows them.
    pub ids: Vec<VolumeId>,
}

/// What of removed volumes and snapshots is still to be returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backlog {
    /// How many of them hold space.
    pub trees: u64,
    /// Of those, how many cannot be read, so that their space does not come back.
    pub unreadable: u64,
    /// Bytes that they hold, at most: what others share with them does not come back.
    pub bytes: u64,
    /// Whether a checkpoint has made all that was returned free.
    pub is_settled: bool,
}

/// A run of a diff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffExtent {
    /// Where it begins in the volume.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What the newer side has there.
    pub kind: DiffKind,
}

/// What the newer side of a diff has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiffKind {
    /// Bytes.
    Data,
    /// Nothing mapped: it reads as zeros.
    Zero,
}

/// What `check` found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Metadata pages read and verified.
    pub pages: u64,
    /// Blocks that some volume or snapshot maps, each once.
    pub data_blocks: u64,
    /// Damage, each line naming the volume or snapshot and the place.
    pub damage: Vec<String>,
    /// What cannot be read, volume by volume.
    pub unreadable: Vec<Unreadable>,
    /// Blocks marked used that nothing names.
    pub leaked_blocks: u64,
}

/// A volume or snapshot that cannot be read, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    /// Which; none for one that was removed.
    pub path: Option<VolumePath>,
    /// Its number in the pool.
    pub id: VolumeId,
    /// Bytes that cannot be read.
    pub bytes: u64,
    /// Where they are; of many ranges only the first.
    pub ranges: Vec<ByteRange>,
    /// Why.
    pub reason: String,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// Where it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// What a repair does, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairPlan {
    /// In order.
    pub steps: Vec<RepairStep>,
}

/// One thing that is wrong, and what a repair does about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairStep {
    /// What is wrong.
    pub what: String,
    /// Where: blocks of the pool, volumes.
    pub place: String,
    /// What is done about it; what can be done by hand where nothing is.
    pub action: String,
    /// Whether the repair mends it.
    pub mends: bool,
}

impl RepairPlan {
    /// Whether there is anything that the repair does.
    pub fn mends_something(&self) -> bool {
        self.steps.iter().any(|step| step.mends)
    }

    /// Whether something stays as it is.
    pub fn leaves_something(&self) -> bool {
        self.steps.iter().any(|step| !step.mends)
    }
}

impl CheckReport {
    /// 0 clean, 4 corrupt, 5 leaks only.
    pub fn exit_code(&self) -> u8 {
        if !self.damage.is_empty() {
            4
        } else if self.leaked_blocks > 0 {
            5
        } else {
            0
        }
    }
}

/// Percentiles of a latency histogram, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many were measured.
    pub count: u64,
    /// Half took at most this.
    pub p50_ns: u64,
    /// 99 % took at most this.
    pub p99_ns: u64,
    /// 99.9 % took at most this.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Counters of one attached volume since it was attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStats {
    /// The volume or snapshot.
    pub path: VolumePath,
    /// Nanoseconds since it was attached.
    pub attached_ns: u64,
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Blocks written to a newly allocated place.
    pub redirected_blocks: u64,
    /// Blocks written in place.
    pub in_place_blocks: u64,
    /// Reads' latency.
    pub read_latency: Latency,
    /// Writes' latency.
    pub write_latency: Latency,
    /// Time that snapshots held the metadata, during which writes wait.
    pub snapshot_pause: Latency,
}

/// Counters of a pool since it was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStats {
    /// Bytes that a write can still take.
    pub free_bytes: u64,
    /// Bytes of journal in use and its whole size.
    pub journal_used_bytes: u64,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Journal commits.
    pub commits: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// The last checkpoint's duration in nanoseconds.
    pub checkpoint_ns: u64,
    /// Removed volumes and snapshots whose space is still being returned.
    pub reclaiming: u64,
    /// Bytes that these still hold, at most: what others share with them does not come back.
    pub backlog_bytes: u64,
    /// Blocks that reclaim has returned since the pool was opened.
    pub reclaimed_blocks: u64,
    /// Bytes of memory that maps and counts take.
    pub metadata_bytes: u64,
    /// Bytes released, reusable after the next checkpoint.
    pub pending_bytes: u64,
    /// Attached volumes and snapshots.
    pub volumes: Vec<VolumeStats>,
}
