//! Reading, replacing and locking small files. A link in place of a file is never followed.

use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use nix::unistd::geteuid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// The largest state file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Whether a user can be believed: root, and whoever runs this command.
pub(crate) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Makes a directory and those above it, for their owner only, and refuses one that is not.
pub(super) fn make_private(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Error::io(e, format!("{}: cannot be created", path.display())))?;
    refuse_open(path)
}

/// Refuses a directory in which others can put files, and one that others can replace by being its owner or that of the
/// link to it. Fine if it is not there.
pub(super) fn refuse_open(path: &Path) -> Result<()> {
    let refuse = |fact: String| {
        let fact = format!("{}: {fact}", path.display());
        Err(Error::with(ErrorKind::Permission, fact))
    };
    for metadata in [fs::symlink_metadata(path), fs::metadata(path)] {
        let metadata = match metadata {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => {
                return Err(Error::io(e, format!("{}: cannot be used", path.display())));
            }
        };
        if !is_trusted(metadata.uid()) {
            return refuse(format!(
                "belongs to user {}, who could put anything there; use a directory of your own",
                metadata.uid()
            ));
        }
        if metadata.is_dir() && metadata.mode() & 0o022 != 0 {
            return refuse(format!(
                "others can write there (mode {:o}), so its files could be anybody's; take that right away with `chmod go-w`",
                metadata.mode() & 0o7777
            ));
        }
    }
    Ok(())
}

/// Reads a JSON file; none if it is not there. What is not a plain file is not waited for.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let failed = |e| Error::io(e, format!("{}: cannot be read", path.display()));
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => return Err(no_file(path)),
        Err(e) => return Err(failed(e)),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(no_file(path));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let parsed = serde_json::from_slice(&bytes);
    parsed
        .map(Some)
        .map_err(|e| Error::corrupt(format!("{}: {e}", path.display())))
}

fn no_file(path: &Path) -> Error {
    Error::corrupt(format!("{}: is no plain file", path.display()))
}

/// Opens a file that is there for its lock, made if it is missing, and locks it. Closing it gives the lock back.
pub(crate) fn lock_file(path: &Path, wait_ns: u64) -> Result<File> {
    let failed = |e| Error::io(e, format!("{}: cannot be locked", path.display()));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    let clock = SystemClock::new();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(failed(e)),
            Err(TryLockError::WouldBlock) if clock.monotonic_ns() < wait_ns => {
                thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!(
                        "{}: another command has held this lock for {} seconds; look for it with `fuser {}`",
                        path.display(),
                        wait_ns / 1_000_000_000,
                        path.display()
                    ),
                ));
            }
        }
    }
}

/// Replaces a JSON file in one step: a reader, or a crash, sees the old one or the new one.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    write_file(path, &json(value)?)
}

/// Replaces a file in one step.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    Staged::write(path, bytes)?.publish()
}

/// Writes what is to replace a JSON file.
pub(super) fn stage_json<T: Serialize>(path: &Path, value: &T) -> Result<Staged> {
    Staged::write(path, &json(value)?)
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| Error::io(e.into(), "JSON"))
}

/// The new content of a file, durable under a temporary name beside the file. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    is_published: bool,
}

impl Staged {
    /// Writes what is to be at `path`.
    fn write(path: &Path, bytes: &[u8]) -> Result<Self> {
        let write = || {
            let create = |temporary: &Path| {
                OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(temporary)
            };
            let (temporary, mut file) = make_temporary(parent(path)?, create)?;
            // From here on a failure removes the file, which would take room on a full file system.
            let staged = Self {
                temporary,
                path: path.to_owned(),
                is_published: false,
            };
            file.write_all(bytes)?;
            file.sync_all()?;
            Ok(staged)
        };
        write().map_err(|e| unwritable(path, e))
    }

    /// Gives it its name, durably.
    pub(super) fn publish(mut self) -> Result<()> {
        let mut publish = || {
            fs::rename(&self.temporary, &self.path)?;
            self.is_published = true;
            File::open(parent(&self.path)?)?.sync_all()
        };
        publish().map_err(|e| unwritable(&self.path, e))
    }
}

fn unwritable(path: &Path, error: io::Error) -> Error {
    Error::io(error, format!("{}: cannot be written", path.display()))
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.is_published
            && let Err(e) = remove_file(&self.temporary)
        {
            tracing::warn!("{e}");
        }
    }
}

/// The directory that holds a file.
fn parent(path: &Path) -> io::Result<&Path> {
    path.parent()
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Makes something that is to replace another file of this directory by a rename, under a name that nothing else has:
/// no pool, volume or snapshot has a name that begins with a dot. `make` must fail if the file is there already.
pub(crate) fn make_temporary<T>(
    directory: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!(".new-{}-{number}", std::process::id()));
        match make(&path) {
            // A killed process of this number left it, or one of another pid namespace is using it.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|value| (path, value)),
        }
    }
}

/// Removes a file; fine if it is not there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(
            e,
            format!("{}: cannot be removed", path.display()),
        )),
        _ => Ok(()),
    }
}
