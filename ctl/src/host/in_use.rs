//! What a request works on, and what refuses it because it is attached. All of it stands here, so that a device that is
//! served, one that waits for a daemon and an export over NBD are in the way of the same requests.

use super::turns::Scope;
use super::{Host, whole};
use crate::devices::{Service, Slot};
use crate::exit_code::one_line;
use crate::protocol::Request;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;

/// Which devices are in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blocks {
    /// Any.
    All,
    /// Those that this daemon does not serve: nobody could tell their users.
    Waiting,
}

impl Host {
    /// What a request works on, so that no other request of the same volumes runs beside it, and what its command is called.
    /// Requests that take no turn either change no volume that could be attached, or take it for themselves.
    pub(super) fn scopes(request: &Request) -> Option<(&'static str, Vec<Scope>)> {
        let found = match request {
            // Without a change, a walk over the maps may take as long as it likes.
            Request::Remove { dry_run: true, .. } | Request::Prune { dry_run: true, .. } => {
                return None;
            }
            Request::Remove {
                targets, recursive, ..
            } => {
                let scope = |target: &VolumePath| {
                    if *recursive {
                        Scope::below(target)
                    } else {
                        Scope::One(target.clone())
                    }
                };
                ("rm", targets.iter().map(scope).collect())
            }
            Request::Prune { volume, .. } => ("prune", vec![Scope::Whole(volume.clone())]),
            // A volume's new name is that of its snapshots too.
            Request::Rename { from, to } => ("rename", vec![Scope::below(from), Scope::below(to)]),
            Request::Resize { volume, .. } => ("resize", vec![Scope::One(whole(volume))]),
            Request::Rollback { snapshot } => ("rollback", vec![Scope::One(snapshot.origin())]),
            Request::Attach { path, .. } => ("attach", vec![Scope::One(path.clone())]),
            Request::ServeNbd { path, .. } => ("serve-nbd", vec![Scope::One(path.clone())]),
            Request::Status
            | Request::Stats
            | Request::List
            | Request::Devices
            | Request::Recover
            | Request::Diff { .. }
            | Request::Check
            | Request::Outline
            | Request::SetMarks { .. }
            | Request::Watch
            | Request::Create { .. }
            | Request::SetLimits { .. }
            | Request::Snapshot { .. }
            | Request::Clone { .. }
            | Request::Hold { .. }
            | Request::Release { .. }
            | Request::Grow { .. }
            | Request::Detach { .. }
            | Request::Stop
            | Request::Backlog { .. } => return None,
        };
        Some(found)
    }

    /// Refuses a request that must not be carried out while something is attached, with all that is in its way.
    pub(super) fn refuse_attached(&self, request: &Request) -> Result<()> {
        match request {
            Request::Remove {
                targets, recursive, ..
            } => {
                let goes = |path: &VolumePath| {
                    targets
                        .iter()
                        .any(|target| target == path || (*recursive && *target == path.origin()))
                };
                self.refuse("remove", Blocks::All, goes)
                    .map_err(|e| self.with_holds(&e, goes))
            }
            // A snapshot's path has its volume's name in it.
            Request::Rename { from, .. } => self.refuse("rename", Blocks::All, |path| {
                path == from || path.origin() == *from
            }),
            Request::Resize {
                volume,
                bytes,
                allow_shrink,
            } => {
                let volume = whole(volume);
                let now = self.pool.bytes_of(&volume)?;
                // A shrink that nobody has allowed is refused for that, by the engine.
                if *bytes >= now || !allow_shrink {
                    return Ok(());
                }
                self.refuse("shrink", Blocks::All, |path| *path == volume)
            }
            Request::Rollback { snapshot } => {
                let volume = snapshot.origin();
                self.refuse("roll back", Blocks::Waiting, |path| *path == volume)
            }
            Request::Stop => self.refuse("close the pool", Blocks::All, |_| true),
            // Those who take what is attached for themselves, those that leave it in place, and those that change nothing
            // of it.
            Request::Attach { .. }
            | Request::ServeNbd { .. }
            | Request::Detach { .. }
            | Request::Recover
            | Request::Prune { .. }
            | Request::Status
            | Request::Stats
            | Request::List
            | Request::Devices
            | Request::Diff { .. }
            | Request::Check
            | Request::Outline
            | Request::SetMarks { .. }
            | Request::Watch
            | Request::Create { .. }
            | Request::SetLimits { .. }
            | Request::Snapshot { .. }
            | Request::Clone { .. }
            | Request::Hold { .. }
            | Request::Release { .. }
            | Request::Grow { .. }
            | Request::Backlog { .. } => Ok(()),
        }
    }

    /// An error where something that is meant is attached: all of it, and the ways out.
    fn refuse(
        &self,
        action: &str,
        blocks: Blocks,
        is_meant: impl Fn(&VolumePath) -> bool,
    ) -> Result<()> {
        let devices = self.devices();
        let is_in_the_way = |slot: &&Slot| {
            let is_served = matches!(slot.service, Service::Served(_));
            is_meant(&slot.entry.path) && (blocks == Blocks::All || !is_served)
        };
        let refused = [
            devices.refuse(action, devices.slots().iter().filter(is_in_the_way)),
            devices.exports().refuse(&self.name, action, &is_meant),
        ];
        let refused = refused.into_iter().filter_map(Result::err);
        let refused: Vec<String> = refused.map(|e| one_line(&e)).collect();
        if refused.is_empty() {
            return Ok(());
        }
        Err(Error::with(ErrorKind::Busy, refused.join("; ")))
    }

    /// The same refusal with the holds that are in the way too. Where only holds are, the engine names them.
    fn with_holds(&self, refusal: &Error, goes: impl Fn(&VolumePath) -> bool) -> Error {
        let mut refused = vec![one_line(refusal)];
        for entry in self.pool.outline() {
            if goes(&entry.path) {
                let held = |tag| format!("{}/{} is held by {tag}", self.name, entry.path);
                refused.extend(entry.holds.iter().map(held));
            }
        }
        Error::with(ErrorKind::Busy, refused.join("; "))
    }
}
