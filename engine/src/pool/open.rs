//! Creating, recognising and opening a pool; recovery is part of opening.
//!
//! Opening for writing: take the younger superblock and rewrite both under a new generation, which also flushes what
//! the device still held back; load the checkpoint; replay the journal, then the ring of a killed process; commit what
//! only that has; start a new session with an empty ring. Nothing is served before that. What was replayed stays in the
//! journal until the background work finds a checkpoint due, so that opening does not wait for one.

use super::maintain::Maintenance;
use super::mend::{Purpose, mend};
use super::recovery::{Unsaved, load_current};
use super::{Attached, Pool};
use crate::checkpoint::{Checkpoints, Ending, read_superblocks, write_superblocks};
use crate::clock::Clock;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::counts::IndexEntry;
use crate::format::host::Host;
use crate::format::layout::{TOP_ENTRIES, journal, usable_blocks};
use crate::format::superblock::Superblock;
use crate::journal::{Committed, Ledger, Ring, RingOwner};
use crate::limits::{METADATA_CACHE_BYTES_DEFAULT, POOL_BLOCKS_MAX, POOL_BLOCKS_MIN};
use crate::name::Name;
use crate::sync::{AsyncMutex, Mutex};
use crate::units::{BLOCK_BYTES, Generation, MetadataId, PoolId, Seq, Timestamp};
use std::collections::BTreeSet;
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

impl Pool {
    /// Writes an empty pool; the device's content is gone.
    pub async fn create<D: Device>(device: &D, options: CreateOptions) -> Result<()> {
        Self::create_as(device, options, false).await
    }

    /// The same, for a pool whose volumes together may not be larger than it.
    pub async fn create_without_overcommit<D: Device>(
        device: &D,
        options: CreateOptions,
    ) -> Result<()> {
        Self::create_as(device, options, true).await
    }

    async fn create_as<D: Device>(
        device: &D,
        options: CreateOptions,
        forbids_overcommit: bool,
    ) -> Result<()> {
        let blocks = usable_blocks(options.blocks);
        if !(POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(&blocks) {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!(
                    "a pool has at least {} MiB and at most 8 PiB; this would have {} MiB",
                    (POOL_BLOCKS_MIN * BLOCK_BYTES) >> 20,
                    (blocks * BLOCK_BYTES) >> 20
                ),
            ));
        }
        let superblock = Superblock {
            id: options.id,
            metadata_id: MetadataId(options.id.0),
            name: options.name,
            created: options.created,
            blocks,
            generation: Generation(1),
            session: 0,
            is_clean: true,
            boot_id: [0; 16],
            host: Host::default(),
            written: options.created,
            ring: None,
            forbids_overcommit,
            journal: journal(blocks),
            journal_block: 0,
            journal_chain: 0,
            seq: Seq(1),
            next_id: 1,
            catalog: None,
            catalog_level: 0,
            catalog_slots: 0,
            counts: Box::new([IndexEntry::default(); TOP_ENTRIES]),
        };
        // On a sparse file, so that no commit ever lacks room.
        device.allocate(
            superblock.journal.start.offset(),
            superblock.journal.count * BLOCK_BYTES,
        )?;
        write_superblocks(device, &superblock, async || device.flush().await).await
    }

    /// Reads the label of a pool.
    pub async fn label<D: Device>(device: &D, device_blocks: u64) -> Result<PoolLabel> {
        let superblock = read_superblocks(device, device_blocks).await?.superblock;
        Ok(PoolLabel {
            name: superblock.name,
            id: superblock.id,
            blocks: superblock.blocks,
            is_clean: superblock.is_clean,
        })
    }

    /// Opens a pool: reads the checkpoint, replays the journal and the ring.
    pub async fn open<D: Device>(device: &D, options: OpenOptions) -> Result<Self> {
        let found = read_superblocks(device, options.device_blocks).await?;
        let (mut superblock, mut warnings) = (found.superblock, found.warnings);
        let was_clean = superblock.is_clean;
        if !options.read_only {
            // Pages that an interrupted checkpoint left behind carry the old number and can never be taken for ours.
            superblock.generation = superblock.generation.next();
            superblock.is_clean = false;
            write_superblocks(device, &superblock, async || device.flush().await).await?;
        }
        let loaded =
            load_current(device, &superblock, was_clean, &options.ring, &mut warnings).await;
        let (metadata, unsaved, withheld) = match loaded {
            Ok((metadata, unsaved)) => (metadata, unsaved, BTreeSet::new()),
            // What is whole of a damaged pool can still be read.
            Err(error) if options.read_only && error.kind() == ErrorKind::Corrupt => {
                let (ring, progress) = (&options.ring, &mut |_, _| {});
                let purpose = Purpose::Look;
                let mended = mend(device, &superblock, was_clean, ring, purpose, progress).await?;
                warnings.push(format!("{error}; open for reading what is whole"));
                warnings.extend(mended.facts());
                (mended.metadata, mended.unsaved, mended.withheld)
            }
            Err(error) => {
                // Whoever looks at it next, for reading, shall not miss the ring of an opening that never was.
                if !options.read_only && was_clean {
                    superblock.is_clean = true;
                    write_superblocks(device, &superblock, async || device.flush().await).await?;
                }
                return Err(error);
            }
        };
        let mut metadata = metadata;
        metadata.limit(METADATA_CACHE_BYTES_DEFAULT);
        metadata.catalog.refresh_all_owed();
        let ledger = Ledger::new(
            metadata,
            unsaved.next,
            unsaved.tail,
            None,
            Arc::clone(&options.clock),
        );
        let (boot_id, session) = (boot_id_of(&options.ring), superblock.session + 1);
        let pool = Self {
            name: superblock.name.clone(),
            created: superblock.created,
            warnings,
            withheld,
            is_read_only: options.read_only,
            only_in_ring: unsaved.only_in_ring.len() as u64,
            forbids_overcommit: superblock.forbids_overcommit,
            ring: options.ring,
            checkpoints: Checkpoints::new(superblock),
            ledger,
            attached: Mutex::default(),
            changes: super::change::Changes::default(),
            control: AsyncMutex::new(()),
            checking: AsyncMutex::new(()),
            maintenance: Maintenance::new(options.clock.monotonic_ns()),
        };
        if pool.is_read_only {
            return Ok(pool);
        }
        let restate = |superblock: &mut Superblock| {
            superblock.session = session;
            superblock.boot_id = boot_id;
        };
        if !unsaved.records.is_empty() {
            tracing::info!(pool = %pool.name, records = unsaved.records.len(), "recovered what no checkpoint covered");
        }
        if pool.commit_unsaved(device, unsaved).await? {
            pool.checkpoints.restate(device, restate).await?;
        } else {
            let (checkpoints, ledger) = (&pool.checkpoints, &pool.ledger);
            checkpoints
                .write(ledger, device, Ending::GoOn, restate)
                .await?;
        }
        pool.checkpoints.take_room(device).await;
        if let RingPlace::File { path, .. } = &pool.ring {
            let owner = RingOwner {
                pool: pool.id(),
                boot_id,
                session,
            };
            let ring = Ring::create(path, owner)?;
            pool.ledger.freeze(|state| state.set_ring(Some(ring)));
        }
        Ok(pool)
    }

    /// Makes all that was replayed durable in the journal; false where only a checkpoint can: nothing may follow a change
    /// that was cut, or there is no room.
    async fn commit_unsaved<D: Device>(&self, device: &D, unsaved: Unsaved) -> Result<bool> {
        if unsaved.is_cut {
            return Ok(false);
        }
        if unsaved.only_in_ring.is_empty() {
            self.ledger.set_durable(unsaved.next);
            return Ok(true);
        }
        self.ledger.take_up(unsaved.only_in_ring);
        Ok(self.ledger.commit(device).await? == Committed::Done)
    }

    /// Gives the I/O of a volume, or of a snapshot (always read-only), to a frontend; refused while somebody has it.
    pub fn attach(
        self: &Arc<Self>,
        path: &crate::name::VolumePath,
        read_only: bool,
    ) -> Result<Arc<Attached>> {
        Attached::new(self, path, read_only || self.is_read_only)
    }
}

pub(super) fn boot_id_of(ring: &RingPlace) -> [u8; 16] {
    match ring {
        RingPlace::Nowhere => [0; 16],
        RingPlace::File { boot_id, .. } => *boot_id,
    }
}
