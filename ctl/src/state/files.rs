//! Reading and replacing small files.

use blockfork::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The largest state file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Makes a directory and those above it, for their owner only.
pub(super) fn make_private(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Error::io(e, format!("{}: cannot be created", path.display())))
}

/// Reads a JSON file; none if it is not there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let failed = |e| Error::io(e, format!("{}: cannot be read", path.display()));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let parsed = serde_json::from_slice(&bytes);
    parsed
        .map(Some)
        .map_err(|e| Error::corrupt(format!("{}: {e}", path.display())))
}

/// Replaces a JSON file in one step: a reader, or a crash, sees the old one or the new one.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::io(e.into(), "JSON"))?;
    write_file(path, &bytes)
}

/// Replaces a file in one step.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |e| Error::io(e, format!("{}: cannot be written", path.display()));
    let staged = Staged::write(path, bytes).map_err(failed)?;
    staged.publish().map_err(failed)
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
    pub(super) fn write(path: &Path, bytes: &[u8]) -> io::Result<Self> {
        let create = |temporary: &Path| {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(temporary)
        };
        let (temporary, mut file) = make_temporary(parent(path)?, create)?;
        // From here on a failure removes the file: one that is left on a full file system would be in the way of the rest.
        let staged = Self {
            temporary,
            path: path.to_owned(),
            is_published: false,
        };
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(staged)
    }

    /// Gives it its name, durably.
    pub(super) fn publish(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.path)?;
        self.is_published = true;
        File::open(parent(&self.path)?)?.sync_all()
    }
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
