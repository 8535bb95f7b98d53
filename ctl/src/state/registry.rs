//! The registry: which pools this machine knows, and where each of them lives. One JSON file for each pool.
//! Everything here is read back as hostile: names are parsed, files are limited, and a bad one is an error with its path.

use super::files::{
    Staged, lock_file, make_private, read_json, refuse_open, remove_file, stage_json, write_json,
};
use super::{STATE_DIR, STATE_DIR_DEFAULT, directory};
use crate::exit_code::one_line;
use crate::marks::Marks;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How long a command waits for another one that changes the registry.
const LOCK_WAIT_NS: u64 = 30_000_000_000;

/// Where a pool lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolEntry {
    /// Its name.
    pub(crate) name: Name,
    /// Its file or device, as it was given, absolute: a link in /dev/disk leads to the right device after a reboot too.
    pub(crate) path: PathBuf,
    /// Its identity, as a UUID.
    pub(crate) id: String,
}

/// An entry of the registry that cannot be used. The pool that it stands for may be well.
#[derive(Debug)]
pub(crate) struct BadEntry {
    /// The name that its file says.
    pub(crate) name: Name,
    /// What is wrong with it, and the way out.
    pub(crate) error: Error,
}

/// The pools that this machine knows.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// The registry in `$UBLKCTL_STATE_DIR`.
    pub(crate) fn from_env() -> Result<Self> {
        let state = directory(STATE_DIR, STATE_DIR_DEFAULT)?;
        let directory = state.join("pools");
        // Whoever can write there says which file or device a command opens.
        refuse_open(&state)?;
        refuse_open(&directory)?;
        Ok(Self { directory })
    }

    fn file(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// The pool of this name.
    pub(crate) fn find(&self, name: &Name) -> Result<PoolEntry> {
        let file = self.file(name);
        let fault = match read_json::<PoolEntry>(&file) {
            Ok(Some(entry)) if entry.name != *name => "describes another pool",
            Ok(Some(entry)) if !entry.path.is_absolute() => "has a path that is not absolute",
            Ok(Some(entry)) => return Ok(entry),
            Ok(None) => {
                return Err(Error::with(
                    ErrorKind::NotFound,
                    format!(
                        "pool {name}: not known here; `ublkctl pool list` shows the pools, `ublkctl pool import PATH` adds one"
                    ),
                ));
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => &one_line(&e),
            Err(e) => return Err(e),
        };
        let shown = file.display().to_string();
        let fact = fault.strip_prefix(&format!("{shown}: ")).unwrap_or(fault);
        // Not `Corrupt`: this file is damaged, and nothing says that the pool is.
        Err(Error::with(
            ErrorKind::Io,
            format!(
                "{shown}: damaged ({fact}), so pool {name} is not found; forget this entry with `ublkctl pool export --force {name}`, then register the pool again with `ublkctl pool import PATH`"
            ),
        ))
    }

    /// All pools by name, and the entries that cannot be used.
    pub(crate) fn all(&self) -> Result<Vec<Result<PoolEntry, BadEntry>>> {
        let failed = |e| Error::io(e, format!("{}: cannot be read", self.directory.display()));
        let directory = match fs::read_dir(&self.directory) {
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
        let find = |name: Name| match self.find(&name) {
            // Forgotten since its name was read.
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            found => Some(found.map_err(|error| BadEntry { name, error })),
        };
        Ok(names.into_iter().filter_map(find).collect())
    }

    /// The pool that lives at `path`, however the path is spelt. An entry that cannot be used names no path, so it is not
    /// found: whoever is about to write there must look at what is there, too.
    pub(crate) fn at_path(&self, path: &Path) -> Result<Option<PoolEntry>> {
        let wanted = match fs::metadata(path) {
            Ok(wanted) => wanted,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => {
                return Err(Error::io(
                    e,
                    format!("{}: cannot be looked at", path.display()),
                ));
            }
        };
        let is_same = |entry: &PoolEntry| {
            fs::metadata(&entry.path).is_ok_and(|known| identity(&known) == identity(&wanted))
        };
        Ok(self.all()?.into_iter().flatten().find(is_same))
    }

    /// Fails unless a pool is still known as it was when its entry was read. Whoever holds the pool's lock finds it so
    /// until the lock is given back, because a pool is forgotten or renamed only under its lock.
    pub(crate) fn refuse_changed(&self, entry: &PoolEntry) -> Result<()> {
        if self.find(&entry.name)? == *entry {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::NotFound,
            format!(
                "pool {}: another pool has got this name meanwhile; look with `ublkctl pool list`",
                entry.name
            ),
        ))
    }

    /// Whether a name is taken, even by an entry that cannot be read.
    pub(crate) fn has(&self, name: &Name) -> bool {
        self.file(name).symlink_metadata().is_ok()
    }

    /// Where a pool's space marks are. No pool's own file has such a name.
    fn marks_file(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{name}.marks"))
    }

    /// A pool's space marks.
    pub(crate) fn marks(&self, name: &Name) -> Result<Marks> {
        Ok(read_json(&self.marks_file(name))?.unwrap_or_default())
    }

    /// Keeps every other command from changing the registry. Makes its directory.
    ///
    /// Who needs a pool's lock too takes that first. Under this lock nobody waits for a pool.
    pub(crate) fn lock(self) -> Result<LockedRegistry> {
        make_private(&self.directory)?;
        // No pool has a name that begins with a dot. The file stays: one that is removed locks nothing.
        let path = self.directory.join(".lock");
        let lock = lock_file(&path, LOCK_WAIT_NS)?;
        Ok(LockedRegistry {
            registry: self,
            _lock: lock,
        })
    }
}

/// The registry while nobody else changes it.
#[derive(Debug)]
pub(crate) struct LockedRegistry {
    registry: Registry,
    /// Closing it gives the lock back.
    _lock: File,
}

impl Deref for LockedRegistry {
    type Target = Registry;

    fn deref(&self) -> &Registry {
        &self.registry
    }
}

impl LockedRegistry {
    /// Writes the entry of a pool that is about to be made, under a name that nobody looks for. What lacks room or rights
    /// fails here, while there is nothing to undo.
    pub(crate) fn reserve(&self, entry: &PoolEntry) -> Result<Reservation<'_>> {
        let PoolEntry { name, path, .. } = entry;
        if self.has(name) {
            return Err(Error::with(
                ErrorKind::AlreadyExists,
                format!(
                    "pool {name}: exists already; choose another name, or see `ublkctl pool status {name}`"
                ),
            ));
        }
        if let Some(known) = self.at_path(path)? {
            return Err(Error::with(
                ErrorKind::AlreadyExists,
                format!(
                    "{}: is pool {} already; destroy or export that first",
                    path.display(),
                    known.name
                ),
            ));
        }
        let staged = stage_json(&self.file(name), entry)?;
        // Marks that an earlier pool of this name left.
        remove_file(&self.marks_file(name))?;
        Ok(Reservation {
            staged,
            _registry: self,
        })
    }

    /// Writes the entry of a known pool under another name, which is free. The pool keeps its old entry too until
    /// that is removed.
    pub(crate) fn reserve_rename(&self, entry: &PoolEntry, to: &Name) -> Result<Reservation<'_>> {
        let renamed = PoolEntry {
            name: to.clone(),
            ..entry.clone()
        };
        // First, because the new entry must not be seen with the marks of an earlier pool.
        match read_json::<Marks>(&self.marks_file(&entry.name))? {
            Some(marks) => write_json(&self.marks_file(to), &marks)?,
            None => remove_file(&self.marks_file(to))?,
        }
        Ok(Reservation {
            staged: stage_json(&self.file(to), &renamed)?,
            _registry: self,
        })
    }

    /// Enters a pool.
    pub(crate) fn add(&self, entry: &PoolEntry) -> Result<()> {
        self.reserve(entry)?.enter()
    }

    /// Gives a pool other space marks.
    pub(crate) fn set_marks(&self, name: &Name, marks: &Marks) -> Result<()> {
        self.find(name)?;
        write_json(&self.marks_file(name), marks)
    }

    /// Forgets a pool, which must be the one that `entry` describes.
    pub(crate) fn remove(&self, entry: &PoolEntry) -> Result<()> {
        self.refuse_changed(entry)?;
        self.forget(&entry.name)
    }

    /// Forgets whatever has this name.
    pub(crate) fn forget(&self, name: &Name) -> Result<()> {
        remove_file(&self.marks_file(name))?;
        remove_file(&self.file(name))
    }
}

/// An entry that is written, and not there yet. Dropping it takes it back.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    staged: Staged,
    /// The name is free for as long as the lock is held.
    _registry: &'a LockedRegistry,
}

impl Reservation<'_> {
    /// Makes the entry count.
    pub(crate) fn enter(self) -> Result<()> {
        self.staged.publish()
    }
}

/// What tells one file from another, and one device from another whatever node names it.
pub(crate) fn identity(metadata: &fs::Metadata) -> (u64, u64, u64) {
    use std::os::unix::fs::FileTypeExt;
    if metadata.file_type().is_block_device() {
        (0, 0, metadata.rdev())
    } else {
        (metadata.dev(), metadata.ino(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(directory: &tempfile::TempDir) -> Registry {
        Registry {
            directory: directory.path().join("pools"),
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
        let locked = registry.clone().lock().unwrap();
        locked.add(&entry("p1")).unwrap();
        locked.add(&entry("p0")).unwrap();
        let all: Vec<PoolEntry> = registry.all().unwrap().into_iter().flatten().collect();
        assert_eq!(all, [entry("p0"), entry("p1")]);
        locked.remove(&entry("p0")).unwrap();
        let error = registry.find(&"p0".parse().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn an_entry_counts_once_it_is_entered() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&directory);
        let locked = registry.clone().lock().unwrap();
        drop(locked.reserve(&entry("p0")).unwrap());
        let reserved = locked.reserve(&entry("p0")).unwrap();
        assert!(registry.all().unwrap().is_empty());
        reserved.enter().unwrap();
        assert_eq!(registry.find(&"p0".parse().unwrap()).unwrap(), entry("p0"));
        let error = locked.reserve(&entry("p0")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        // The entry and the lock: no temporary file is left.
        let files = fs::read_dir(directory.path().join("pools")).unwrap();
        assert_eq!(files.count(), 2);
    }

    #[test]
    fn another_pool_of_the_name_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let locked = registry(&directory).lock().unwrap();
        locked.add(&entry("p0")).unwrap();
        let other = PoolEntry {
            id: "1".into(),
            ..entry("p0")
        };
        let error = locked.remove(&other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(locked.find(&"p0".parse().unwrap()).unwrap(), entry("p0"));
    }

    #[test]
    fn marks_go_with_their_pool() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&directory).lock().unwrap();
        let name = "p0".parse().unwrap();
        let marks = "50".parse().unwrap();
        assert!(registry.set_marks(&name, &marks).is_err());
        registry.add(&entry("p0")).unwrap();
        assert_eq!(registry.marks(&name).unwrap(), Marks::default());
        registry.set_marks(&name, &marks).unwrap();
        assert_eq!(registry.marks(&name).unwrap(), marks);
        assert_eq!(registry.all().unwrap().len(), 1);
        registry.remove(&entry("p0")).unwrap();
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
        let registry = registry(&directory).lock().unwrap();
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
            let error = registry.find(&name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{text}");
            assert!(error.to_string().contains("--force p0"), "{error}");
        }
    }
}
