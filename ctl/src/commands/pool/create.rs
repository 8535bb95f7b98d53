//! `pool create`: a pool in a new file, or where nothing is lost.

use super::absolute;
use crate::output;
use crate::state::{self, PoolEntry, Registry};
use crate::{signature, size};
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::{POOL_BLOCKS_MAX, POOL_BLOCKS_MIN};
use blockfork::name::Name;
use blockfork::pool::{CreateOptions, Pool};
use blockfork::units::{BLOCK_BYTES, PoolId};
use futures_lite::future::block_on;
use std::fs::{self, File, OpenOptions as FileOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// Refuses a size that no pool can have.
pub(super) fn check_size(bytes: u64) -> Result<()> {
    let (min, max) = (POOL_BLOCKS_MIN * BLOCK_BYTES, POOL_BLOCKS_MAX * BLOCK_BYTES);
    if !(min..=max).contains(&bytes) {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "size {bytes}: a pool has at least {} and at most {}",
                size::human(min),
                size::human(max)
            ),
        ));
    }
    if !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("size {bytes}: is not a multiple of {BLOCK_BYTES}"),
        ));
    }
    Ok(())
}

pub(super) fn create(
    name: &Name,
    path: &Path,
    size: Option<u64>,
    force: bool,
    overcommits: bool,
) -> Result<()> {
    let registry = Registry::from_env()?;
    refuse_known(&registry, name, path)?;
    size.map_or(Ok(()), check_size)?;
    registry.prepare()?;
    let is_new = make_file(path, size)?;
    let created = create_in(name, path, size, is_new || force, overcommits);
    if created.is_err() && is_new {
        state::remove_file(path)?;
    }
    registry.add(&created?)
}

fn refuse_known(registry: &Registry, name: &Name, path: &Path) -> Result<()> {
    if registry.has(name) {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "pool {name}: exists already; choose another name, or see `ublkctl pool status {name}`"
            ),
        ));
    }
    match registry.at_path(path)? {
        Some(entry) => Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "{}: is pool {} already; destroy or export that first",
                path.display(),
                entry.name
            ),
        )),
        None => Ok(()),
    }
}

/// Makes the pool's file if nothing is there; true if it did.
fn make_file(path: &Path, size: Option<u64>) -> Result<bool> {
    let shown = path.display();
    if fs::symlink_metadata(path).is_ok() {
        return Ok(false);
    }
    let Some(size) = size else {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("{shown}: is not there; give --size to make a file of that size"),
        ));
    };
    let failed = |e| Error::io(e, format!("{shown}: cannot be created"));
    let file = FileOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    if let Err(e) = file.set_len(size).and_then(|()| file.sync_all()) {
        state::remove_file(path)?;
        return Err(failed(e));
    }
    Ok(true)
}

fn create_in(
    name: &Name,
    path: &Path,
    size: Option<u64>,
    force: bool,
    overcommits: bool,
) -> Result<PoolEntry> {
    let access = Access {
        write: true,
        lock_wait_ms: 0,
    };
    let mut file = PoolFile::open(path, access)?;
    let path = absolute(path)?;
    let shown = path.display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be read"));
    let held = file.bytes();
    // Reopened by its descriptor, so it is the same file, and without O_DIRECT: signatures stand at odd places.
    let reopen = format!("/proc/self/fd/{}", file.as_raw_fd());
    let plain = FileOptions::new()
        .read(true)
        .write(true)
        .open(reopen)
        .map_err(failed)?;
    let found = signature::probe(&plain, held).map_err(failed)?;
    if !force {
        refuse_content(&file, &plain, &found)?;
    }
    let bytes = size.unwrap_or(held - held % BLOCK_BYTES);
    check_size(bytes).map_err(|e| Error::with(e.kind(), format!("{shown}: {e}")))?;
    if bytes > held {
        if file.is_block_device() {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{shown}: the device holds {held} bytes, less than --size"),
            ));
        }
        file.set_bytes(bytes)?;
    }
    signature::wipe(&plain, held, &found)
        .map_err(|e| Error::io(e, format!("{shown}: cannot be written")))?;
    drop(plain);
    if !file.is_direct() {
        output::say(&format!(
            "{shown}: the file system refuses O_DIRECT; I/O will be buffered"
        ));
    }
    let id = draw_id()?;
    let options = CreateOptions {
        name: name.clone(),
        id,
        blocks: bytes / BLOCK_BYTES,
        created: SystemClock::new().now(),
    };
    let device = FileDevice::new(Arc::new(file));
    if overcommits {
        block_on(Pool::create(&device, options))?;
    } else {
        block_on(Pool::create_without_overcommit(&device, options))?;
    }
    Ok(PoolEntry {
        name: name.clone(),
        path,
        id: id.to_string(),
    })
}

/// Refuses what holds anything that somebody may miss.
fn refuse_content(file: &PoolFile, plain: &File, found: &[signature::Found]) -> Result<()> {
    let shown = file.path().display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be read"));
    let fact = match found.first() {
        Some(first) => first.name,
        // A file full of data is somebody's; a device is never empty, and only what is recognised counts there.
        None if !file.is_block_device()
            && signature::has_data(plain, file.bytes()).map_err(failed)? =>
        {
            "data"
        }
        None => return Ok(()),
    };
    Err(Error::with(
        ErrorKind::AlreadyExists,
        format!("{shown}: holds {fact}; choose another path, or overwrite it with --force"),
    ))
}

/// A version 4 UUID.
fn draw_id() -> Result<PoolId> {
    const SOURCE: &str = "/dev/urandom";
    let mut id = [0; 16];
    let drawn = File::open(SOURCE).and_then(|mut source| source.read_exact(&mut id));
    drawn.map_err(|e| Error::io(e, format!("{SOURCE}: cannot be read")))?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(PoolId(id))
}
