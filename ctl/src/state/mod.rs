//! What `ublkctl` knows between two commands: where each pool lives, and where its daemon keeps its things.

mod files;
mod machine;
mod registry;
mod runtime;

pub(crate) use files::{make_temporary, read_json, remove_file, write_file, write_json};
pub(crate) use machine::{boot_id, metadata_cache};
pub(crate) use registry::{PoolEntry, Registry};
pub(crate) use runtime::{Runtime, pools_with_devices};

use blockfork::error::{Error, Result};
use std::path::PathBuf;

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
