//! The runtime files of a pool: its daemon's socket, pid file, ring, log and list of devices. None outlives the boot.

use super::files::{make_private, refuse_open, remove_file};
use super::{RUNTIME_DIR, RUNTIME_DIR_DEFAULT, directory};
use blockfork::error::{Error, Result};
use blockfork::name::{Name, VolumePath};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The longest path that a unix socket's address holds, without its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The runtime files of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    directory: PathBuf,
    pool: Name,
}

impl Runtime {
    /// The files of `pool` in `$UBLKCTL_RUNTIME_DIR`, which must be out of the reach of others: a command believes what it
    /// reads there and whoever answers there, and writes there with all its rights.
    pub(crate) fn of(pool: &Name) -> Result<Self> {
        let directory = directory(RUNTIME_DIR, RUNTIME_DIR_DEFAULT)?;
        refuse_open(&directory)?;
        Ok(Self {
            directory,
            pool: pool.clone(),
        })
    }

    /// Makes the directory, for its owner only.
    pub(crate) fn prepare(&self) -> Result<()> {
        make_private(&self.directory)
    }

    /// Where the files are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}.{suffix}", self.pool))
    }

    /// The control socket. A name too long for a socket's address is replaced by its hash.
    pub(crate) fn socket(&self) -> PathBuf {
        let path = self.file("sock");
        if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return path;
        }
        self.directory.join(format!(
            ".{:016x}.sock",
            fnv1a(self.pool.as_str().as_bytes())
        ))
    }

    /// Where clients of a volume connect that is served over NBD. No name has a comma, so none stands for another's.
    pub(crate) fn nbd_socket(&self, volume: &VolumePath) -> PathBuf {
        let name = format!("{},{volume}.nbd", self.pool);
        let path = self.directory.join(&name);
        if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return path;
        }
        let short = format!(".{:016x}.nbd", fnv1a(name.as_bytes()));
        self.directory.join(short)
    }

    /// The process id of the daemon.
    pub(crate) fn pid(&self) -> PathBuf {
        self.file("pid")
    }

    /// The ring of redo records.
    pub(crate) fn ring(&self) -> PathBuf {
        self.file("ring")
    }

    /// The log of a daemon that was started by another command.
    pub(crate) fn log(&self) -> PathBuf {
        self.file("log")
    }

    /// The devices that the daemon serves.
    pub(crate) fn devices(&self) -> PathBuf {
        self.file("devices.json")
    }

    /// The file whose lock lets one process at a time start the daemon.
    pub(crate) fn start_lock(&self) -> PathBuf {
        self.file("start")
    }

    /// The file whose lock a daemon holds that may only read its pool. Others may read the pool too, so the pool's own lock
    /// does not keep a second daemon away.
    pub(crate) fn reader_lock(&self) -> PathBuf {
        self.file("reader")
    }

    /// Removes what an idle, cleanly closed pool leaves behind.
    pub(crate) fn clear(&self) -> Result<()> {
        for path in [self.socket(), self.pid(), self.ring(), self.devices()] {
            remove_file(&path)?;
        }
        Ok(())
    }
}

/// The pools that have a file of devices: those that a daemon serves, or served when it was killed.
pub(crate) fn pools_with_devices() -> Result<Vec<Name>> {
    let directory = directory(RUNTIME_DIR, RUNTIME_DIR_DEFAULT)?;
    refuse_open(&directory)?;
    let failed = |e| Error::io(e, format!("{}: cannot be read", directory.display()));
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let name = |file: &OsStr| file.to_str()?.strip_suffix(".devices.json")?.parse().ok();
    let mut names: Vec<Name> = Vec::new();
    for entry in entries {
        names.extend(name(&entry.map_err(failed)?.file_name()));
    }
    names.sort();
    Ok(names)
}

/// A short name for a long one; both ends of the socket compute it.
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_fits_its_address_whatever_the_name() {
        let runtime = Runtime {
            directory: "/run/ublkctl".into(),
            pool: "x".repeat(127).parse().unwrap(),
        };
        assert!(runtime.socket().as_os_str().len() <= SOCKET_PATH_BYTES_MAX);
        let short = Runtime {
            pool: "p0".parse().unwrap(),
            ..runtime
        };
        assert_eq!(short.socket(), Path::new("/run/ublkctl/p0.sock"));
    }
}
