//! What `ublkctl` knows between two commands: where each pool lives, and where its daemon keeps its things.

mod files;
mod machine;
mod registry;
mod runtime;

pub(crate) use files::{
    is_trusted, lock_file, make_temporary, read_json, remove_file, write_file, write_json,
};
pub(crate) use machine::{boot_id, metadata_cache};
pub(crate) use registry::{BadEntry, PoolEntry, Registry, identity};
pub(crate) use runtime::{Runtime, pools_with_devices};

use blockfork::error::{Error, ErrorKind, Result};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// The environment variable that moves the registry of pools.
pub(crate) const STATE_DIR: &str = "UBLKCTL_STATE_DIR";
/// The environment variable that moves sockets, pid files and rings.
pub(crate) const RUNTIME_DIR: &str = "UBLKCTL_RUNTIME_DIR";

const STATE_DIR_DEFAULT: &str = "/var/lib/ublkctl";
const RUNTIME_DIR_DEFAULT: &str = "/run/ublkctl";

/// A directory from the environment, absolute.
fn directory(variable: &str, default: &str) -> Result<PathBuf> {
    let path = match std::env::var_os(variable) {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ => PathBuf::from(default),
    };
    std::path::absolute(&path)
        .map_err(|e| Error::io(e, format!("{variable}={}: cannot be used", path.display())))
}

/// Both directories as a child process needs them: absolute.
pub(crate) fn directories() -> Result<[(&'static str, PathBuf); 2]> {
    Ok([
        (STATE_DIR, directory(STATE_DIR, STATE_DIR_DEFAULT)?),
        (RUNTIME_DIR, directory(RUNTIME_DIR, RUNTIME_DIR_DEFAULT)?),
    ])
}

/// A path that is kept, absolute and otherwise as it was given: `/dev/disk/by-id/X` stays right after a reboot, and what
/// it leads to today may be another disk then.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io(e, format!("{}: cannot be found", path.display()));
    let absolute = std::path::absolute(path).map_err(failed)?;
    let parts: Vec<Component<'_>> = absolute.components().collect();
    // Where `..` leads depends on the links before it, and on the current directory, which may go. So it is resolved now.
    let kept = match parts.iter().rposition(|part| *part == Component::ParentDir) {
        None => absolute,
        Some(last) => {
            let (before, after) = parts.split_at(last + 1);
            let before: PathBuf = before.iter().collect();
            let resolved = fs::canonicalize(before).map_err(failed)?;
            after.iter().fold(resolved, |path, part| path.join(part))
        }
    };
    if kept.to_str().is_none() {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("{}: is not UTF-8", path.display()),
        ));
    }
    Ok(kept)
}
