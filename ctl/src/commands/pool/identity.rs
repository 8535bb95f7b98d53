//! The name and the id of a pool: `pool rename`, and `pool import` with `--name` and `--new-id`.
//!
//! Both stand in the superblock and in the registry. The superblock is changed under the pool's lock and the registry's,
//! and only where the ring of a killed daemon, which is found by the id, cannot hold anything of this pool.

use super::create::draw_id;
use super::{LOCK_WAIT_MS, close, open_for_reading, refuse_known};
use crate::client;
use crate::devices::Devices;
use crate::exit_code::{about, one_line};
use crate::state::{self, PoolEntry, Registry, Runtime};
use blockfork::device::{Access, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use blockfork::pool::{Identity, Pool, PoolLabel, Unclosed};
use futures_lite::future::block_on;
use std::path::Path;
use std::sync::Arc;

/// Gives a pool that is about to be imported another name, another id or both.
pub(super) fn change_at(path: &Path, name: Option<Name>, new_id: bool) -> Result<()> {
    let registry = Registry::from_env()?;
    refuse_known(&registry, path)?;
    let access = Access {
        write: true,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let file = PoolFile::open(path, access)?;
    let (blocks, device) = (file.blocks(), FileDevice::new(Arc::new(file)));
    let label = block_on(Pool::label(&device, blocks)).map_err(|e| about(path, &e))?;
    let registry = registry.lock()?;
    refuse_known(&registry, path)?;
    let name = name.unwrap_or_else(|| label.name.clone());
    if registry.has(&name) {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "pool {name}: this machine has one of that name; choose another with --name, and see `ublkctl pool status {name}`"
            ),
        ));
    }
    let original = twin(&registry, &label.id.to_string())?;
    let mut unclosed = Unclosed::Refuse;
    let mut id = label.id;
    if new_id {
        id = draw_id()?;
        if let Some(original) = &original
            && !label.is_clean
            && is_in_place(original)?
        {
            unclosed = Unclosed::IsCopy;
        }
    } else if let Some(original) = &original {
        return Err(copy_of(original, path));
    }
    let changed = block_on(Pool::identify(
        &device,
        blocks,
        &Identity { name, id },
        unclosed,
    ));
    changed.map_err(|e| explain(path, &label, &e))
}

/// Refuses a pool whose id another known pool has: rings and devices are found by it.
pub(super) fn refuse_twin(registry: &Registry, id: &str, path: &Path) -> Result<()> {
    twin(registry, id)?.map_or(Ok(()), |original| Err(copy_of(&original, path)))
}

fn twin(registry: &Registry, id: &str) -> Result<Option<PoolEntry>> {
    let all = registry.all()?.into_iter().flatten();
    Ok(all.into_iter().find(|entry| entry.id == id))
}

fn copy_of(original: &PoolEntry, path: &Path) -> Error {
    let (name, path) = (&original.name, path.display());
    Error::with(
        ErrorKind::AlreadyExists,
        format!(
            "{path}: has the id of pool {name}, which is at {}; import a copy with --new-id and a --name of its own, or if the pool was moved, forget its old place with `ublkctl pool export --force {name}`",
            original.path.display()
        ),
    )
}

/// Whether a known pool is still where its entry says. What cannot be looked at is an error.
fn is_in_place(entry: &PoolEntry) -> Result<bool> {
    // Its daemon has said the id.
    if client::is_served(&entry.name)? {
        return Ok(true);
    }
    let file = match open_for_reading(&entry.path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    let blocks = file.blocks();
    match block_on(Pool::label(&FileDevice::new(Arc::new(file)), blocks)) {
        Ok(label) => Ok(label.id.to_string() == entry.id),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(about(&entry.path, &e)),
    }
}

/// The way out for a pool that was not closed, and that no original shows to be a copy.
fn explain(path: &Path, label: &PoolLabel, error: &Error) -> Error {
    let error = about(path, error);
    if error.kind() != ErrorKind::Busy {
        return error;
    }
    let (name, path) = (&label.name, path.display());
    Error::with(
        ErrorKind::Busy,
        format!(
            "{}; bring it home first: `ublkctl pool import {path}`, `ublkctl pool export {name}`, then import it again with its new name or id",
            one_line(&error)
        ),
    )
}

/// Gives a known pool another name.
pub(super) fn rename(from: &Name, to: &Name) -> Result<()> {
    let registry = Registry::from_env()?;
    let entry = registry.find(from)?;
    let taken = || {
        Error::with(
            ErrorKind::AlreadyExists,
            format!("pool {to}: exists already; choose another name"),
        )
    };
    // Before the pool is closed for it.
    if registry.has(to) {
        return Err(taken());
    }
    // Names what is attached, and ends an idle daemon, whose files have the old name.
    let file = close(&entry)?;
    if !file.is_writable() {
        return Err(Error::with(
            ErrorKind::ReadOnly,
            format!(
                "pool {from}: {} is on a read-only medium, and the name stands in the pool",
                entry.path.display()
            ),
        ));
    }
    let runtime = Runtime::of(from)?;
    let devices = Devices::load(&runtime, from, entry.id.clone(), state::boot_id()?)?;
    devices.refuse("rename the pool", devices.slots().iter())?;
    let (blocks, device) = (file.blocks(), FileDevice::new(Arc::new(file)));
    let label = block_on(Pool::label(&device, blocks)).map_err(|e| about(&entry.path, &e))?;
    if (&label.name, label.id.to_string()) != (from, entry.id.clone()) {
        return Err(Error::with(
            ErrorKind::NotFound,
            format!(
                "pool {from}: {} holds another pool now ({}, {})",
                entry.path.display(),
                label.name,
                label.id
            ),
        ));
    }
    let registry = registry.lock()?;
    registry.refuse_changed(&entry)?;
    if registry.has(to) {
        return Err(taken());
    }
    let renamed = registry.reserve_rename(&entry, to)?;
    let identify = |name: &Name| {
        let name = name.clone();
        let identity = Identity { name, id: label.id };
        block_on(Pool::identify(&device, blocks, &identity, Unclosed::Refuse))
    };
    identify(to).map_err(|e| about(&entry.path, &e))?;
    if let Err(e) = renamed.enter() {
        // The entry with the old name still counts, so the pool gets that name again.
        identify(from).map_err(|again| {
            let line = format!(
                "{}; the pool has the name {to} already and cannot get its old one back: {}",
                one_line(&e),
                one_line(&again)
            );
            Error::with(e.kind(), line)
        })?;
        return Err(e);
    }
    registry.remove(&entry)?;
    runtime.clear()
}
