//! An open pool and what can be asked of it: the one implementation of every request, for the daemon and without it.
//!
//! Commands that concern the same volume take turns (`turns`), so that nothing attaches what is just being removed or
//! rolled back; those of other volumes go on meanwhile. Every blocker is named before anything is touched.

mod devices;
mod events;
mod in_use;
mod nbd;
mod place;
mod preflight;
mod turns;
mod volumes;

use crate::devices::{Devices, Slot};
use crate::events::Events;
use crate::marks::Marks;
use crate::protocol::{DeviceRow, Reply, Request, Row, Status};
use blockfork::device::FileDevice;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::pool::Pool;
use blockfork::ublk;
use futures_lite::future::block_on;
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use turns::{Scope, Turn, Turns};

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
    turns: Turns,
    role: Role,
    marks: Mutex<Marks>,
    events: Events,
    /// Whether something was removed since somebody looked.
    has_removed: AtomicBool,
}

/// Told how far a long request got: done, of how many.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(u64, u64);

impl Host {
    /// A host for an open pool.
    pub(crate) fn new(
        pool: Pool,
        device: FileDevice,
        devices: Devices,
        role: Role,
        marks: Marks,
    ) -> Self {
        let host = Self {
            name: pool.name(),
            pool: Arc::new(pool),
            device,
            devices: Mutex::new(devices),
            turns: Turns::new(),
            role,
            marks: Mutex::new(marks),
            events: Events::default(),
            has_removed: AtomicBool::new(false),
        };
        // The pool is locked, so nobody else is about to attach anything.
        host.drop_gone();
        host
    }

    /// The pool.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The pool's file.
    pub(crate) fn device(&self) -> &FileDevice {
        &self.device
    }

    /// The devices. For a look or for a change of the list, never across anything that waits.
    pub(crate) fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock()
    }

    /// Waits for the turn of what a command works on.
    fn turn(&self, action: &'static str, scopes: Vec<Scope>) -> Result<Turn<'_>> {
        self.turns.take(&self.name, action, scopes)
    }

    /// Does what a request asks.
    pub(crate) fn handle(&self, request: Request, progress: Progress<'_>) -> Result<Reply> {
        self.drop_gone();
        let turn = Self::scopes(&request).map(|(action, scopes)| self.turn(action, scopes));
        let _turn = turn.transpose()?;
        self.refuse_attached(&request)?;
        let (pool, device) = (&self.pool, &self.device);
        match request {
            Request::Status => Ok(Reply::Status(self.status())),
            Request::Stats => Ok(Reply::Stats(pool.stats())),
            Request::List => self.list(),
            Request::Devices => Ok(Reply::Devices(self.rows())),
            Request::Diff { from, to } => block_on(pool.diff(device, &from, &to)).map(Reply::Diff),
            Request::Check => {
                let report = block_on(pool.check(device, progress))?;
                self.tell_damage(&report);
                Ok(Reply::Check(report))
            }
            Request::SetMarks { marks } => {
                *self.marks.lock() = marks;
                Ok(Reply::Done)
            }
            // The daemon's connection goes on from here.
            Request::Watch => self.watchable(),
            Request::Create {
                volume,
                options,
                limits,
            } => {
                let made = pool.create_limited_volume(device, &volume, options, limits);
                block_on(made).map(|_| Reply::Done)
            }
            Request::SetLimits { volume, changes } => {
                block_on(pool.set_limits(device, &volume, &changes)).map(|()| Reply::Done)
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
                block_on(pool.snapshot(device, &targets)).map(|()| Reply::Done)
            }
            Request::Clone { snapshot, volume } => {
                block_on(pool.clone_snapshot(device, &snapshot, &volume)).map(|_| Reply::Done)
            }
            Request::Rollback { snapshot } => self.rollback(&snapshot),
            Request::Outline => Ok(Reply::Outline(pool.outline())),
            Request::Hold { tag, snapshots } => {
                block_on(pool.hold(device, &tag, &snapshots)).map(|()| Reply::Done)
            }
            Request::Release { tag, snapshots } => {
                block_on(pool.release(device, &tag, &snapshots)).map(|()| Reply::Done)
            }
            Request::Prune {
                volume,
                policy,
                dry_run,
            } => self.prune(&volume, policy, dry_run).map(Reply::Pruned),
            Request::Grow { bytes } => self.grow(bytes),
            Request::Attach {
                path,
                read_only,
                queues,
                depth,
                metadata_cache,
                on_full,
            } => {
                if let Some(bytes) = metadata_cache {
                    pool.limit_metadata(bytes);
                }
                let options = ublk::DeviceOptions {
                    dev_id: None,
                    queues,
                    depth,
                    read_only: read_only || path.snapshot.is_some(),
                };
                self.attach(&path, &options, on_full)
            }
            Request::ServeNbd {
                path,
                read_only,
                address,
                on_full,
            } => self.serve_nbd(&path, read_only, &address, on_full),
            Request::Detach { devices, force } => self.detach(&devices, force),
            Request::Recover => {
                self.recover()?;
                Ok(Reply::Devices(self.rows()))
            }
            // Whoever asked for it sees to the rest.
            Request::Stop => self.closable().map(|()| Reply::Done),
            Request::Backlog { ids } => pool.backlog(&ids).map(Reply::Backlog),
        }
    }

    /// Refuses where all that the pool holds would be gone with this process.
    fn closable(&self) -> Result<()> {
        match self.deleted() {
            Some(fact) => Err(Error::with(ErrorKind::Busy, fact)),
            None => Ok(()),
        }
    }

    fn rows(&self) -> Vec<DeviceRow> {
        self.devices().slots().iter().map(Slot::row).collect()
    }

    fn status(&self) -> Status {
        let mut pool = self.pool.status();
        let short = self.marks.lock().warning(&pool);
        pool.warnings.extend(short);
        if self.role == Role::Daemon && !self.device.file().is_writable() {
            let shown = self.device.file().path().display();
            let fact = "is on a read-only medium; volumes and snapshots are served for reading";
            pool.warnings.push(format!("{shown}: {fact}"));
        }
        // Before the devices are locked: a look at the file's path waits where a network file system does not answer.
        let misplaced = self.misplaced();
        pool.warnings.extend(misplaced.clone());
        let devices = self.devices();
        Status {
            pool,
            read_only: self.role == Role::Daemon && self.pool.is_read_only(),
            misplaced: misplaced.is_some(),
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
}

/// A volume itself, as opposed to a snapshot of it.
fn whole(volume: &Name) -> VolumePath {
    VolumePath {
        volume: volume.clone(),
        snapshot: None,
    }
}
