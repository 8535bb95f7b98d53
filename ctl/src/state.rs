//! What `ublkctl` knows between two commands: where each pool lives, and where its daemon keeps its things.
//! Everything here is read back as hostile: names are parsed, files are limited, and a bad one is an error with its path.

use crate::marks::Marks;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::METADATA_CACHE_BYTES_DEFAULT;
use blockfork::name::{Name, VolumePath};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The environment variable that moves the registry of pools.
pub(crate) const STATE_DIR: &str = "UBLKCTL_STATE_DIR";
/// The environment variable that moves sockets, pid files and rings.
pub(crate) const RUNTIME_DIR: &str = "UBLKCTL_RUNTIME_DIR";

const STATE_DIR_DEFAULT: &str = "/var/lib/ublkctl";
const RUNTIME_DIR_DEFAULT: &str = "/run/ublkctl";
/// The largest state file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// The longest path that a unix socket's address holds, without its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where a pool lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolEntry {
    /// Its name.
    pub(crate) name: Name,
    /// Its file or device, absolute.
    pub(crate) path: PathBuf,
    /// Its identity, as a UUID.
    pub(crate) id: String,
}

/// The pools that this machine knows.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    pools: PathBuf,
}

impl Registry {
    /// The registry in `$UBLKCTL_STATE_DIR`.
    pub(crate) fn from_env() -> Result<Self> {
        Ok(Self {
            pools: directory(STATE_DIR, STATE_DIR_DEFAULT)?.join("pools"),
        })
    }

    fn file(&self, name: &Name) -> PathBuf {
        self.pools.join(format!("{name}.json"))
    }

    /// The pool of this name.
    pub(crate) fn find(&self, name: &Name) -> Result<PoolEntry> {
        let Some(entry) = read_json::<PoolEntry>(&self.file(name))? else {
            return Err(Error::with(
                ErrorKind::NotFound,
                format!(
                    "pool {name}: not known here; `ublkctl pool list` shows the pools, `ublkctl pool import PATH` adds one"
                ),
            ));
        };
        if entry.name != *name || !entry.path.is_absolute() {
            return Err(Error::corrupt(format!(
                "{}: describes another pool",
                self.file(name).display()
            )));
        }
        Ok(entry)
    }

    /// All pools, by name.
    pub(crate) fn all(&self) -> Result<Vec<PoolEntry>> {
        let failed = |e| Error::io(e, format!("{}: cannot be read", self.pools.display()));
        let directory = match fs::read_dir(&self.pools) {
            Ok(directory) => directory,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut names = Vec::new();
        for entry in directory {
            let file = entry.map_err(failed)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".json"));
            names.extend(name.and_then(|name| name.parse::<Name>().ok()));
        }
        names.sort();
        names.iter().map(|name| self.find(name)).collect()
    }

    /// The pool that lives at `path`, however that is spelt.
    pub(crate) fn at_path(&self, path: &Path) -> Result<Option<PoolEntry>> {
        let Ok(wanted) = fs::metadata(path) else {
            return Ok(None);
        };
        let is_same = |entry: &PoolEntry| {
            fs::metadata(&entry.path).is_ok_and(|known| identity(&known) == identity(&wanted))
        };
        Ok(self.all()?.into_iter().find(is_same))
    }

    /// Whether a name is taken, even by an entry that cannot be read.
    pub(crate) fn has(&self, name: &Name) -> bool {
        self.file(name).symlink_metadata().is_ok()
    }

    /// Makes the registry's directory, so that a later [`Registry::add`] has no reason to fail.
    pub(crate) fn prepare(&self) -> Result<()> {
        make_private(&self.pools)
    }

    /// Enters a pool.
    pub(crate) fn add(&self, entry: &PoolEntry) -> Result<()> {
        self.prepare()?;
        write_json(&self.file(&entry.name), entry)
    }

    /// Where a pool's space marks are. No pool's own file has such a name.
    fn marks_file(&self, name: &Name) -> PathBuf {
        self.pools.join(format!("{name}.marks"))
    }

    /// A pool's space marks.
    pub(crate) fn marks(&self, name: &Name) -> Result<Marks> {
        Ok(read_json(&self.marks_file(name))?.unwrap_or_default())
    }

    /// Gives a pool other space marks.
    pub(crate) fn set_marks(&self, name: &Name, marks: &Marks) -> Result<()> {
        write_json(&self.marks_file(name), marks)
    }

    /// Forgets a pool.
    pub(crate) fn remove(&self, name: &Name) -> Result<()> {
        remove_file(&self.marks_file(name))?;
        remove_file(&self.file(name))
    }
}

/// What tells one file from another, and one device from another whatever node names it.
fn identity(metadata: &fs::Metadata) -> (u64, u64, u64) {
    use std::os::unix::fs::FileTypeExt;
    if metadata.file_type().is_block_device() {
        (0, 0, metadata.rdev())
    } else {
        (metadata.dev(), metadata.ino(), 0)
    }
}

/// The runtime files of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    directory: PathBuf,
    pool: Name,
}

impl Runtime {
    /// The files of `pool` in `$UBLKCTL_RUNTIME_DIR`.
    pub(crate) fn of(pool: &Name) -> Result<Self> {
        Ok(Self {
            directory: directory(RUNTIME_DIR, RUNTIME_DIR_DEFAULT)?,
            pool: pool.clone(),
        })
    }

    /// Makes the directory, for its owner only.
    pub(crate) fn prepare(&self) -> Result<()> {
        make_private(&self.directory)
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
    let Ok(entries) = fs::read_dir(&directory) else {
        return Ok(Vec::new());
    };
    let name = |file: &OsStr| file.to_str()?.strip_suffix(".devices.json")?.parse().ok();
    let mut names: Vec<Name> = entries
        .flatten()
        .filter_map(|entry| name(&entry.file_name()))
        .collect();
    names.sort();
    Ok(names)
}

/// The kernel's boot id: what belongs to another boot is stale.
pub(crate) fn boot_id() -> Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text =
        fs::read_to_string(PATH).map_err(|e| Error::io(e, format!("{PATH}: cannot be read")))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(in_written_order(id)),
        _ => Err(Error::with(
            ErrorKind::Unsupported,
            format!("{PATH}: not a boot id"),
        )),
    }
}

/// Memory for a pool's metadata unless somebody says how much, in bytes: an eighth of the machine's.
pub(crate) fn metadata_cache() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").ok();
    let total = told.as_deref().and_then(memory_bytes);
    total.map_or(METADATA_CACHE_BYTES_DEFAULT, |bytes| bytes / 8)
}

/// The machine's memory, as `/proc/meminfo` tells it.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A UUID's bytes in the order in which it is written.
fn in_written_order(id: u128) -> [u8; 16] {
    let mut bytes = id.to_le_bytes();
    bytes.reverse();
    bytes
}

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

fn make_private(path: &Path) -> Result<()> {
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

/// A short name for a long one; both ends of the socket compute it.
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(directory: &tempfile::TempDir) -> Registry {
        Registry {
            pools: directory.path().join("pools"),
        }
    }

    fn entry(name: &str) -> PoolEntry {
        PoolEntry {
            name: name.parse().unwrap(),
            path: "/srv/p0.pool".into(),
            id: "0".into(),
        }
    }

    #[test]
    fn a_pool_is_found_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&directory);
        assert!(registry.all().unwrap().is_empty());
        registry.add(&entry("p1")).unwrap();
        registry.add(&entry("p0")).unwrap();
        assert_eq!(registry.all().unwrap(), [entry("p0"), entry("p1")]);
        registry.remove(&"p0".parse().unwrap()).unwrap();
        let error = registry.find(&"p0".parse().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn marks_go_with_their_pool() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&directory);
        registry.add(&entry("p0")).unwrap();
        let name = "p0".parse().unwrap();
        assert_eq!(registry.marks(&name).unwrap(), Marks::default());
        registry.set_marks(&name, &"50".parse().unwrap()).unwrap();
        assert_eq!(registry.marks(&name).unwrap(), "50".parse().unwrap());
        assert_eq!(registry.all().unwrap().len(), 1);
        registry.remove(&name).unwrap();
        assert_eq!(registry.marks(&name).unwrap(), Marks::default());
        registry.add(&entry("p0")).unwrap();
        fs::write(registry.marks_file(&name), "[90,80]").unwrap();
        assert_eq!(
            registry.marks(&name).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn a_file_that_describes_something_else_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&directory);
        registry.add(&entry("p0")).unwrap();
        let name: Name = "p0".parse().unwrap();
        for text in [
            "",
            "[]",
            "{\"name\":\"../p0\",\"path\":\"/x\",\"id\":\"0\"}",
            "{\"name\":\"p1\",\"path\":\"/x\",\"id\":\"0\"}",
            "{\"name\":\"p0\",\"path\":\"x\",\"id\":\"0\"}",
        ] {
            fs::write(registry.file(&name), text).unwrap();
            assert_eq!(
                registry.find(&name).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{text}"
            );
        }
    }

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

    #[test]
    fn the_machine_tells_its_memory() {
        let text = "MemTotal:       16384 kB\nMemFree:         1 kB\n";
        assert_eq!(memory_bytes(text), Some(16 << 20));
        for text in [
            "",
            "MemTotal: 1 GB",
            "MemTotal: kB",
            "MemTotal: 18446744073709551615 kB",
        ] {
            assert_eq!(memory_bytes(text), None, "{text}");
        }
        assert!(metadata_cache() > 0);
    }

    #[test]
    fn the_boot_id_has_sixteen_bytes_in_written_order() {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let first = u8::from_str_radix(&text[..2], 16).unwrap();
        assert_eq!(boot_id().unwrap()[0], first);
    }
}
