//! Repair: what needs no guessing is mended, through a checkpoint like any other, so that a crash at any moment leaves
//! what was there before or what is there after.

use super::Pool;
use super::mend::{Mended, Purpose, mend};
use super::open::{OpenOptions, RingPlace, boot_id_of};
use super::report::{RepairPlan, RepairStep};
use crate::checkpoint::{Checkpoints, Ending, read_superblocks, write_superblocks};
use crate::device::Device;
use crate::error::Result;
use crate::format::superblock::Superblock;
use crate::journal::Ledger;
use std::sync::Arc;

/// What a repair may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairOptions {
    /// Where the journal is damaged: go back to the state before that, and give up what was written later.
    pub discards_journal: bool,
}

impl Pool {
    /// What [`Pool::repair`] would do. Reads all metadata and changes nothing. Fails where no superblock is whole, or
    /// the journal cannot be read. `progress` as in [`Pool::check`].
    pub async fn plan_repair<D: Device>(
        device: &D,
        options: &OpenOptions,
        repair: RepairOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RepairPlan> {
        let found = read_superblocks(device, options.device_blocks).await?;
        let mended = look(device, &found.superblock, options, repair, progress).await?;
        Ok(plan(found.warnings, mended.steps))
    }

    /// Mends what needs no guessing, and closes the pool. Nobody has it open. What is done is what
    /// [`Pool::plan_repair`] said.
    pub async fn repair<D: Device>(
        device: &D,
        options: OpenOptions,
        repair: RepairOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RepairPlan> {
        let found = read_superblocks(device, options.device_blocks).await?;
        let mut superblock = found.superblock;
        let mended = look(device, &superblock, &options, repair, progress).await?;
        let needs_checkpoint = mended.can_write && mended.steps.iter().any(|step| step.mends);
        let plan = plan(found.warnings, mended.steps);
        if !plan.mends_something() {
            return Ok(plan);
        }
        let flush = async || device.flush().await;
        if !needs_checkpoint {
            write_superblocks(device, &superblock, flush).await?;
            return Ok(plan);
        }
        // As at any opening: what an interrupted attempt left carries a number that nothing names.
        let was_clean = superblock.is_clean;
        superblock.generation = superblock.generation.next();
        superblock.is_clean = false;
        write_superblocks(device, &superblock, flush).await?;
        superblock.is_clean = was_clean;
        let mended = look(device, &superblock, &options, repair, progress).await?;
        write(device, superblock, mended, &options).await?;
        if let RingPlace::File { path, .. } = &options.ring
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(%error, "the shared ring was not removed");
        }
        Ok(plan)
    }
}

async fn look<D: Device>(
    device: &D,
    superblock: &Superblock,
    options: &OpenOptions,
    repair: RepairOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Mended> {
    let purpose = Purpose::Write {
        discards_journal: repair.discards_journal,
    };
    let (was_clean, ring) = (superblock.is_clean, &options.ring);
    mend(device, superblock, was_clean, ring, purpose, progress).await
}

fn plan(superblock_faults: Vec<String>, steps: Vec<RepairStep>) -> RepairPlan {
    let copies = superblock_faults.into_iter().map(|fault| RepairStep {
        what: fault,
        place: "superblock".to_owned(),
        action: "write it again from the other copy".to_owned(),
        mends: true,
    });
    RepairPlan {
        steps: copies.chain(steps).collect(),
    }
}

/// Writes a checkpoint of what was mended, and closes the pool with it.
async fn write<D: Device>(
    device: &D,
    superblock: Superblock,
    mended: Mended,
    options: &OpenOptions,
) -> Result<()> {
    let (boot_id, session) = (boot_id_of(&options.ring), superblock.session + 1);
    let ledger = Ledger::new(
        mended.metadata,
        mended.unsaved.next,
        mended.unsaved.tail,
        None,
        Arc::clone(&options.clock),
    );
    let restate = |superblock: &mut Superblock| {
        superblock.session = session;
        superblock.boot_id = boot_id;
    };
    Checkpoints::new(superblock)
        .write(&ledger, device, Ending::Close, restate)
        .await
}
