//! Reading and replacing small files.

use blockfork::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

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
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(io::Error::from_raw_os_error(libc::EINVAL)));
    };
    let temporary = directory.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(failed)
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
