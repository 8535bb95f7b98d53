//! The registry: which pools this machine knows, and where each of them lives. One JSON file for each pool.
//! Everything here is read back as hostile: names are parsed, files are limited, and a bad one is an error with its path.

use super::files::{make_private, read_json, remove_file, write_json};
use super::{STATE_DIR, STATE_DIR_DEFAULT, directory};
use crate::marks::Marks;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
}
