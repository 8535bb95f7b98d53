//! The block devices that lie on volumes' devices (partitions, device mapper, RAID, loop devices), and the file systems
//! that are mounted on them: everything whose cached writes belong to the volumes.
//!
//! An incomplete stack would make a snapshot miss data. So what cannot be looked at is an error. The exception are mounts
//! that no process shows: the kernel gives a device to one holder only, and tells that there is one.

mod block;
pub(super) mod loops;
mod mounts;

pub use mounts::{FileSystem, MountPoint};

use crate::error::{Error, Result};
use block::Number;
use loops::Loop;
use mounts::Mounts;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// A block device that lies on a volume's device, or that device itself.
#[derive(Debug)]
pub struct Layer {
    /// The kernel's name for it, for example `ublkb0p1` or `dm-0`.
    pub name: String,
    /// The file systems that are mounted on it, in any mount namespace that has a process. A file system on several
    /// devices belongs to the topmost of them.
    pub file_systems: Vec<FileSystem>,
    /// Whether something has it exclusively that is neither a mount, nor swap, nor another layer. That may be a file
    /// system which was unmounted lazily, or one in a mount namespace without a process.
    pub has_hidden_holder: bool,
    number: Number,
    /// Whether a mount, swap or another device is known to have it exclusively.
    is_claimed: bool,
    /// The disk of a partition.
    disk: Option<String>,
}

impl Layer {
    /// Opens the device for reading. Nothing is read from it.
    pub fn open(&self) -> Result<File> {
        block::open(&self.name, self.number, 0)
            .map_err(|e| Error::io(e, format!("{}: cannot be opened", self.shown())))
    }

    /// The device's path, for messages.
    pub fn shown(&self) -> String {
        block::node(&self.name).display().to_string()
    }
}

/// All layers of some volumes' devices.
#[derive(Debug)]
pub struct Stack {
    layers: Vec<Layer>,
    mounts: Mounts,
}

impl Stack {
    /// Finds what lies on these ublk devices now.
    pub fn above(dev_ids: &[u32]) -> Result<Self> {
        let mounts = Mounts::of_all_processes()?;
        let mut search = Search {
            loops: loops::bound(&mounts)?,
            swaps: block::swaps()?,
            mounts: &mounts,
            seen: BTreeSet::new(),
            file_systems: BTreeSet::new(),
            layers: Vec::new(),
        };
        for dev_id in dev_ids {
            search.visit(&format!("ublkb{dev_id}"))?;
        }
        let mut layers = search.layers;
        find_hidden_holders(&mut layers)?;
        Ok(Self { layers, mounts })
    }

    /// The layers. A device comes after every device that lies on it.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The file system or device of this stack that a path lies on or leads to, if there is one.
    pub fn carrier_of(&self, path: &Path) -> Result<Option<String>> {
        let failed = |e| Error::io(e, format!("{}: cannot be looked at", path.display()));
        let metadata = fs::metadata(path).map_err(failed)?;
        if metadata.file_type().is_block_device() {
            let number = Number::of_device(metadata.rdev());
            let mut layers = self.layers.iter();
            return Ok(layers
                .find(|layer| layer.number == number)
                .map(Layer::shown));
        }
        let number = self.mounts.file_system_of(path).map_err(failed)?;
        let mut file_systems = self.layers.iter().flat_map(|layer| &layer.file_systems);
        Ok(file_systems
            .find(|file_system| file_system.number == number)
            .map(FileSystem::shown))
    }
}

/// A walk up from the volumes' devices.
struct Search<'a> {
    mounts: &'a Mounts,
    loops: Vec<Loop>,
    swaps: BTreeSet<Number>,
    seen: BTreeSet<String>,
    file_systems: BTreeSet<Number>,
    layers: Vec<Layer>,
}

impl Search<'_> {
    /// Adds everything that lies on a device, then the device.
    fn visit(&mut self, name: &str) -> Result<()> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        // A device that is gone carries nothing.
        let Some(number) = block::number(name)? else {
            return Ok(());
        };
        let holders = block::holders(name)?;
        let partitions = block::partitions(name)?;
        for above in partitions.iter().chain(&holders) {
            self.visit(above)?;
        }
        // A file system on a single device has the device's number, also where its mount is out of sight.
        let on_device = [loops::Backing::Device(number), loops::Backing::File(number)];
        self.visit_loops(|backing| on_device.contains(backing))?;
        let mut file_systems = self.mounts.on_device(name, number);
        let is_mounted = !file_systems.is_empty();
        file_systems.retain(|file_system| self.file_systems.insert(file_system.number));
        for file_system in &file_systems {
            self.visit_loops(|backing| *backing == loops::Backing::File(file_system.number))?;
        }
        self.layers.push(Layer {
            disk: block::disk_of(name)?,
            is_claimed: is_mounted || !holders.is_empty() || self.swaps.contains(&number),
            name: name.to_owned(),
            file_systems,
            has_hidden_holder: false,
            number,
        });
        Ok(())
    }

    fn visit_loops(&mut self, is_over: impl Fn(&loops::Backing) -> bool) -> Result<()> {
        let over = self.loops.iter().filter(|device| is_over(&device.backing));
        let names: Vec<String> = over.map(|device| device.name.clone()).collect();
        names.iter().try_for_each(|name| self.visit(name))
    }
}

/// Asks the kernel about each device for which no exclusive holder was found. A disk counts as held while one of its
/// partitions is, and the other way round.
fn find_hidden_holders(layers: &mut [Layer]) -> Result<()> {
    let is_claimed = |name: &str| {
        layers.iter().any(|layer| {
            layer.is_claimed && (layer.name == name || layer.disk.as_deref() == Some(name))
        })
    };
    let unexplained = layers.iter().map(|layer| {
        !is_claimed(&layer.name)
            && !layer.disk.as_deref().is_some_and(|disk| {
                layers
                    .iter()
                    .any(|other| other.is_claimed && other.name == disk)
            })
    });
    let unexplained: Vec<bool> = unexplained.collect();
    for (layer, is_unexplained) in layers.iter_mut().zip(unexplained) {
        layer.has_hidden_holder = is_unexplained
            && block::is_held(&layer.name, layer.number).map_err(|e: io::Error| {
                Error::io(e, format!("{}: cannot be opened", layer.shown()))
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "needs /proc and /sys")]
    fn nothing_lies_on_a_device_that_is_not_there() {
        let stack = Stack::above(&[u32::MAX]).unwrap();
        assert!(stack.layers().is_empty());
        assert_eq!(stack.carrier_of(Path::new("/proc")).unwrap(), None);
        assert!(stack.carrier_of(Path::new("/no such path")).is_err());
    }
}
