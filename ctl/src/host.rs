//! An open pool and what can be asked of it: the one implementation of every request, for the daemon and without it.
//!
//! What changes the pool runs one at a time, under the lock of its devices, so that nothing attaches what is just being
//! removed or rolled back. Every blocker is named before anything is touched.

use crate::devices::{DeviceEntry, Devices, Slot};
use crate::endpoint::{Bound, Endpoint};
use crate::exit_code::one_line;
use crate::exports::Exported;
use crate::protocol::{DeviceRow, NbdAddress, Reply, Request, Resized, Row, Selection, Status};
use crate::state::Runtime;
use blockfork::device::FileDevice;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::POOL_BLOCKS_MAX;
use blockfork::name::{Name, VolumePath};
use blockfork::nbd::Export;
use blockfork::pool::Pool;
use blockfork::ublk::{self, Holder};
use blockfork::units::BLOCK_BYTES;
use futures_lite::future::block_on;
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use tracing::{info, warn};

/// Who runs the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The daemon, which serves devices.
    Daemon,
    /// A command that opened the pool for itself.
    Command,
}

/// An open pool with its devices.
#[derive(Debug)]
pub(crate) struct Host {
    name: Name,
    pool: Arc<Pool>,
    device: FileDevice,
    devices: Mutex<Devices>,
    role: Role,
}

/// Told how far a long request got: done, of how many.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64, u64);

impl Host {
    /// A host for an open pool.
    pub(crate) fn new(pool: Pool, device: FileDevice, devices: Devices, role: Role) -> Self {
        Self {
            name: pool.name(),
            pool: Arc::new(pool),
            device,
            devices: Mutex::new(devices),
            role,
        }
    }

    /// The pool.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The pool's file.
    pub(crate) fn device(&self) -> &FileDevice {
        &self.device
    }

    /// The devices; whoever holds them keeps every change away.
    pub(crate) fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock()
    }

    /// Does what a request asks.
    pub(crate) fn handle(&self, request: Request, progress: Progress<'_>) -> Result<Reply> {
        let (pool, device) = (&self.pool, &self.device);
        match request {
            Request::Status => Ok(Reply::Status(self.status())),
            Request::Stats => Ok(Reply::Stats(pool.stats())),
            Request::List => self.list(),
            Request::Devices => Ok(Reply::Devices(
                self.devices().slots().iter().map(Slot::row).collect(),
            )),
            Request::Diff { from, to } => block_on(pool.diff(device, &from, &to)).map(Reply::Diff),
            Request::Check => block_on(pool.check(device, progress)).map(Reply::Check),
            Request::Create { volume, options } => {
                let _alone = self.devices();
                block_on(pool.create_volume(device, &volume, options)).map(|_| Reply::Done)
            }
            Request::Remove {
                targets,
                recursive,
                dry_run,
            } => self.remove(&targets, recursive, dry_run),
            Request::Rename { from, to } => self.rename(&from, &to),
            Request::Resize {
                volume,
                bytes,
                allow_shrink,
            } => self.resize(&volume, bytes, allow_shrink),
            Request::Snapshot { targets } => {
                let _alone = self.devices();
                block_on(pool.snapshot(device, &targets)).map(|()| Reply::Done)
            }
            Request::Clone { snapshot, volume } => {
                let _alone = self.devices();
                block_on(pool.clone_snapshot(device, &snapshot, &volume)).map(|_| Reply::Done)
            }
            Request::Rollback { snapshot } => self.rollback(&snapshot),
            Request::Grow { bytes } => self.grow(bytes),
            Request::Attach {
                path,
                read_only,
                queues,
                depth,
            } => {
                let options = ublk::DeviceOptions {
                    dev_id: None,
                    queues,
                    depth,
                    read_only: read_only || path.snapshot.is_some(),
                };
                self.attach(&path, &options)
            }
            Request::ServeNbd {
                path,
                read_only,
                address,
            } => self.serve_nbd(&path, read_only, &address),
            Request::Detach { devices, force } => self.detach(&devices, force),
            Request::Stop => {
                let devices = self.devices();
                devices.refuse("close the pool", devices.slots().iter())?;
                let exports = devices.exports();
                exports.refuse(&self.name, "close the pool", |_| true)?;
                Ok(Reply::Done)
            }
        }
    }

    fn status(&self) -> Status {
        let devices = self.devices();
        Status {
            pool: self.pool.status(),
            read_only: self.role == Role::Daemon && self.pool.is_read_only(),
            daemon_pid: (self.role == Role::Daemon).then(std::process::id),
            devices: devices.count(),
            exports: devices.exports().count(),
            direct_io: self.device.file().is_direct(),
        }
    }

    fn list(&self) -> Result<Reply> {
        let entries = block_on(self.pool.list(&self.device))?;
        let devices = self.devices();
        let row = |entry: blockfork::pool::Entry| {
            let slot = devices.find(&entry.path).map(Slot::row);
            let exported = devices.exports().find(&entry.path);
            Row {
                served: exported.is_some() || slot.as_ref().is_some_and(|slot| slot.served),
                device: slot
                    .map(|slot| slot.device)
                    .or_else(|| exported.map(|exported| exported.uri.clone())),
                entry,
            }
        };
        Ok(Reply::List(entries.into_iter().map(row).collect()))
    }

    fn remove(&self, targets: &[VolumePath], recursive: bool, dry_run: bool) -> Result<Reply> {
        let devices = self.devices();
        let goes = |path: &VolumePath| {
            targets.iter().any(|target| {
                target == path
                    || (recursive && target.snapshot.is_none() && target.volume == path.volume)
            })
        };
        devices.refuse(
            "remove",
            devices.slots().iter().filter(|slot| goes(&slot.entry.path)),
        )?;
        devices.exports().refuse(&self.name, "remove", goes)?;
        block_on(self.pool.remove(&self.device, targets, recursive, dry_run)).map(Reply::Removal)
    }

    fn rename(&self, from: &VolumePath, to: &VolumePath) -> Result<Reply> {
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
        block_on(self.pool.rename(&self.device, from, to)).map(|()| Reply::Done)
    }

    fn resize(&self, volume: &Name, bytes: u64, allow_shrink: bool) -> Result<Reply> {
        let devices = self.devices();
        let path = whole(volume);
        block_on(self.pool.resize(&self.device, volume, bytes, allow_shrink))?;
        let Some(slot) = devices.find(&path) else {
            let resized = match devices.exports().find(&path) {
                // NBD has no way to tell a client that is connected.
                Some(_) => Resized::AtNextAttach,
                None => Resized::Unattached,
            };
            return Ok(Reply::Resized(resized));
        };
        // The volume has its new size already; a device that stays behind is no reason to say that it failed.
        let is_online = match &slot.served {
            Some(served) => served.update_size(bytes).unwrap_or_else(|e| {
                warn!(device = %slot.entry.node(), "cannot be resized: {}", one_line(&e));
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

    fn rollback(&self, snapshot: &VolumePath) -> Result<Reply> {
        let devices = self.devices();
        let path = whole(&snapshot.volume);
        let is_meant = |other: &VolumePath| *other == path;
        devices
            .exports()
            .refuse(&self.name, "roll back", is_meant)?;
        let Some(slot) = devices.find(&path) else {
            return block_on(self.pool.rollback(&self.device, snapshot)).map(|()| Reply::Done);
        };
        let Some(served) = &slot.served else {
            devices.refuse("roll back", std::iter::once(slot))?;
            return Err(Error::new(ErrorKind::Busy));
        };
        self.refuse_held(std::iter::once(slot), "roll back")?;
        let size_before = served.attached().bytes();
        block_on(self.pool.rollback(&self.device, snapshot))?;
        ublk::drop_cached_pages(slot.entry.state.dev_id)?;
        let size = served.attached().bytes();
        if size != size_before && !served.update_size(size)? {
            return Err(Error::with(
                ErrorKind::Unsupported,
                format!(
                    "{}/{path}: rolled back, but the kernel cannot give {} the size of then; detach and attach it",
                    self.name,
                    slot.entry.node()
                ),
            ));
        }
        Ok(Reply::Done)
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

    fn grow(&self, bytes: u64) -> Result<Reply> {
        let _alone = self.devices();
        self.growable(bytes)?;
        self.device.file().extend(bytes)?;
        block_on(self.pool.grow(&self.device, bytes / BLOCK_BYTES)).map(|()| Reply::Done)
    }

    fn attach(&self, path: &VolumePath, options: &ublk::DeviceOptions) -> Result<Reply> {
        let mut devices = self.devices();
        self.refuse_second(&devices, path)?;
        let attached = self.pool.attach(path, options.read_only)?;
        let announce = |state| {
            devices.add(Slot {
                entry: DeviceEntry {
                    path: path.clone(),
                    id: attached.id(),
                    read_only: attached.is_read_only(),
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
        Ok(Reply::Devices(vec![row]))
    }

    /// An error if this is attached already, or if nothing can be attached here.
    fn refuse_second(&self, devices: &Devices, path: &VolumePath) -> Result<()> {
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

    fn serve_nbd(&self, path: &VolumePath, read_only: bool, address: &NbdAddress) -> Result<Reply> {
        let mut devices = self.devices();
        self.refuse_second(&devices, path)?;
        let attached = self
            .pool
            .attach(path, read_only || path.snapshot.is_some())?;
        let read_only = attached.is_read_only();
        // It is given back when the last owner drops it, so also where something fails from here on.
        let name = format!("{}/{path}", self.name);
        let bound = Bound::new(address, &Runtime::of(&self.name)?, path)?;
        let uri = bound.uri(&name)?;
        let export = Arc::new(Export::new(name, attached, self.device.clone()));
        let endpoint = Endpoint::start(bound, export.clone())?;
        info!(volume = %path, uri, "serving over NBD");
        devices.exports_mut().add(Exported {
            path: path.clone(),
            uri: uri.clone(),
            export,
            endpoint,
        });
        Ok(Reply::ServingNbd { uri, read_only })
    }

    /// Ends what is served over NBD of this volume or snapshot; on return everything is durable.
    pub(crate) fn end_nbd(&self, path: &VolumePath) -> Result<()> {
        let mut devices = self.devices();
        match devices.exports_mut().take(path) {
            Some(exported) => self.end_export(exported),
            None => Ok(()),
        }
    }

    /// Ends everything that is served over NBD.
    pub(crate) fn end_all_nbd(&self, devices: &mut Devices) -> Result<()> {
        let mut ended = Ok(());
        while let Some(exported) = devices.exports_mut().take_any() {
            ended = ended.and(self.end_export(exported));
        }
        ended
    }

    fn end_export(&self, exported: Exported) -> Result<()> {
        exported.endpoint.close();
        exported.export.close();
        let attached = exported.export.attached();
        let flushed = block_on(attached.flush(&self.device));
        attached.detach();
        info!(volume = %exported.path, "no longer served over NBD");
        flushed
    }

    fn detach(&self, selection: &Selection, force: bool) -> Result<Reply> {
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

    /// The refusal of a request that would fail, as far as that can be seen without changing anything. The pool may be
    /// open read-only: without a daemon, a mistake shall not even touch the pool's file.
    pub(crate) fn preflight(&self, request: &Request) -> Result<()> {
        match request {
            Request::Create { volume, .. } => self.absent(&whole(volume)),
            Request::Remove {
                targets, recursive, ..
            } => self.remove(targets, *recursive, true).map(drop),
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
            Request::Clone { snapshot, volume } => self
                .present(snapshot)
                .and_then(|_| self.absent(&whole(volume))),
            Request::Rollback { snapshot } => self.present(snapshot).map(drop),
            Request::Grow { bytes } => self.growable(*bytes),
            Request::Status
            | Request::Stats
            | Request::List
            | Request::Devices
            | Request::Diff { .. }
            | Request::Check
            | Request::Attach { .. }
            | Request::ServeNbd { .. }
            | Request::Detach { .. }
            | Request::Stop => Ok(()),
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

    fn resizable(&self, volume: &Name, bytes: u64, allow_shrink: bool) -> Result<()> {
        let (now, sector_bytes) = self.present(&whole(volume))?;
        let fact = if !bytes.is_multiple_of(u64::from(sector_bytes)) {
            format!("{bytes} bytes are not a multiple of its sector size, {sector_bytes}")
        } else if bytes < now && !allow_shrink {
            format!(
                "holds {now} bytes; what lies beyond {bytes} would be lost, --allow-shrink allows that"
            )
        } else {
            return Ok(());
        };
        Err(Error::with(
            ErrorKind::Invalid,
            format!("{}/{volume}: {fact}", self.name),
        ))
    }

    fn growable(&self, bytes: u64) -> Result<()> {
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

/// A volume itself, as opposed to a snapshot of it.
fn whole(volume: &Name) -> VolumePath {
    VolumePath {
        volume: volume.clone(),
        snapshot: None,
    }
}
