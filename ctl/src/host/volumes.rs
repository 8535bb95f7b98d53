//! Changing volumes and the pool itself.

use super::turns::{Scope, Turn};
use super::{Host, whole};
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
        // A dry run walks the maps of all that would go; nobody waits for that.
        let turn = || self.removal_turn(targets, recursive);
        let _turn = (!dry_run).then(turn).transpose()?;
        self.unused(targets, recursive)?;
        let removal = block_on(self.pool.remove(&self.device, targets, recursive, dry_run))?;
        if !dry_run {
            self.note_removed();
        }
        Ok(Reply::Removal(removal))
    }

    fn removal_turn(&self, targets: &[VolumePath], recursive: bool) -> Result<Turn<'_>> {
        let scope = |target: &VolumePath| {
            if recursive {
                Scope::below(target)
            } else {
                Scope::One(target.clone())
            }
        };
        self.turn("rm", targets.iter().map(scope))
    }

    /// Refuses where a device serves something of what a removal names.
    pub(super) fn unused(&self, targets: &[VolumePath], recursive: bool) -> Result<()> {
        let devices = self.devices();
        let goes = |path: &VolumePath| {
            targets.iter().any(|target| {
                target == path
                    || (recursive && target.snapshot.is_none() && target.volume == path.volume)
            })
        };
        let slots = devices.slots().iter();
        let refused = [
            devices.refuse("remove", slots.filter(|slot| goes(&slot.entry.path))),
            devices.exports().refuse(&self.name, "remove", goes),
        ];
        let refused = refused.into_iter().filter_map(Result::err);
        let mut refused: Vec<String> = refused.map(|e| one_line(&e)).collect();
        if !refused.is_empty() {
            // Where only holds are in the way, the engine names them.
            let outline = self.pool.outline();
            for entry in outline.iter().filter(|entry| goes(&entry.path)) {
                let held = |tag| format!("{}/{} is held by {tag}", self.name, entry.path);
                refused.extend(entry.holds.iter().map(held));
            }
            return Err(Error::with(ErrorKind::Busy, refused.join("; ")));
        }
        Ok(())
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
        let scope = [Scope::Whole(volume.clone())];
        let _turn = (!dry_run).then(|| self.turn("prune", scope)).transpose()?;
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
        let _turn = self.turn("rename", [from, to].map(Scope::below))?;
        let devices = self.devices();
        // A volume's new name is that of its snapshots too.
        let goes = |path: &VolumePath| {
            path == from || (from.snapshot.is_none() && path.volume == from.volume)
        };
        devices.refuse(
            "rename",
            devices.slots().iter().filter(|slot| goes(&slot.entry.path)),
        )?;
        devices.exports().refuse(&self.name, "rename", goes)?;
        drop(devices);
        block_on(self.pool.rename(&self.device, from, to)).map(|()| Reply::Done)
    }

    pub(super) fn resize(&self, volume: &Name, bytes: u64, allow_shrink: bool) -> Result<Reply> {
        let path = whole(volume);
        let _turn = self.turn("resize", [Scope::One(path.clone())])?;
        block_on(self.pool.resize(&self.device, volume, bytes, allow_shrink))?;
        let (entry, served) = {
            let devices = self.devices();
            let Some(slot) = devices.find(&path) else {
                let resized = match devices.exports().find(&path) {
                    // NBD has no way to tell a client that is connected.
                    Some(_) => Resized::AtNextAttach,
                    None => Resized::Unattached,
                };
                return Ok(Reply::Resized(resized));
            };
            (slot.entry.clone(), slot.served().cloned())
        };
        // The volume has its new size already; a device that stays behind is no reason to say that it failed.
        let is_online = match &served {
            Some(served) => served.update_size(bytes).unwrap_or_else(|e| {
                warn!(device = %entry.node(), "cannot be resized: {}", one_line(&e));
                false
            }),
            None => false,
        };
        Ok(Reply::Resized(if is_online {
            Resized::Online
        } else {
            Resized::AtNextAttach
        }))
    }

    pub(super) fn rollback(&self, snapshot: &VolumePath) -> Result<Reply> {
        let path = whole(&snapshot.volume);
        let _turn = self.turn("rollback", [Scope::One(path.clone())])?;
        let device = {
            let devices = self.devices();
            let is_meant = |other: &VolumePath| *other == path;
            devices
                .exports()
                .refuse(&self.name, "roll back", is_meant)?;
            match devices.find(&path) {
                None => None,
                Some(slot) => {
                    let Some(served) = slot.served() else {
                        devices.refuse("roll back", std::iter::once(slot))?;
                        return Err(Error::new(ErrorKind::Busy));
                    };
                    Some((slot.entry.clone(), served.clone()))
                }
            }
        };
        let Some((entry, served)) = device else {
            return block_on(self.pool.rollback(&self.device, snapshot)).map(|()| Reply::Done);
        };
        ublk::refuse_stuck(entry.state.dev_id)?;
        let claim = self.claim(&entry, "roll back")?;
        let size_before = served.attached().bytes();
        block_on(self.pool.rollback(&self.device, snapshot))?;
        claim.drop_cached_pages()?;
        udev::announce_change(entry.state.dev_id);
        let size = served.attached().bytes();
        if size != size_before && !served.update_size(size)? {
            return Err(Error::with(
                ErrorKind::Unsupported,
                format!(
                    "{}/{path}: rolled back, but the kernel cannot give {} the size of then; detach and attach it",
                    self.name,
                    entry.node()
                ),
            ));
        }
        Ok(Reply::Done)
    }

    pub(super) fn grow(&self, bytes: u64) -> Result<Reply> {
        self.growable(bytes)?;
        self.device.file().extend(bytes)?;
        block_on(self.pool.grow(&self.device, bytes / BLOCK_BYTES)).map(|()| Reply::Done)
    }
}
