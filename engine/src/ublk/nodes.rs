//! The nodes of a device below /dev, moved out of sight while the device is taken away or rolled back: nobody opens it in
//! between, not even a program that needs no claim.
//!
//! A node that somebody made elsewhere stays in sight. The nodes come back when the device stays, and are removed when it
//! is gone.

use super::{holders, sysfs};
use crate::error::{Error, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const FOLDER: &str = "/dev";
/// What the name of a node begins with that is out of sight.
const HIDDEN: &str = ".claimed-";

/// The nodes of a device and of its partitions, out of sight until this is dropped.
#[derive(Debug)]
pub(super) struct HiddenNodes {
    names: Vec<OsString>,
}

impl HiddenNodes {
    /// Hides all nodes that can be hidden.
    pub(super) fn hide(dev_id: u32) -> Result<Self> {
        let mut names = sysfs::partitions(dev_id)?;
        names.push(sysfs::block_name(dev_id));
        let mut hidden = Self { names: Vec::new() };
        for name in names {
            match fs::rename(node(&name), hidden_node(&name)) {
                Ok(()) => hidden.names.push(name),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                // A container can have the node mounted on its own. Then a program may still open it.
                Err(e) => tracing::debug!("{}: stays in sight: {e}", node(&name).display()),
            }
        }
        Ok(hidden)
    }
}

impl Drop for HiddenNodes {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(e) = show(name) {
                tracing::warn!("{e}");
            }
        }
    }
}

/// Shows the nodes that a process hid which was killed before it could show them again.
pub(super) fn show_all(dev_id: u32) -> Result<()> {
    let mut names = sysfs::partitions(dev_id)?;
    names.push(sysfs::block_name(dev_id));
    names
        .iter()
        .filter(|name| hidden_node(name).exists())
        .try_for_each(|name| show(name))
}

/// Shows a node again, or removes it if the device of its number is gone or has a new node.
fn show(name: &OsStr) -> Result<()> {
    let (node, hidden) = (node(name), hidden_node(name));
    let failed = |e| Error::io(e, format!("{}: cannot be moved back", hidden.display()));
    let number = fs::metadata(&hidden).map_err(failed)?.rdev();
    if holders::number_of(name)? == Some((libc::major(number), libc::minor(number))) {
        match renameat_with(CWD, &hidden, CWD, &node, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    fs::remove_file(&hidden).map_err(failed)
}

fn node(name: &OsStr) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn hidden_node(name: &OsStr) -> PathBuf {
    let mut hidden = OsString::from(HIDDEN);
    hidden.push(name);
    Path::new(FOLDER).join(hidden)
}
