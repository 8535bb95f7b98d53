//! Creating, recognising and opening a pool; recovery is part of opening.
//!
//! Opening for writing: take the younger superblock and rewrite both under a new generation, which also flushes what
//! the device still held back; load the checkpoint; replay the journal, then the ring of a killed process; write a
//! checkpoint if there was anything to replay; start a new session with an empty ring. Nothing is served before that.

use super::maintain::Maintenance;
use super::{Attached, Pool};
use crate::checkpoint::{Checkpoints, Ending, load, read_superblocks, write_superblocks};
use crate::clock::Clock;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::counts::IndexEntry;
use crate::format::journal::{Framed, decode_framed};
use crate::format::layout::{TOP_ENTRIES, journal, usable_blocks};
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::journal::{Ledger, Ring, RingOwner, Tail, drop_cut_change, read_journal};
use crate::limits::{POOL_BLOCKS_MAX, POOL_BLOCKS_MIN};
use crate::metadata::Metadata;
use crate::name::Name;
use crate::units::{BLOCK_BYTES, Extent, Generation, PoolId, Seq, Timestamp};
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

/// What a checkpoint does not cover.
pub(super) struct Unsaved {
    records: Vec<Record>,
    first: Seq,
    next: Seq,
    tail: Tail,
}

impl Pool {
    /// Writes an empty pool; the device's content is gone.
    pub async fn create<D: Device>(device: &D, options: CreateOptions) -> Result<()> {
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
            name: options.name,
            created: options.created,
            blocks,
            generation: Generation(1),
            session: 0,
            is_clean: true,
            boot_id: [0; 16],
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
        let (metadata, unsaved) =
            load_current(device, &superblock, was_clean, &options.ring, &mut warnings).await?;
        let has_unsaved = unsaved.next > superblock.seq;
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
            is_read_only: options.read_only,
            ring: options.ring,
            checkpoints: Checkpoints::new(superblock),
            ledger,
            attached: parking_lot::Mutex::default(),
            control: async_lock::Mutex::new(()),
            maintenance: Maintenance::new(options.clock.monotonic_ns()),
        };
        if pool.is_read_only {
            return Ok(pool);
        }
        let restate = |superblock: &mut Superblock| {
            superblock.session = session;
            superblock.boot_id = boot_id;
        };
        if has_unsaved {
            let (checkpoints, ledger) = (&pool.checkpoints, &pool.ledger);
            checkpoints
                .write(ledger, device, Ending::GoOn, restate)
                .await?;
            tracing::info!(pool = %pool.name, records = unsaved.records.len(), "recovered what no checkpoint covered");
        } else {
            pool.checkpoints.restate(device, restate).await?;
        }
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

    /// Gives the I/O of a volume, or of a snapshot (always read-only), to a frontend; refused while somebody has it.
    pub fn attach(
        self: &Arc<Self>,
        path: &crate::name::VolumePath,
        read_only: bool,
    ) -> Result<Arc<Attached>> {
        Attached::new(self, path, read_only || self.is_read_only)
    }
}

fn boot_id_of(ring: &RingPlace) -> [u8; 16] {
    match ring {
        RingPlace::Nowhere => [0; 16],
        RingPlace::File { boot_id, .. } => *boot_id,
    }
}

/// The checkpoint with everything applied that it does not cover.
pub(super) async fn load_current<D: Device>(
    device: &D,
    superblock: &Superblock,
    was_clean: bool,
    ring: &RingPlace,
    warnings: &mut Vec<String>,
) -> Result<(Metadata, Unsaved)> {
    let unsaved = read_unsaved(device, superblock, was_clean, ring, warnings).await?;
    let mut metadata = load(device, superblock).await?;
    replay(device, &mut metadata, &unsaved).await?;
    Ok((metadata, unsaved))
}

/// The records of the journal, then those that only the ring has.
async fn read_unsaved<D: Device>(
    device: &D,
    superblock: &Superblock,
    was_clean: bool,
    place: &RingPlace,
    warnings: &mut Vec<String>,
) -> Result<Unsaved> {
    let read = read_journal(device, superblock, !was_clean).await?;
    let (mut framed, mut next) = (read.records, read.next_seq);
    if let RingPlace::File { path, boot_id } = place
        && superblock.boot_id == *boot_id
    {
        let owner = RingOwner {
            pool: superblock.id,
            boot_id: *boot_id,
            session: superblock.session,
        };
        match Ring::recover(path, owner)? {
            Some(records) => {
                for (seq, bytes) in records {
                    if seq < next {
                        continue;
                    }
                    if seq > next {
                        return Err(Error::corrupt(format!(
                            "{}: goes on at record {}, the journal ends before record {}",
                            path.display(),
                            seq.0,
                            next.0
                        )));
                    }
                    framed.push(decode_framed(&bytes)?);
                    next = next.next();
                }
            }
            None if superblock.session > 0 && !was_clean => warnings.push(format!(
                "{}: the shared ring of the last opening is not there; writes that it alone held are lost",
                path.display()
            )),
            None => {}
        }
    }
    drop_cut_change(&mut framed);
    Ok(Unsaved {
        records: framed
            .into_iter()
            .map(|Framed { record, .. }| record)
            .collect(),
        first: superblock.seq,
        next,
        tail: read.tail,
    })
}

/// Applies what the checkpoint does not cover.
async fn replay<D: Device>(device: &D, metadata: &mut Metadata, unsaved: &Unsaved) -> Result<()> {
    // Blocks that the pool gained are named by the records behind.
    for record in &unsaved.records {
        if let Record::Grow { .. } = record {
            metadata
                .with_supply(device, |metadata| metadata.replay(record, unsaved.first))
                .await?;
        }
    }
    // Blocks that the journal maps were taken when it was written: pages that replay makes must not get them.
    for record in &unsaved.records {
        if let Record::Map { pba, count, .. } = record {
            let extent = Extent::new(*pba, *count);
            metadata
                .with_supply(device, |metadata| metadata.space.claim(extent))
                .await?;
        }
    }
    let mut seq = unsaved.first;
    for record in &unsaved.records {
        metadata
            .with_supply(device, |metadata| metadata.replay(record, seq))
            .await?;
        seq = seq.next();
    }
    Ok(())
}
