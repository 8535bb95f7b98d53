//! Block devices: attaching, detaching, and taking them back after a kill.

use super::turns::Scope;
use super::{Host, Role};
use crate::claim::{self, Claim, Patience, Subject};
use crate::devices::{DeviceEntry, Service, Slot};
use crate::events::Event;
use crate::exit_code::one_line;
use crate::protocol::{DeviceRow, Reply, Selection};
use crate::udev::{self, Kind};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::pool::OnFull;
use blockfork::ublk;
use futures_lite::future::block_on;
use std::sync::Arc;
use tracing::{info, warn};

impl Host {
    pub(super) fn attach(
        &self,
        path: &VolumePath,
        options: &ublk::DeviceOptions,
        on_full: OnFull,
    ) -> Result<Reply> {
        self.refuse_second(path)?;
        self.refuse_write(path, options.read_only)?;
        let attached = self.pool.attach(path, options.read_only)?;
        attached.set_on_full(on_full);
        let announce = |state: ublk::DeviceState| {
            let entry = DeviceEntry {
                path: path.clone(),
                id: attached.id(),
                read_only: attached.is_read_only(),
                on_full,
                state,
            };
            // Before the kernel announces the device: udev and systemd act on that, and look for both.
            self.name_device(&entry);
            self.devices().add(Slot {
                entry,
                service: Service::Attaching,
                fault: None,
            })
        };
        let file = self.device.file().clone();
        let served = match ublk::Served::add(file, attached.clone(), options, announce) {
            Ok(served) => served,
            Err(e) => {
                attached.detach();
                self.forget_failed(path, &e);
                return Err(e);
            }
        };
        let row = self.serve(path, served)?;
        info!(volume = %path, device = %row.device, "attached");
        self.tell(&Event::DeviceAdded {
            name: format!("{}/{path}", self.name),
            device: row.device.clone(),
        });
        Ok(Reply::Devices(vec![row]))
    }

    /// Forgets a device that could not be attached, unless the kernel has it: then somebody may be using it.
    fn forget_failed(&self, path: &VolumePath, error: &Error) {
        let entry = self.devices().find(path).map(|slot| slot.entry.clone());
        let Some(entry) = entry else {
            return;
        };
        // The kernel is asked without the lock.
        let is_gone = entry.is_gone();
        let mut devices = self.devices();
        if is_gone {
            devices.take(path);
            devices.unlink(&entry);
            // A name too many does no harm: the kernel has no such device.
            if let Err(unsaved) = devices.save() {
                warn!(pool = %self.name, "{}", one_line(&unsaved));
            }
        } else if let Some(slot) = devices.find_mut(path) {
            slot.service = Service::Waiting;
            slot.fault = Some(one_line(error));
        }
    }

    /// From now on this daemon serves the device of a volume, and its partitions are there.
    fn serve(&self, path: &VolumePath, served: ublk::Served) -> Result<DeviceRow> {
        let dev_id = served.dev_id();
        let mut devices = self.devices();
        let Some(slot) = devices.find_mut(path) else {
            let message = format!("{}/{path}: is not among the devices", self.name);
            return Err(Error::with(ErrorKind::NotFound, message));
        };
        slot.service = Service::Served(Arc::new(served));
        slot.fault = None;
        let row = slot.row();
        drop(devices);
        await_partitions(dev_id);
        Ok(row)
    }

    /// Makes the link of a device, and tells udev's rules what it is.
    fn name_device(&self, entry: &DeviceEntry) {
        let path = &entry.path;
        let kind = match (&path.snapshot, self.pool.is_clone(path)) {
            (Some(_), _) => Kind::Snapshot,
            (None, Ok(false)) => Kind::Volume,
            // A clone gives way to others, which is right too for what cannot be found.
            (None, Ok(true) | Err(_)) => Kind::Clone,
        };
        udev::describe(entry.state.dev_id, &self.name, path, kind);
        self.devices().link(entry);
    }

    /// An error if this is attached already, or if nothing can be attached here.
    pub(super) fn refuse_second(&self, path: &VolumePath) -> Result<()> {
        let devices = self.devices();
        let fact = match (devices.find(path), devices.exports().find(path)) {
            (Some(slot), _) if !matches!(slot.service, Service::Waiting) => {
                format!("is attached already, as {}", slot.entry.node())
            }
            (Some(slot), _) => {
                return devices.refuse("attach it again", std::iter::once(slot));
            }
            (None, Some(exported)) => format!("is served over NBD already, as {}", exported.uri),
            (None, None) if self.role == Role::Command => {
                let fact = "only a daemon can attach";
                return Err(Error::with(ErrorKind::Unsupported, fact));
            }
            (None, None) => return Ok(()),
        };
        Err(Error::with(
            ErrorKind::Busy,
            format!("{}/{path}: {fact}", self.name),
        ))
    }

    /// An error if a volume is to be written to, and the medium of the pool takes no writes.
    pub(super) fn refuse_write(&self, path: &VolumePath, read_only: bool) -> Result<()> {
        let file = self.device.file();
        if file.is_writable() || read_only || path.snapshot.is_some() {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::ReadOnly,
            format!(
                "{}/{path}: cannot be written to, because {} is on a read-only medium; attach it with --read-only, or a snapshot of it",
                self.name,
                file.path().display()
            ),
        ))
    }

    /// Claims the devices of volumes, so that nobody has them and nobody can mount them. Waits for brief users. Its command
    /// has the turn of the volumes.
    fn claim(
        &self,
        entries: &[DeviceEntry],
        action: &str,
        patience: &Patience,
    ) -> Result<Vec<Option<Claim>>> {
        for entry in entries {
            ublk::refuse_stuck(entry.state.dev_id)?;
        }
        let subjects: Vec<Subject> = entries.iter().map(|entry| self.subject(entry)).collect();
        claim::claim(&subjects, action, patience)
    }

    /// Claims a device and makes sure that nobody gets it. Waits for brief users.
    pub(super) fn sealed(&self, entry: &DeviceEntry, action: &str) -> Result<Claim> {
        let patience = Patience::default();
        loop {
            let claims = self.claim(std::slice::from_ref(entry), action, &patience)?;
            let Some(mut claim) = claims.into_iter().next().flatten() else {
                let (name, path, node) = (&self.name, &entry.path, entry.node());
                let fact = format!("{name}/{path}: {node} is gone; detach and attach it");
                return Err(Error::with(ErrorKind::NotFound, fact));
            };
            match claim::seal(&mut claim, &self.subject(entry), action) {
                Ok(()) => return Ok(claim),
                Err(e) if e.kind() == ErrorKind::Busy && !patience.is_over() => claim.release()?,
                Err(e) => return Err(e),
            }
        }
    }

    fn subject(&self, entry: &DeviceEntry) -> Subject {
        Subject {
            name: format!("{}/{}", self.name, entry.path),
            dev_id: entry.state.dev_id,
        }
    }

    pub(super) fn detach(&self, selection: &Selection, force: bool) -> Result<Reply> {
        let paths: Vec<VolumePath> = match selection {
            Selection::All => {
                let devices = self.devices();
                let paths = devices.slots().iter().map(|slot| slot.entry.path.clone());
                paths.collect()
            }
            Selection::Paths(paths) => paths.clone(),
        };
        let scopes = paths.iter().cloned().map(Scope::One);
        let _turn = self.turn("detach", scopes.collect())?;
        let patience = Patience::default();
        let mut left = self.detachable(&paths, force)?;
        let mut rows = Vec::new();
        loop {
            let claims = self.claim(&left, "detach", &patience)?;
            let mut busy = None;
            let mut again = Vec::new();
            for (entry, claim) in left.into_iter().zip(claims) {
                match self.detach_one(&entry.path, claim) {
                    Ok(row) => rows.extend(row),
                    // Opened since the claim.
                    Err(e) if e.kind() == ErrorKind::Busy => {
                        busy = Some(e);
                        again.push(entry);
                    }
                    Err(e) => return Err(e),
                }
            }
            left = again;
            match busy {
                None => return Ok(Reply::Devices(rows)),
                Some(e) if patience.is_over() => return Err(e),
                Some(_) => {}
            }
        }
    }

    /// The devices of these volumes and snapshots, where nothing but their users can keep them from being detached.
    fn detachable(&self, paths: &[VolumePath], force: bool) -> Result<Vec<DeviceEntry>> {
        let devices = self.devices();
        let is_named = |other: &VolumePath| paths.contains(other);
        let exports = devices.exports();
        exports.refuse(&self.name, "detach a block device", is_named)?;
        if let Some(path) = paths.iter().find(|path| devices.find(path).is_none()) {
            return Err(Error::with(
                ErrorKind::NotFound,
                format!("{}/{path}: is not attached", self.name),
            ));
        }
        let chosen = || paths.iter().filter_map(|path| devices.find(path));
        if !force {
            let waiting = chosen().filter(|slot| matches!(slot.service, Service::Waiting));
            devices.refuse("detach", waiting)?;
        }
        Ok(chosen().map(|slot| slot.entry.clone()).collect())
    }

    /// Takes a device away. Its command has the turn of its volume, and no lock: this may take minutes.
    fn detach_one(&self, path: &VolumePath, claim: Option<Claim>) -> Result<Option<DeviceRow>> {
        let (entry, row, service) = {
            let mut devices = self.devices();
            let Some(slot) = devices.find_mut(path) else {
                return Ok(None);
            };
            let row = slot.row();
            let service = std::mem::replace(&mut slot.service, Service::Detaching);
            (slot.entry.clone(), row, service)
        };
        let (flushed, removed) = self.take_away(&entry, service, claim);
        let mut devices = self.devices();
        if let Err((service, e)) = removed {
            if let Some(slot) = devices.find_mut(path) {
                slot.service = service;
                // Who uses the device is no fault of the device.
                if e.kind() != ErrorKind::Busy {
                    slot.fault = Some(one_line(&e));
                }
            }
            return Err(e);
        }
        devices.take(path);
        devices.unlink(&entry);
        devices.save()?;
        drop(devices);
        info!(volume = %path, device = %row.device, "detached");
        self.tell(&Event::DeviceGone {
            name: format!("{}/{path}", self.name),
            device: row.device.clone(),
        });
        flushed.map(|()| Some(row))
    }

    /// Removes a device from the kernel; whether what it served is durable, and whether the device is gone. If not, who
    /// serves it now.
    fn take_away(
        &self,
        entry: &DeviceEntry,
        service: Service,
        mut claim: Option<Claim>,
    ) -> (Result<()>, std::result::Result<(), (Service, Error)>) {
        let sealed = match &mut claim {
            Some(claim) => claim::seal(claim, &self.subject(entry), "detach"),
            None => Ok(()),
        };
        if let Err(e) = sealed {
            // Not by dropping it: whoever hears of it may mount the device at once.
            let released = claim.map_or(Ok(()), Claim::release);
            return (released, Err((service, e)));
        }
        let served = match service {
            Service::Served(served) => served,
            Service::Attaching | Service::Detaching | Service::Waiting => {
                let release = || claim.map_or(Ok(()), Claim::release);
                let forgotten = ublk::forget(entry.state.dev_id, release);
                return (Ok(()), forgotten.map_err(|e| (Service::Waiting, e)));
            }
        };
        let attached = served.attached().clone();
        // What an opener left in the page cache who closed the device after it was claimed.
        let written = claim.as_mut().map_or(Ok(()), Claim::flush);
        if written.is_err() {
            // What the kernel tries to write once more shall fail at once.
            attached.stop_waiting();
        }
        // A pool whose flush fails must not keep its devices for ever, so the device goes all the same.
        let flushed = written.and(block_on(attached.flush(&self.device)));
        if let Err(e) = served.stop(|| claim.map_or(Ok(()), Claim::release)) {
            return (flushed, Err((Service::Served(served), e)));
        }
        // Only commands that have the volume's turn share it.
        let deleted = match Arc::try_unwrap(served) {
            Ok(served) => served.delete().map_err(|e| (Service::Waiting, e)),
            Err(served) => Err((Service::Served(served), Error::new(ErrorKind::Busy))),
        };
        (flushed, deleted.inspect(|()| attached.detach()))
    }

    /// Drops the devices that the kernel no longer has, or that somebody else stopped: nobody uses them, and another device
    /// may get their number.
    pub(super) fn drop_gone(&self) {
        let suspects: Vec<(DeviceEntry, bool)> = {
            let devices = self.devices();
            let is_suspect = |slot: &&Slot| match &slot.service {
                Service::Served(served) => served.was_stopped(),
                Service::Waiting => true,
                Service::Attaching | Service::Detaching => false,
            };
            let suspects = devices.slots().iter().filter(is_suspect);
            suspects
                .map(|slot| (slot.entry.clone(), slot.served().is_some()))
                .collect()
        };
        for (entry, is_served) in suspects {
            let dropped = match is_served {
                true => self.drop_stopped(&entry),
                false if entry.is_gone() => self.drop_entry(&entry),
                false => Ok(()),
            };
            if let Err(e) = dropped {
                warn!(volume = %entry.path, device = %entry.node(), "cannot be dropped: {}", one_line(&e));
            }
        }
    }

    /// Drops a device that this daemon served until somebody else stopped it.
    fn drop_stopped(&self, entry: &DeviceEntry) -> Result<()> {
        let served = {
            let mut devices = self.devices();
            let Some(slot) = devices.find_mut(&entry.path) else {
                return Ok(());
            };
            // A command of this volume shares it: the next one drops it.
            let Service::Served(served) = &slot.service else {
                return Ok(());
            };
            if Arc::strong_count(served) > 1 {
                return Ok(());
            }
            std::mem::replace(&mut slot.service, Service::Waiting)
        };
        if let Service::Served(served) = served
            && let Ok(served) = Arc::try_unwrap(served)
        {
            let attached = served.attached().clone();
            let deleted = served.delete();
            attached.detach();
            deleted?;
        }
        self.drop_entry(entry)
    }

    fn drop_entry(&self, entry: &DeviceEntry) -> Result<()> {
        let mut devices = self.devices();
        devices.drop_gone(|other| other.state == entry.state);
        devices.save()?;
        drop(devices);
        info!(volume = %entry.path, device = %entry.node(), "is gone");
        self.tell(&Event::DeviceGone {
            name: format!("{}/{}", self.name, entry.path),
            device: entry.node(),
        });
        Ok(())
    }

    /// Serves again every device that nothing serves, and forgets those that the kernel does not have any more.
    pub(crate) fn recover(&self) -> Result<()> {
        let mut gone = Vec::new();
        for entry in self.waiting() {
            let _turn = self.turn("recover", vec![Scope::One(entry.path.clone())])?;
            // Another command may have had its turn first.
            if !self
                .waiting()
                .iter()
                .any(|other| other.state == entry.state)
            {
                continue;
            }
            let node = entry.node();
            match self.recover_one(&entry) {
                Ok(served) => {
                    info!(volume = %entry.path, device = %node, "recovered");
                    self.name_device(&entry);
                    self.serve(&entry.path, served)?;
                }
                Err(e) => {
                    warn!(volume = %entry.path, device = %node, "cannot be recovered: {}", one_line(&e));
                    if e.kind() == ErrorKind::NotFound {
                        gone.push(entry.state.dev_id);
                    }
                    if let Some(slot) = self.devices().find_mut(&entry.path) {
                        slot.fault = Some(one_line(&e));
                    }
                }
            }
        }
        let mut devices = self.devices();
        devices.drop_gone(|entry| gone.contains(&entry.state.dev_id));
        devices.save()
    }

    /// The devices that nothing serves.
    fn waiting(&self) -> Vec<DeviceEntry> {
        let devices = self.devices();
        let waiting = devices.slots().iter();
        let waiting = waiting.filter(|slot| matches!(slot.service, Service::Waiting));
        waiting.map(|slot| slot.entry.clone()).collect()
    }

    fn recover_one(&self, entry: &DeviceEntry) -> Result<ublk::Served> {
        // Not `NotFound`: the kernel has the device, and somebody may be waiting for it.
        let lost = |fact: String| {
            Error::with(
                ErrorKind::Io,
                format!(
                    "{}/{}: {fact}; `ublkctl detach --force {}` gives it up",
                    self.name,
                    entry.path,
                    entry.node()
                ),
            )
        };
        let file = self.device.file();
        if !entry.read_only && !file.is_writable() {
            // Served read-only, the writes that wait in the kernel would fail.
            return Err(lost(format!(
                "writes to {} wait, because {} is on a read-only medium; make that writable, end this daemon with `kill {}`, and run `ublkctl recover {}`",
                entry.node(),
                file.path().display(),
                std::process::id(),
                self.name
            )));
        }
        let attached = self.pool.attach(&entry.path, entry.read_only);
        let attached = attached.map_err(|e| lost(one_line(&e)))?;
        attached.set_on_full(entry.on_full);
        if attached.id() != entry.id {
            attached.detach();
            return Err(lost(format!(
                "is not the volume that {} served",
                entry.node()
            )));
        }
        let recovered =
            ublk::Served::recover(self.device.file().clone(), attached.clone(), &entry.state);
        let served = recovered.inspect_err(|_| attached.detach())?;
        // The volume may have been resized while nothing served the device.
        if served.size() != Some(attached.bytes())
            && let Err(e) = served.update_size(attached.bytes())
        {
            warn!(volume = %entry.path, "its device keeps its old size: {}", one_line(&e));
        }
        Ok(served)
    }
}

/// Waits for the nodes of a device's partitions. The device serves without them too, so a failure is only logged.
fn await_partitions(dev_id: u32) {
    if let Err(e) = claim::await_partitions(dev_id) {
        warn!(
            "/dev/ublkb{dev_id}: its partitions may come late: {}",
            one_line(&e)
        );
    }
}
