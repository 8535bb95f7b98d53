//! What would refuse a request, seen before anything is touched.

use super::{Host, whole};
use crate::protocol::Request;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::POOL_BLOCKS_MAX;
use blockfork::name::{Name, VolumePath};
use blockfork::units::BLOCK_BYTES;
use std::collections::BTreeSet;

impl Host {
    /// The refusal of a request that would fail, as far as that can be seen without changing anything. The pool may be
    /// open read-only: without a daemon, a mistake shall not even touch the pool's file.
    pub(crate) fn preflight(&self, request: &Request) -> Result<()> {
        self.refuse_attached(request)?;
        match request {
            Request::Create {
                volume,
                options,
                limits,
            } => {
                self.absent(&whole(volume))?;
                self.pool.check_commit(volume, options.bytes)?;
                self.pool.check_limits(volume, options.bytes, *limits)
            }
            Request::Remove {
                targets, recursive, ..
            } => self.pool.check_removable(targets, *recursive),
            Request::SetLimits { volume, changes } => {
                self.pool.check_limit_changes(volume, changes)
            }
            Request::Rename { from, to } => self.present(from).and_then(|_| self.absent(to)),
            Request::Resize {
                volume,
                bytes,
                allow_shrink,
            } => self.resizable(volume, *bytes, *allow_shrink),
            Request::Snapshot { targets } => {
                self.distinct(targets)?;
                targets.iter().try_for_each(|target| {
                    self.present(&whole(&target.volume))
                        .and_then(|_| self.absent(target))
                })
            }
            Request::Clone { snapshot, volume } => {
                let (bytes, _) = self.present(snapshot)?;
                self.absent(&whole(volume))?;
                self.pool.check_commit(volume, bytes)
            }
            Request::Rollback { snapshot } => self.present(snapshot).map(drop),
            Request::Hold { tag, snapshots } => self.pool.check_hold(tag, snapshots),
            Request::Release { tag, snapshots } => self.pool.check_release(tag, snapshots),
            Request::Prune { volume, policy, .. } => self.prune(volume, *policy, true).map(drop),
            Request::Grow { bytes } => self.growable(*bytes),
            Request::Status
            | Request::Stats
            | Request::List
            | Request::Devices
            | Request::Diff { .. }
            | Request::Check
            | Request::Outline
            | Request::SetMarks { .. }
            | Request::Watch
            | Request::Attach { .. }
            | Request::ServeNbd { .. }
            | Request::Detach { .. }
            | Request::Recover
            | Request::Stop
            | Request::Backlog { .. } => Ok(()),
        }
    }

    /// The size and the sector of what must be there.
    fn present(&self, path: &VolumePath) -> Result<(u64, u32)> {
        let attached = self.pool.attach(path, true)?;
        let found = (attached.bytes(), attached.sector_bytes());
        attached.detach();
        Ok(found)
    }

    fn absent(&self, path: &VolumePath) -> Result<()> {
        match self.present(path) {
            Ok(_) => Err(Error::with(
                ErrorKind::AlreadyExists,
                format!("{}/{path}: exists already", self.name),
            )),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn distinct(&self, targets: &[VolumePath]) -> Result<()> {
        let mut seen = BTreeSet::new();
        let Some(path) = targets.iter().find(|path| !seen.insert(*path)) else {
            return Ok(());
        };
        Err(Error::with(
            ErrorKind::Invalid,
            format!("{}/{path}: is named twice", self.name),
        ))
    }

    pub(super) fn resizable(&self, volume: &Name, bytes: u64, allow_shrink: bool) -> Result<()> {
        let (now, sector_bytes) = self.present(&whole(volume))?;
        let fact = if !bytes.is_multiple_of(u64::from(sector_bytes)) {
            format!("{bytes} bytes are not a multiple of its sector size, {sector_bytes}")
        } else if bytes < now && !allow_shrink {
            format!(
                "holds {now} bytes; what lies beyond {bytes} would be lost, --allow-shrink allows that"
            )
        } else {
            return if bytes > now {
                self.pool.check_commit(volume, bytes)
            } else {
                Ok(())
            };
        };
        Err(Error::with(
            ErrorKind::Invalid,
            format!("{}/{volume}: {fact}", self.name),
        ))
    }

    pub(super) fn growable(&self, bytes: u64) -> Result<()> {
        let now = self.pool.status().size_bytes;
        // Before the file is extended, which some file systems do to any length.
        if bytes / BLOCK_BYTES > POOL_BLOCKS_MAX {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{}: a pool has at most 8 PiB", self.name),
            ));
        }
        if bytes > now {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "{}: has {now} bytes already; a pool only grows, give more than that",
                self.name
            ),
        ))
    }
}
