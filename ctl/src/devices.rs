//! The devices of a pool: which volume each serves, in memory, on disk and as a link under /dev/blockfork. Beside them
//! what is served over NBD, because both are attached, and no volume is twice.
//!
//! The file on disk is written before a device is announced and after it is gone, so whoever opens the pool after a
//! kill knows every device that somebody may be using. Without a daemon its entries count as attached, served by nobody.

use crate::exit_code::one_line;
use crate::exports::Exports;
use crate::protocol::DeviceRow;
use crate::state::{self, Runtime};
use crate::udev;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::pool::OnFull;
use blockfork::ublk::{DeviceState, Served, is_gone};
use blockfork::units::VolumeId;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{info, warn};

/// Where the links by name are.
const LINKS: &str = "/dev/blockfork";

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Saved {
    /// The pool's identity.
    pool: String,
    /// The boot that the device numbers belong to.
    boot: [u8; 16],
    /// The devices.
    devices: Vec<DeviceEntry>,
}

/// A device as the file describes it: enough to serve it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceEntry {
    /// What it serves.
    pub(crate) path: VolumePath,
    /// Its number, by which a volume that took the name later is told apart.
    pub(crate) id: VolumeId,
    /// Whether it refuses writes.
    pub(crate) read_only: bool,
    /// What a write does that finds no space.
    #[serde(default)]
    pub(crate) on_full: OnFull,
    /// What the frontend needs to recover it.
    pub(crate) state: DeviceState,
}

impl DeviceEntry {
    /// `/dev/ublkbN`.
    pub(crate) fn node(&self) -> String {
        format!("/dev/ublkb{}", self.state.dev_id)
    }

    /// Whether the kernel no longer has the device. If the kernel cannot be asked, the device counts as there.
    pub(crate) fn is_gone(&self) -> bool {
        is_gone(&self.state).unwrap_or_else(|e| {
            warn!(device = %self.node(), "cannot be asked about: {}", one_line(&e));
            false
        })
    }
}

/// What serves a device.
#[derive(Debug)]
pub(crate) enum Service {
    /// This daemon, once the device is attached.
    Attaching,
    /// This daemon.
    Served(Arc<Served>),
    /// This daemon, until the command that takes the device away has done so.
    Detaching,
    /// Nobody: there is no daemon, or it could not recover the device.
    Waiting,
}

/// A device and, in a daemon, what serves it.
#[derive(Debug)]
pub(crate) struct Slot {
    /// What is on disk.
    pub(crate) entry: DeviceEntry,
    /// What serves it.
    pub(crate) service: Service,
    /// Why it is not served, or why it could not be taken away.
    pub(crate) fault: Option<String>,
}

impl Slot {
    /// A device whose daemon is gone.
    fn waiting(entry: DeviceEntry) -> Self {
        Self {
            entry,
            service: Service::Waiting,
            fault: None,
        }
    }

    /// The frontend, where this daemon serves the device and no command takes it away.
    pub(crate) fn served(&self) -> Option<&Arc<Served>> {
        match &self.service {
            Service::Served(served) => Some(served),
            Service::Attaching | Service::Detaching | Service::Waiting => None,
        }
    }

    /// The device as the protocol shows it.
    pub(crate) fn row(&self) -> DeviceRow {
        let failure = self.served().and_then(|served| served.has_failed());
        DeviceRow {
            path: self.entry.path.clone(),
            id: self.entry.id,
            device: self.entry.node(),
            read_only: self.entry.read_only,
            served: match self.service {
                Service::Served(_) => failure.is_none(),
                Service::Detaching => true,
                Service::Attaching | Service::Waiting => false,
            },
            fault: failure.map(|e| one_line(&e)).or_else(|| self.fault.clone()),
        }
    }

    /// What to do about the device where it is in the way.
    fn advice(&self, pool: &Name) -> String {
        match (&self.service, &self.fault) {
            (Service::Served(_), _) => "detach it first".to_owned(),
            (Service::Attaching, _) => "it is just being attached".to_owned(),
            (Service::Detaching, _) => "it is just being detached".to_owned(),
            (Service::Waiting, None) => {
                format!("its daemon is gone, `ublkctl recover {pool}` brings it back")
            }
            (Service::Waiting, Some(fault)) => format!(
                "nothing serves it: {fault}; `ublkctl detach --force {}` gives it up",
                self.entry.node()
            ),
        }
    }
}

/// All devices of a pool.
#[derive(Debug)]
pub(crate) struct Devices {
    pool: Name,
    id: String,
    boot: [u8; 16],
    file: PathBuf,
    slots: Vec<Slot>,
    exports: Exports,
}

impl Devices {
    /// What the file says, less what the kernel does not have any more.
    pub(crate) fn load(runtime: &Runtime, pool: &Name, id: String, boot: [u8; 16]) -> Result<Self> {
        let mut devices = Self::saved(runtime, pool, id, boot)?;
        devices.drop_gone(DeviceEntry::is_gone);
        Ok(devices)
    }

    /// What the file says.
    pub(crate) fn saved(
        runtime: &Runtime,
        pool: &Name,
        id: String,
        boot: [u8; 16],
    ) -> Result<Self> {
        let file = runtime.devices();
        let saved = state::read_json::<Saved>(&file)?
            .filter(|saved| saved.pool == id && saved.boot == boot);
        let entries = saved.map_or_else(Vec::new, |saved| saved.devices);
        Ok(Self {
            slots: entries.into_iter().map(Slot::waiting).collect(),
            exports: Exports::default(),
            pool: pool.clone(),
            id,
            boot,
            file,
        })
    }

    /// Refuses while the file names devices of another pool of this name, which has another state directory: its next
    /// daemon needs the file as it is.
    pub(crate) fn refuse_of_another_pool(
        runtime: &Runtime,
        id: &str,
        boot: [u8; 16],
    ) -> Result<()> {
        let file = runtime.devices();
        let Some(saved) = state::read_json::<Saved>(&file)? else {
            return Ok(());
        };
        let live = saved.devices.iter().filter(|entry| !entry.is_gone());
        let nodes: Vec<String> = live.map(DeviceEntry::node).collect();
        if saved.pool == id || saved.boot != boot || nodes.is_empty() {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{}: another pool of this name, {}, has {} and no daemon; recover or detach those with its state directory, and give each state directory a runtime directory of its own, {}",
                file.display(),
                saved.pool,
                nodes.join(" "),
                state::RUNTIME_DIR
            ),
        ))
    }

    /// Writes the file.
    pub(crate) fn save(&self) -> Result<()> {
        let saved = Saved {
            pool: self.id.clone(),
            boot: self.boot,
            devices: self.slots.iter().map(|slot| slot.entry.clone()).collect(),
        };
        state::write_json(&self.file, &saved)
    }

    /// Whether nothing is attached: no device, and nothing over NBD.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.exports.is_empty()
    }

    /// What is served over NBD.
    pub(crate) fn exports(&self) -> &Exports {
        &self.exports
    }

    /// What is served over NBD, to change it.
    pub(crate) fn exports_mut(&mut self) -> &mut Exports {
        &mut self.exports
    }

    /// How many devices there are.
    pub(crate) fn count(&self) -> u64 {
        self.slots.len() as u64
    }

    /// The devices, in the order in which they were attached.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The device of this volume or snapshot.
    pub(crate) fn find(&self, path: &VolumePath) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.entry.path == *path)
    }

    /// Adds a device and writes the file. Another entry of the same number is stale: the kernel has just given the number
    /// away.
    pub(crate) fn add(&mut self, slot: Slot) -> Result<()> {
        let dev_id = slot.entry.state.dev_id;
        self.drop_gone(|entry| entry.state.dev_id == dev_id);
        self.slots.push(slot);
        self.save()
    }

    /// The device of this volume or snapshot, to change it; [`Devices::save`] what changes its entry.
    pub(crate) fn find_mut(&mut self, path: &VolumePath) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.entry.path == *path)
    }

    /// Lets go of the frontends of all devices.
    pub(crate) fn release(&mut self) -> Vec<(DeviceEntry, Arc<Served>)> {
        let mut released = Vec::new();
        for slot in &mut self.slots {
            match std::mem::replace(&mut slot.service, Service::Waiting) {
                Service::Served(served) => released.push((slot.entry.clone(), served)),
                other @ (Service::Attaching | Service::Detaching | Service::Waiting) => {
                    slot.service = other;
                }
            }
        }
        released
    }

    /// Takes a device out; the file still names it until [`Devices::save`].
    pub(crate) fn take(&mut self, path: &VolumePath) -> Option<Slot> {
        let index = self
            .slots
            .iter()
            .position(|slot| slot.entry.path == *path)?;
        Some(self.slots.remove(index))
    }

    /// Takes out the devices that `is_gone`.
    pub(crate) fn drop_gone(&mut self, is_gone: impl Fn(&DeviceEntry) -> bool) {
        let (gone, kept) = self.slots.drain(..).partition(|slot| is_gone(&slot.entry));
        self.slots = kept;
        let gone: Vec<Slot> = gone;
        for slot in &gone {
            self.unlink(&slot.entry);
        }
    }

    /// An error if any device in `blockers` exists: all of them, and the way out.
    pub(crate) fn refuse<'a>(
        &'a self,
        action: &str,
        blockers: impl Iterator<Item = &'a Slot>,
    ) -> Result<()> {
        let mut shown = Vec::new();
        let mut all_advice: Vec<String> = Vec::new();
        for slot in blockers {
            let (path, node) = (&slot.entry.path, slot.entry.node());
            shown.push(format!("{}/{path} as {node}", self.pool));
            let advice = slot.advice(&self.pool);
            if !all_advice.contains(&advice) {
                all_advice.push(advice);
            }
        }
        if shown.is_empty() {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{}: cannot {action} while attached: {}; {}",
                self.pool,
                shown.join(", "),
                all_advice.join("; ")
            ),
        ))
    }

    /// Makes the link of a device. A device without its link works, so a failure is only logged.
    pub(crate) fn link(&self, entry: &DeviceEntry) {
        let link = self.link_path(&entry.path);
        if let Err(e) = make_link(&link, &entry.node()) {
            warn!(link = %link.display(), "cannot be made: {e}");
        }
    }

    /// Removes the link of a device that is gone, if it is this device's, and what udev's rules were told of it.
    pub(crate) fn unlink(&self, entry: &DeviceEntry) {
        udev::forget(entry.state.dev_id, &self.pool, &entry.path);
        let link = self.link_path(&entry.path);
        if fs::read_link(&link).is_ok_and(|to| to == Path::new(&entry.node()))
            && let Err(e) = fs::remove_file(&link)
        {
            warn!(link = %link.display(), "cannot be removed: {e}");
        }
        // Fails while another volume's link is there, which is as it should be.
        if let Some(directory) = link.parent()
            && fs::remove_dir(directory).is_ok()
        {
            info!(pool = %self.pool, "no link is left");
        }
    }

    fn link_path(&self, path: &VolumePath) -> PathBuf {
        Path::new(LINKS)
            .join(self.pool.as_str())
            .join(path.to_string())
    }
}

/// Replaces a link in one step. Tries again where the directory went meanwhile: udev removes it with the last link to a
/// partition, unless another link is there already.
fn make_link(link: &Path, target: &str) -> io::Result<()> {
    let try_once = || try_to_link(link, target);
    let is_gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    try_once().or_else(|e| if is_gone(&e) { try_once() } else { Err(e) })
}

fn try_to_link(link: &Path, target: &str) -> io::Result<()> {
    let directory = link.parent().unwrap_or(Path::new("/"));
    make_open_directory(directory)?;
    let (temporary, ()) = state::make_temporary(directory, |path| symlink(target, path))?;
    fs::rename(&temporary, link).inspect_err(|_| {
        if let Err(e) = fs::remove_file(&temporary) {
            warn!(link = %temporary.display(), "cannot be removed: {e}");
        }
    })
}

/// Makes a directory and those above it, so that everybody can follow the links in it whatever the umask: what a device
/// may be used for is said by the rights of its node.
fn make_open_directory(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => match directory.parent() {
            Some(above) => {
                make_open_directory(above)?;
                make_open_directory(directory)
            }
            None => Err(e),
        },
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("p0/v@s");
        make_link(&link, "/dev/ublkb0").unwrap();
        make_link(&link, "/dev/ublkb1").unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/dev/ublkb1"));
        // A volume of any name beside it keeps its link.
        make_link(&directory.path().join("p0/v@s.new"), "/dev/ublkb2").unwrap();
        make_link(&link, "/dev/ublkb3").unwrap();
        assert_eq!(
            fs::read_dir(directory.path().join("p0")).unwrap().count(),
            2
        );
        let folder = fs::metadata(directory.path().join("p0")).unwrap();
        assert_eq!(folder.permissions().mode() & 0o777, 0o755);
    }
}
