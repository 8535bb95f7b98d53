//! `pool create`: a pool in a new file, or where nothing is lost.

use crate::exit_code::one_line;
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
use std::io::{self, Read};
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
    size.map_or(Ok(()), check_size)?;
    let id = draw_id()?;
    let entry = PoolEntry {
        name: name.clone(),
        path: state::absolute(path)?,
        id: id.to_string(),
    };
    let path = &entry.path;
    let registry = Registry::from_env()?.lock()?;
    // What the registry cannot take is refused before anything is made.
    let reservation = registry.reserve(&entry)?;
    let is_new = make_file(path, size)?;
    let mut file = lock_pool(path, is_new)?;
    // Whoever has another state directory has another registry, and may have made a pool of this file before it was
    // locked. Under the lock an empty file is still the one that this command made.
    let is_ours = is_new && file.bytes() == 0;
    let result = (|| {
        if !is_ours && !force {
            refuse_content(&file)?;
        }
        let bytes = pool_bytes(&file, size)?;
        if bytes > file.bytes() {
            file.set_bytes(bytes)?;
        }
        wipe_signatures(&file)?;
        if !file.is_direct() {
            output::say(&format!(
                "{}: the file system refuses O_DIRECT; I/O will be buffered",
                path.display()
            ));
        }
        Ok(bytes / BLOCK_BYTES)
    })();
    let file = Arc::new(file);
    let result = result.and_then(|blocks| {
        let options = CreateOptions {
            name: name.clone(),
            id,
            blocks,
            created: SystemClock::new().now(),
        };
        let device = FileDevice::new(file.clone());
        if overcommits {
            block_on(Pool::create(&device, options))
        } else {
            block_on(Pool::create_without_overcommit(&device, options))
        }
    });
    let result = result.and_then(|()| {
        let entered = reservation.enter();
        entered.map_err(|e| if is_ours { e } else { unregistered(&entry, &e) })
    });
    match result {
        Err(error) if is_ours => Err(remove_made(&file, error)),
        result => result,
    }
}

/// Makes an empty file if nothing is there; true if it did.
fn make_file(path: &Path, size: Option<u64>) -> Result<bool> {
    let shown = path.display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be created"));
    if size.is_none() {
        return match fs::symlink_metadata(path) {
            Ok(_) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::with(
                ErrorKind::Invalid,
                format!("{shown}: is not there; give --size to make a file of that size"),
            )),
            Err(e) => Err(failed(e)),
        };
    }
    let made = FileOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match made {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(failed(e)),
    }
}

fn lock_pool(path: &Path, is_new: bool) -> Result<PoolFile> {
    let access = Access {
        write: true,
        lock_wait_ms: 0,
    };
    PoolFile::open(path, access).map_err(|e| {
        if !is_new || e.kind() == ErrorKind::Busy {
            return e;
        }
        // Only under its lock it is known to be as this command made it.
        let line = format!("{}; an empty file stays there", one_line(&e));
        Error::with(e.kind(), line)
    })
}

/// The error of a pool that is written and cannot be entered in the registry.
fn unregistered(entry: &PoolEntry, error: &Error) -> Error {
    let path = entry.path.display();
    let line = format!(
        "{}; {path} holds pool {} now, and `ublkctl pool import {path}` registers it",
        one_line(error),
        entry.name
    );
    Error::with(error.kind(), line)
}

/// Removes the file that this command made and has locked; the error that was the reason.
fn remove_made(file: &PoolFile, error: Error) -> Error {
    let path = file.path();
    let remove = || -> io::Result<()> {
        let (held, found) = (fs::metadata(descriptor(file))?, fs::metadata(path)?);
        // What was moved or replaced meanwhile is no longer this command's.
        if state::identity(&held) == state::identity(&found) {
            fs::remove_file(path)?;
        }
        Ok(())
    };
    match remove() {
        Ok(()) => error,
        Err(e) if e.kind() == io::ErrorKind::NotFound => error,
        Err(e) => {
            let (line, path) = (one_line(&error), path.display());
            let line = format!("{line}; {path} was created and cannot be removed: {e}");
            Error::with(error.kind(), line)
        }
    }
}

/// The size that the pool is to have.
fn pool_bytes(file: &PoolFile, size: Option<u64>) -> Result<u64> {
    let (shown, held) = (file.path().display(), file.bytes());
    let bytes = size.unwrap_or(held - held % BLOCK_BYTES);
    check_size(bytes).map_err(|e| Error::with(e.kind(), format!("{shown}: {e}")))?;
    if bytes > held && file.is_block_device() {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("{shown}: the device holds {held} bytes, less than --size"),
        ));
    }
    Ok(bytes)
}

/// The path of a locked file that leads to this file, wherever it is by now.
fn descriptor(file: &PoolFile) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// The file opened a second time, without `O_DIRECT`, because signatures stand at odd places.
fn open_buffered(file: &PoolFile) -> io::Result<File> {
    FileOptions::new()
        .read(true)
        .write(true)
        .open(descriptor(file))
}

/// Overwrites what makes other programs take the file or device for theirs.
fn wipe_signatures(file: &PoolFile) -> Result<()> {
    let (shown, bytes) = (file.path().display(), file.bytes());
    let wipe = || {
        let plain = open_buffered(file)?;
        let found = signature::probe(&plain, bytes)?;
        signature::wipe(&plain, bytes, &found)
    };
    wipe().map_err(|e| Error::io(e, format!("{shown}: cannot be written")))
}

/// Refuses what holds anything that somebody may miss.
fn refuse_content(file: &PoolFile) -> Result<()> {
    let (shown, bytes) = (file.path().display(), file.bytes());
    let look = || {
        let plain = open_buffered(file)?;
        let found = signature::probe(&plain, bytes)?;
        // A file full of data is somebody's; a device is never empty, and only what is recognised counts there.
        Ok(match found.first() {
            Some(first) => Some(first.name),
            None if file.is_block_device() => None,
            None => signature::has_data(&plain, bytes)?.then_some("data"),
        })
    };
    let fact = look().map_err(|e: io::Error| Error::io(e, format!("{shown}: cannot be read")))?;
    fact.map_or(Ok(()), |fact| {
        Err(Error::with(
            ErrorKind::AlreadyExists,
            format!("{shown}: holds {fact}; choose another path, or overwrite it with --force"),
        ))
    })
}

/// A version 4 UUID.
pub(super) fn draw_id() -> Result<PoolId> {
    const SOURCE: &str = "/dev/urandom";
    let mut id = [0; 16];
    let drawn = File::open(SOURCE).and_then(|mut source| source.read_exact(&mut id));
    drawn.map_err(|e| Error::io(e, format!("{SOURCE}: cannot be read")))?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(PoolId(id))
}
