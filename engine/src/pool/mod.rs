//! The public face of the engine: pools, their volumes, snapshots and clones, and the I/O of what is attached.
//!
//! A `Pool` is shared by all threads that serve it; each passes the device as it reaches it. Everything that changes
//! the pool is durable when it returns, but for the I/O of attached volumes, which a flush makes durable.

mod as_of;
mod attached;
mod change;
mod check;
mod full;
mod holds;
mod identity;
mod limits;
mod list;
mod maintain;
mod mend;
mod open;
mod own;
mod pace;
mod reach;
mod recovery;
mod repair;
mod report;
mod snapshots;
#[cfg(test)]
mod tests;
mod volumes;

pub use crate::datapath::Run;
pub use crate::format::host::{Host, HostName};
pub use attached::{Attached, Direct, Transfer};
pub(crate) use full::{LOOK_NS, Patience};
pub use identity::{Identity, Unclosed};
pub use open::{CreateOptions, OpenOptions, PoolLabel, RingPlace};
pub use repair::RepairOptions;
pub use report::*;

use crate::checkpoint::{Checkpoints, Ending};
use crate::datapath::{self, Counters, Io};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::usable_blocks;
use crate::format::record::Record;
use crate::journal::{Draft, Ledger};
use crate::metadata::Metadata;
use crate::name::Name;
use crate::space::Fault;
use crate::sync::{AsyncMutex, Mutex};
use crate::units::{PoolId, Timestamp, VolumeId};
use attached::AttachedVolume;
use change::{Change, Changes};
use maintain::Maintenance;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// An open pool, shared by all threads that serve it.
#[derive(Debug)]
pub struct Pool {
    name: Name,
    created: Timestamp,
    warnings: Vec<String>,
    /// Volumes that may lack acknowledged writes: nobody gets to read them.
    withheld: BTreeSet<VolumeId>,
    is_read_only: bool,
    /// Records that the ring had and the journal had not, when the pool was opened.
    only_in_ring: u64,
    forbids_overcommit: bool,
    ring: RingPlace,
    ledger: Ledger,
    checkpoints: Checkpoints,
    attached: Mutex<BTreeMap<VolumeId, Arc<AttachedVolume>>>,
    /// What a command decides over by whether it is attached: nobody attaches it meanwhile.
    changes: Changes,
    /// Commands that change the catalog go one at a time.
    control: AsyncMutex<()>,
    /// Checks go one at a time, beside everything else.
    checking: AsyncMutex<()>,
    maintenance: Maintenance,
}

impl Pool {
    /// The pool's name.
    pub fn name(&self) -> Name {
        self.name.clone()
    }

    /// The pool's identity.
    pub fn id(&self) -> PoolId {
        self.ledger.pool
    }

    /// Faults found on the way that did not stop anything.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether nothing of it can be changed.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// How many records the ring of a killed process had which the journal had not, when the pool was opened. A pool that is
    /// open read-only has them in memory alone: they go where the ring goes.
    pub fn records_only_in_ring(&self) -> u64 {
        self.only_in_ring
    }

    /// Makes everything durable and marks the pool closed. Fails if something is attached.
    pub async fn close<D: Device>(&self, device: &D) -> Result<()> {
        let all = |metadata: &Metadata| {
            let entries = metadata.catalog.entries();
            entries.into_iter().map(|entry| entry.id).collect()
        };
        let _alone = self.turn(all).await;
        let all = self.ledger.look(all);
        let _change = Change::announce(self, all);
        if let Some(volume) = self.attached.lock().values().next() {
            return Err(Error::with(
                ErrorKind::Busy,
                format!(
                    "{}/{}: is attached; detach it first",
                    self.name,
                    self.path_of(volume.id)?
                ),
            ));
        }
        if self.is_read_only {
            return Ok(());
        }
        self.checkpoints
            .write(&self.ledger, device, Ending::Close, |_| {})
            .await?;
        if let RingPlace::File { path, .. } = &self.ring {
            // A ring of a closed pool is stale by its session; removing it only tidies up.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::debug!(%error, "the shared ring was not removed");
            }
        }
        Ok(())
    }

    /// Takes the device's blocks up to `blocks` into use; it has them already, durably or not.
    pub async fn grow<D: Device>(&self, device: &D, blocks: u64) -> Result<()> {
        self.check_writable()?;
        let _alone = self.control.lock().await;
        let blocks = usable_blocks(blocks);
        let before = self.ledger.look(|metadata| metadata.space.blocks());
        if blocks < before {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!(
                    "{}: has {before} blocks already; a pool cannot shrink",
                    self.name
                ),
            ));
        }
        if blocks > crate::limits::POOL_BLOCKS_MAX {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{}: a pool has at most 8 PiB", self.name),
            ));
        }
        if blocks > before {
            // The device's new size is durable before a record counts on it. A flush that fails here is as final as
            // any other: it may have taken acknowledged writes with it.
            self.ledger.flush_device(device).await?;
            self.change(device, |draft| draft.apply(&Record::Grow { blocks }))
                .await?;
        }
        self.checkpoint(device).await
    }

    /// Makes the file of the shared ring anew if somebody removed it; whether that was so. Requests wait meanwhile, for as
    /// long as it takes to copy 16 MiB in memory.
    pub fn put_ring_back(&self) -> Result<bool> {
        let RingPlace::File { path, .. } = &self.ring else {
            return Ok(false);
        };
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !self.is_read_only => {
                self.ledger.freeze(|state| state.put_ring_back(path))?;
                Ok(true)
            }
            Ok(_) | Err(_) => Ok(false),
        }
    }

    /// Makes all acknowledged writes durable.
    pub async fn flush<D: Device>(&self, device: &D) -> Result<()> {
        datapath::flush(&self.ledger, &self.checkpoints, device).await
    }

    /// Writes a checkpoint.
    pub async fn checkpoint<D: Device>(&self, device: &D) -> Result<()> {
        self.check_writable()?;
        self.checkpoints
            .write(&self.ledger, device, Ending::GoOn, |_| {})
            .await
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only {
            return Err(Error::with(
                ErrorKind::ReadOnly,
                format!("{}: is open read-only", self.name),
            ));
        }
        self.ledger.check_poison()
    }

    /// Refuses what may lack acknowledged writes.
    fn check_withheld(&self, id: VolumeId, path: &crate::name::VolumePath) -> Result<()> {
        if self.withheld.contains(&id) {
            return Err(Error::corrupt(format!(
                "{}/{path}: acknowledged writes to it may be lost; see `ublkctl pool check {}`",
                self.name, self.name
            )));
        }
        Ok(())
    }

    /// Changes the catalog, and makes that durable.
    async fn change<D: Device, T>(
        &self,
        device: &D,
        change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<T> {
        self.change_much(device, 0, change).await
    }

    /// The same where the records may take `bytes` of the ring.
    async fn change_much<D: Device, T>(
        &self,
        device: &D,
        bytes: usize,
        mut change: impl FnMut(&mut Draft<'_>) -> Result<T, Fault>,
    ) -> Result<T> {
        self.check_writable()?;
        loop {
            let changed = self.ledger.change(device, bytes, &mut change).await?;
            self.flush(device).await?;
            if let Some(value) = changed {
                return Ok(value);
            }
        }
    }

    fn path_of(&self, id: VolumeId) -> Result<crate::name::VolumePath> {
        let path = self.ledger.look(|metadata| metadata.catalog.path(id));
        path.ok_or_else(|| {
            Error::with(
                ErrorKind::NotFound,
                format!("{}: volume number {} is gone", self.name, id.0),
            )
        })
    }

    fn io<'a, D>(
        &'a self,
        device: &'a D,
        volume: VolumeId,
        redirects_always: bool,
        counters: &'a Counters,
    ) -> Io<'a, D> {
        Io {
            ledger: &self.ledger,
            checkpoints: &self.checkpoints,
            device,
            volume,
            redirects_always,
            counters,
        }
    }
}
