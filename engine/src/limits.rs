//! Every upper bound of the engine. A queue, a list or a size that comes from outside is held against one of these.

use crate::units::BLOCK_BYTES;

/// Bytes in the longest name of a pool, a volume or a snapshot.
pub const NAME_BYTES_MAX: usize = 127;
/// Bytes in the longest path of a shared ring: a superblock has room for so many.
pub const RING_PATH_BYTES_MAX: usize = 255;
/// The smallest pool, in blocks (16 MiB).
pub const POOL_BLOCKS_MIN: u64 = 16 * 1024 * 1024 / BLOCK_BYTES;
/// The largest pool, in blocks (8 PiB).
pub const POOL_BLOCKS_MAX: u64 = 1 << 41;
/// The largest volume, in bytes (1 PiB).
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// The most volumes, snapshots and holds of one pool, those being deleted included.
pub const VOLUMES_MAX: usize = 1 << 22;
/// The most blocks that one journal record maps or unmaps.
pub const RECORD_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_BYTES;
/// The most targets that one `snapshot` or `hold` command names; a checkpoint keeps room for so many new entries.
pub const SNAPSHOT_GROUP_MAX: usize = 256;
/// Bytes of redo records that may wait in memory for a commit before writers wait.
pub const JOURNAL_PENDING_BYTES_MAX: usize = 8 << 20;
/// Map pages and regions' counts that change before a checkpoint is wanted. After a crash replay reads what they were made
/// from, and makes them once more: it must not take long whatever ran before.
pub const CHECKPOINT_PAGES_MAX: usize = 3 << 13;
/// The least memory for metadata that a pool can be given, in bytes: one change may need hundreds of pages at once.
pub const METADATA_CACHE_BYTES_MIN: u64 = 16 << 20;
/// What a pool takes where nobody says how much, in bytes.
pub const METADATA_CACHE_BYTES_DEFAULT: u64 = 2 << 30;
/// The longest payload of a read or a write over NBD, in bytes.
pub const NBD_PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// The longest data of an option in NBD's handshake, in bytes.
pub const NBD_OPTION_BYTES_MAX: usize = 64 << 10;
/// The most connections of one NBD export.
pub const NBD_CONNECTIONS_MAX: usize = 64;
/// The most threads that work on the requests of one NBD connection, besides the one that reads them.
pub const NBD_WORKERS_MAX: usize = 16;
/// The most of those that wait for a flush at a time.
pub const NBD_FLUSHERS_MAX: usize = 4;
/// The most requests of one NBD connection that are read and not answered.
pub const NBD_REQUESTS_MAX: usize = 128;
/// The most payload of those, in bytes; a request that is alone may be as long as it may be.
pub const NBD_MEMORY_BYTES_MAX: usize = 64 << 20;
/// The most runs in one answer to what is allocated, over NBD.
pub const NBD_STATUS_RUNS_MAX: usize = 4096;
