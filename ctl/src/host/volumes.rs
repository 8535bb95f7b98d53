//! Changing volumes and the pool itself.

use super::{Host, whole};
use crate::claim::Claim;
use crate::exit_code::one_line;
use crate::protocol::{Judged, Pruned, Reply, Resized};
use crate::retention::{self, Policy, Rule};
use crate::udev;
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::pool::OutlineEntry;
use blockfork::ublk;
use blockfork::units::{BLOCK_BYTES, Timestamp};
use futures_lite::future::block_on;
use tracing::warn;

impl Host {
    pub(super) fn remove(
        &self,
        targets: &[VolumePath],
        recursive: bool,
        dry_run: bool,
    ) -> Result<Reply> {
        let removal = block_on(self.pool.remove(&self.device, targets, recursive, dry_run))?;
        if !dry_run {
            self.note_removed();
        }
        Ok(Reply::Removal(removal))
    }

    /// Removes the snapshots of a volume that nothing keeps, all together.
    pub(super) fn prune(&self, volume: &Name, policy: Policy, dry_run: bool) -> Result<Pruned> {
        if !policy.keeps_something() {
            // To remove all snapshots takes an `rm` that says so.
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{}/{volume}: no rule keeps anything", self.name),
            ));
        }
        let found = self.pool.snapshots_of(volume)?;
        let created: Vec<Timestamp> = found.iter().map(|entry| entry.created).collect();
        let now = SystemClock::new().now();
        let kept = retention::kept_by(policy, &created, now);
        let judged = |(entry, rules): (OutlineEntry, Vec<Rule>)| Judged {
            attached: self.is_attached(&entry.path),
            in_future: retention::is_in_future(entry.created, now),
            path: entry.path,
            created: entry.created,
            rules,
            holds: entry.holds,
        };
        let snapshots: Vec<Judged> = found.into_iter().zip(kept).map(judged).collect();
        let goes = snapshots.iter().filter(|judged| !judged.is_kept());
        let goes: Vec<VolumePath> = goes.map(|judged| judged.path.clone()).collect();
        let removal = block_on(self.pool.remove(&self.device, &goes, false, dry_run))?;
        if !dry_run {
            self.note_removed();
        }
        Ok(Pruned {
            snapshots,
            freed_bytes: removal.freed_bytes,
        })
    }

    fn is_attached(&self, path: &VolumePath) -> bool {
        let devices = self.devices();
        devices.find(path).is_some() || devices.exports().find(path).is_some()
    }

    pub(super) fn rename(&self, from: &VolumePath, to: &VolumePath) -> Result<Reply> {
        block_on(self.pool.rename(&self.device, from, to)).map(|()| Reply::Done)
    }

    pub(super) fn resize(&self, volume: &Name, bytes: u64, allow_shrink: bool) -> Result<Reply> {
        block_on(self.pool.resize(&self.device, volume, bytes, allow_shrink))?;
        Ok(Reply::Resized(self.resize_device(&whole(volume), bytes)))
    }

    /// Gives the device of a volume the size that the volume has already. A device that stays behind is no reason to say
    /// that the command failed.
    fn resize_device(&self, path: &VolumePath, bytes: u64) -> Resized {
        let (node, served) = {
            let devices = self.devices();
            match (devices.find(path), devices.exports().find(path)) {
                (Some(slot), _) => (slot.entry.node(), slot.served().cloned()),
                (None, Some(_)) => {
                    return Resized::Later(
                        "clients that are connected over NBD keep the old one".to_owned(),
                    );
                }
                (None, None) => return Resized::Unattached,
            }
        };
        let at_next_attach = |why: &str| {
            let why = format!("{why}; {node} follows at the next attach");
            warn!(volume = %path, "{why}");
            Resized::Later(why)
        };
        match served.map(|served| served.update_size(bytes)) {
            Some(Ok(true)) => Resized::Online,
            Some(Ok(false)) => at_next_attach("this kernel cannot resize a device in use"),
            Some(Err(e)) => at_next_attach(&one_line(&e)),
            None => Resized::Later(format!(
                "{node} follows when a daemon serves it again, `ublkctl recover {}`",
                self.name
            )),
        }
    }

    pub(super) fn rollback(&self, snapshot: &VolumePath) -> Result<Reply> {
        let path = snapshot.origin();
        let device = {
            let devices = self.devices();
            let slot = devices.find(&path);
            slot.and_then(|slot| Some((slot.entry.clone(), slot.served()?.clone())))
        };
        let Some((entry, served)) = device else {
            return block_on(self.pool.rollback(&self.device, snapshot)).map(|()| Reply::Done);
        };
        let mut claim = self.sealed(&entry, "roll back")?;
        // Dirty pages of before belong to the state of before, and must not be written after the rollback. Who uses a page
        // that cannot be dropped would go on reading it.
        claim.flush()?;
        claim.drop_cached_pages()?;
        let size_before = served.attached().bytes();
        block_on(self.pool.rollback(&self.device, snapshot))?;
        let shown = show_rolled_back(&served, &mut claim, size_before);
        shown.and_then(|()| claim.release()).map_err(|e| {
            let said = format!("{}/{path}: rolled back, but {}", self.name, one_line(&e));
            Error::with(e.kind(), said)
        })?;
        Ok(Reply::Done)
    }

    pub(super) fn grow(&self, bytes: u64) -> Result<Reply> {
        self.growable(bytes)?;
        self.device.file().extend(bytes)?;
        block_on(self.pool.grow(&self.device, bytes / BLOCK_BYTES)).map(|()| Reply::Done)
    }
}

/// Makes the kernel see what a volume holds after a rollback: its bytes, its size, its partitions.
fn show_rolled_back(served: &ublk::Served, claim: &mut Claim, size_before: u64) -> Result<()> {
    claim.drop_cached_pages()?;
    // udev looks at the device after each of the next steps.
    claim.unseal()?;
    let size = served.attached().bytes();
    if size != size_before && !served.update_size(size)? {
        return Err(Error::with(
            ErrorKind::Unsupported,
            format!(
                "the kernel cannot give {} the size of then; detach and attach it",
                served.path().display()
            ),
        ));
    }
    claim.reread_partitions()?;
    udev::announce_change(served.dev_id());
    Ok(())
}
