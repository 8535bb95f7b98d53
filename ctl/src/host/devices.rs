//! Block devices: attaching, detaching, and taking them back after a kill.

use super::turns::Scope;
use super::{Host, Role};
use crate::devices::{DeviceEntry, Service, Slot};
use crate::events::Event;
use crate::exit_code::one_line;
use crate::protocol::{DeviceRow, Reply, Selection};
use crate::udev::{self, Kind};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::pool::OnFull;
use blockfork::ublk::{self, Holder};
use futures_lite::future::block_on;
use std::fs;
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
                let mut devices = self.devices();
                // A name too many does no harm: the kernel has no such device.
                if let Some(slot) = devices.take(path) {
                    devices.unlink(&slot.entry);
                    if let Err(unsaved) = devices.save() {
                        warn!("{}", one_line(&unsaved));
                    }
                }
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

    /// From now on this daemon serves the device of a volume.
    fn serve(&self, path: &VolumePath, served: ublk::Served) -> Result<DeviceRow> {
        let mut devices = self.devices();
        let Some(slot) = devices.find_mut(path) else {
            let message = format!("{}/{path}: is not among the devices", self.name);
            return Err(Error::with(ErrorKind::NotFound, message));
        };
        slot.service = Service::Served(Arc::new(served));
        slot.fault = None;
        Ok(slot.row())
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

    /// An error that names whoever has one of these devices open.
    fn refuse_held(&self, entries: &[DeviceEntry], action: &str) -> Result<()> {
        let mut held = Vec::new();
        for entry in entries {
            let holders = ublk::holders(entry.state.dev_id);
            let holders: Vec<String> = holders.iter().map(said_of).collect();
            if !holders.is_empty() {
                let (path, node) = (&entry.path, entry.node());
                held.push(format!(
                    "{}/{path}: {node} is {}",
                    self.name,
                    holders.join(", ")
                ));
            }
        }
        if held.is_empty() {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{}; cannot {action} it, unmount or close it first",
                held.join("; ")
            ),
        ))
    }

    /// Keeps a device from everybody; an error that names whoever has it.
    pub(super) fn claim(&self, entry: &DeviceEntry, action: &str) -> Result<ublk::Claim> {
        let dev_id = entry.state.dev_id;
        let claim = ublk::Claim::take(dev_id)?;
        if let Some(claim) = claim.filter(|_| ublk::sharers(dev_id).is_empty()) {
            return Ok(claim);
        }
        // Who it is takes a look at all there is, so only where there is somebody.
        self.refuse_held(std::slice::from_ref(entry), action)?;
        let (path, node) = (&entry.path, entry.node());
        let fact = format!(
            "{}/{path}: {node} was in use just now; try again",
            self.name
        );
        Err(Error::with(ErrorKind::Busy, fact))
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
        let entries = self.detachable(&paths, force)?;
        for entry in &entries {
            ublk::refuse_stuck(entry.state.dev_id)?;
        }
        self.refuse_held(&entries, "detach")?;
        let mut rows = Vec::new();
        for path in &paths {
            rows.extend(self.detach_one(path)?);
        }
        Ok(Reply::Devices(rows))
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
    fn detach_one(&self, path: &VolumePath) -> Result<Option<DeviceRow>> {
        let (entry, row, service) = {
            let mut devices = self.devices();
            let Some(slot) = devices.find_mut(path) else {
                return Ok(None);
            };
            let row = slot.row();
            let service = std::mem::replace(&mut slot.service, Service::Detaching);
            (slot.entry.clone(), row, service)
        };
        let (flushed, removed) = self.take_away(&entry, service);
        let mut devices = self.devices();
        if let Err((service, e)) = removed {
            if let Some(slot) = devices.find_mut(path) {
                slot.service = service;
                slot.fault = Some(one_line(&e));
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
    ) -> (Result<()>, std::result::Result<(), (Service, Error)>) {
        let served = match service {
            Service::Served(served) => served,
            Service::Attaching | Service::Detaching | Service::Waiting => {
                let forgotten = ublk::forget(entry.state.dev_id);
                return (Ok(()), forgotten.map_err(|e| (Service::Waiting, e)));
            }
        };
        let attached = served.attached().clone();
        // A pool whose flush fails must not keep its devices for ever, so the device goes all the same.
        let flushed = block_on(attached.flush(&self.device));
        if let Err(e) = served.stop() {
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

/// Who holds a device. Who sees its mount is worth saying only where that is not the machine's own mount namespace,
/// where everybody looks first.
fn said_of(holder: &Holder) -> String {
    let mounts_of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    match holder {
        Holder::Mount {
            at,
            seen_by: Some(process),
        } if mounts_of(process.pid) == mounts_of(1) => format!("mounted on {at}"),
        Holder::Mount { .. } | Holder::Swap | Holder::Device { .. } | Holder::Process(_) => {
            holder.to_string()
        }
    }
}
