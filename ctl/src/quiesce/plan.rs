//! What has to be flushed, opened: each device with the file systems on it, the topmost device first.

use blockfork::error::{Error, ErrorKind, Result};
use blockfork::ublk::{Layer, Stack};
use std::fs::File;
use std::os::fd::AsRawFd;

use super::messages::{LayerOrders, Place};

/// Open devices and file systems.
#[derive(Debug)]
pub(super) struct Plan {
    layers: Vec<OpenLayer>,
}

/// A device, and what is mounted on it.
#[derive(Debug)]
struct OpenLayer {
    shown: String,
    device: File,
    file_systems: Vec<(String, File)>,
    /// Whether only the kernel can reach a file system on it.
    is_hidden: bool,
}

impl Plan {
    /// Opens everything in a stack. A file system that nobody can open is left to the kernel, if the kernel can find it.
    pub(super) fn of(stack: &Stack) -> Result<Self> {
        let layers = stack.layers().iter().map(OpenLayer::open);
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// What the user has to know about a flush that went well.
    pub(super) fn notes(&self) -> Vec<String> {
        let hidden = self.layers.iter().filter(|layer| layer.is_hidden);
        hidden
            .map(|layer| {
                format!(
                    "{}: something holds it that is mounted nowhere in sight (after `umount -l`, for example); the kernel was asked to flush that, and does not tell errors",
                    layer.shown
                )
            })
            .collect()
    }

    /// Refuses if a file system could only be flushed.
    pub(super) fn refuse_unfreezable(&self) -> Result<()> {
        let Some(layer) = self.layers.iter().find(|layer| layer.is_hidden) else {
            return Ok(());
        };
        Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{}: something holds it that is mounted nowhere in sight (after `umount -l`, for example), so it cannot be frozen; nothing is frozen",
                layer.shown
            ),
        ))
    }

    /// The same for the guard, by descriptor.
    pub(super) fn orders(&self) -> Vec<LayerOrders> {
        let layers = self.layers.iter().map(|layer| LayerOrders {
            device: layer.device.as_raw_fd(),
            file_systems: layer
                .file_systems
                .iter()
                .map(|(_, file)| file.as_raw_fd())
                .collect(),
            is_hidden: layer.is_hidden,
        });
        layers.collect()
    }

    /// All open files.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        self.layers.iter().flat_map(|layer| {
            std::iter::once(&layer.device).chain(layer.file_systems.iter().map(|(_, file)| file))
        })
    }

    /// A device or file system that a report names, for messages.
    pub(super) fn shown(&self, place: Place) -> String {
        let Some(layer) = self.layers.get(place.layer) else {
            return format!("device {}", place.layer);
        };
        let file_system = place.file_system.and_then(|at| layer.file_systems.get(at));
        file_system.map_or_else(|| layer.shown.clone(), |(shown, _)| shown.clone())
    }

    /// An open file system that a report names.
    pub(super) fn file_system(&self, place: Place) -> Option<&File> {
        let layer = self.layers.get(place.layer)?;
        let (_, file) = layer.file_systems.get(place.file_system?)?;
        Some(file)
    }
}

impl OpenLayer {
    fn open(layer: &Layer) -> Result<Self> {
        let mut file_systems = Vec::new();
        let mut is_hidden = layer.has_hidden_holder;
        for file_system in &layer.file_systems {
            let shown = file_system.shown();
            match file_system.open() {
                Some(file) => file_systems.push((shown, file)),
                None if file_system.is_known_by_device() => is_hidden = true,
                None => {
                    return Err(Error::with(
                        ErrorKind::Busy,
                        format!(
                            "{}: {shown} cannot be reached to be flushed, another mount hides it; unmount that, or use --no-sync to go without",
                            layer.shown()
                        ),
                    ));
                }
            }
        }
        Ok(Self {
            shown: layer.shown(),
            device: layer.open()?,
            file_systems,
            is_hidden,
        })
    }
}
