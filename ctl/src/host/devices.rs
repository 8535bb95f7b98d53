//! Block devices: attaching, detaching, and taking them back after a kill.

use super::{Host, Role};
use crate::devices::{DeviceEntry, Devices, Slot};
use crate::events::Event;
use crate::exit_code::one_line;
use crate::protocol::{DeviceRow, Reply, Selection};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::pool::OnFull;
use blockfork::ublk::{self, Holder};
use futures_lite::future::block_on;
use std::fs;
use tracing::{info, warn};

impl Host {
    pub(super) fn attach(
        &self,
        path: &VolumePath,
        options: &ublk::DeviceOptions,
        on_full: OnFull,
    ) -> Result<Reply> {
        let mut devices = self.devices();
        self.refuse_second(&devices, path)?;
        let attached = self.pool.attach(path, options.read_only)?;
        attached.set_on_full(on_full);
        let announce = |state| {
            devices.add(Slot {
                entry: DeviceEntry {
                    path: path.clone(),
                    id: attached.id(),
                    read_only: attached.is_read_only(),
                    on_full,
                    state,
                },
                served: None,
                fault: None,
            })
        };
        let file = self.device.file().clone();
        let served = match ublk::Served::add(file, attached.clone(), options, announce) {
            Ok(served) => served,
            Err(e) => {
                attached.detach();
                // A name too many does no harm: the kernel has no such device.
                if devices.take(path).is_some()
                    && let Err(unsaved) = devices.save()
                {
                    warn!("{}", one_line(&unsaved));
                }
                return Err(e);
            }
        };
        let row = devices.serve(path, served)?;
        devices
            .find(path)
            .into_iter()
            .for_each(|slot| devices.link(slot));
        info!(volume = %path, device = %row.device, "attached");
        self.tell(&Event::DeviceAdded {
            name: format!("{}/{path}", self.name),
            device: row.device.clone(),
        });
        Ok(Reply::Devices(vec![row]))
    }

    /// An error if this is attached already, or if nothing can be attached here.
    pub(super) fn refuse_second(&self, devices: &Devices, path: &VolumePath) -> Result<()> {
        let fact = match (devices.find(path), devices.exports().find(path)) {
            (Some(slot), _) if slot.served.is_some() => {
                format!("is attached already, as {}", slot.entry.node())
            }
            (Some(slot), _) => format!(
                "is attached already, as {}, which nothing serves; `ublkctl recover {}`",
                slot.entry.node(),
                self.name
            ),
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

    /// An error that names whoever has one of these devices open.
    fn refuse_held<'a>(&self, slots: impl Iterator<Item = &'a Slot>, action: &str) -> Result<()> {
        let mut held = Vec::new();
        for slot in slots {
            let holders = ublk::holders(slot.entry.state.dev_id);
            let holders: Vec<String> = holders.iter().map(said_of).collect();
            if !holders.is_empty() {
                let (path, node) = (&slot.entry.path, slot.entry.node());
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
    pub(super) fn claim(&self, slot: &Slot, action: &str) -> Result<ublk::Claim> {
        let dev_id = slot.entry.state.dev_id;
        let claim = ublk::Claim::take(dev_id)?;
        if let Some(claim) = claim.filter(|_| ublk::sharers(dev_id).is_empty()) {
            return Ok(claim);
        }
        // Who it is takes a look at all there is, so only where there is somebody.
        self.refuse_held(std::iter::once(slot), action)?;
        let (path, node) = (&slot.entry.path, slot.entry.node());
        let fact = format!(
            "{}/{path}: {node} was in use just now; try again",
            self.name
        );
        Err(Error::with(ErrorKind::Busy, fact))
    }

    pub(super) fn detach(&self, selection: &Selection, force: bool) -> Result<Reply> {
        let mut devices = self.devices();
        let paths = match selection {
            Selection::All => devices
                .slots()
                .iter()
                .map(|slot| slot.entry.path.clone())
                .collect(),
            Selection::Paths(paths) => paths.clone(),
        };
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
        self.refuse_held(chosen(), "detach")?;
        if !force {
            devices.refuse("detach", chosen().filter(|slot| slot.served.is_none()))?;
        }
        let mut rows = Vec::new();
        for path in &paths {
            rows.extend(self.detach_one(&mut devices, path)?);
        }
        Ok(Reply::Devices(rows))
    }

    fn detach_one(&self, devices: &mut Devices, path: &VolumePath) -> Result<Option<DeviceRow>> {
        let Some(mut slot) = devices.take(path) else {
            return Ok(None);
        };
        let row = slot.row();
        let mut flushed = Ok(());
        let removed = match slot.served.take() {
            Some(served) => {
                let attached = served.attached().clone();
                // A pool whose flush fails must not keep its devices for ever, so the device goes all the same.
                flushed = block_on(attached.flush(&self.device));
                served.remove().inspect(|()| attached.detach())
            }
            None => ublk::forget(slot.entry.state.dev_id),
        };
        if let Err(e) = removed {
            slot.fault = Some(one_line(&e));
            devices.put_back(slot);
            return Err(e);
        }
        devices.unlink(&slot.entry);
        devices.save()?;
        info!(volume = %path, device = %row.device, "detached");
        self.tell(&Event::DeviceGone {
            name: format!("{}/{path}", self.name),
            device: row.device.clone(),
        });
        flushed.map(|()| Some(row))
    }

    /// Serves again every device that the file names, and forgets those that the kernel does not have any more.
    pub(crate) fn recover(&self) -> Result<()> {
        let mut devices = self.devices();
        let mut gone = Vec::new();
        for slot in devices.slots_mut() {
            let node = slot.entry.node();
            match self.recover_one(&slot.entry) {
                Ok(served) => {
                    info!(volume = %slot.entry.path, device = %node, "recovered");
                    slot.served = Some(served);
                }
                Err(e) => {
                    warn!(volume = %slot.entry.path, device = %node, "cannot be recovered: {}", one_line(&e));
                    if e.kind() == ErrorKind::NotFound {
                        gone.push(slot.entry.state.dev_id);
                    }
                    slot.fault = Some(one_line(&e));
                }
            }
        }
        devices.drop_gone(|entry| gone.contains(&entry.state.dev_id));
        devices.save()?;
        devices
            .slots()
            .iter()
            .filter(|slot| slot.served.is_some())
            .for_each(|slot| devices.link(slot));
        Ok(())
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
        recovered.inspect_err(|_| attached.detach())
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
