//! What a command and its guard tell each other, a line of JSON at a time.

use serde::{Deserialize, Serialize};
use std::os::fd::RawFd;

/// The first line for the guard. A second line, or the end, asks it to thaw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Orders {
    /// What to flush, in this order.
    pub(super) layers: Vec<LayerOrders>,
    /// For how long to freeze it at most, if at all.
    pub(super) freeze_seconds: Option<u32>,
}

/// A device and the file systems on it, as descriptors that the guard has inherited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerOrders {
    /// The device.
    pub(super) device: RawFd,
    /// The file systems.
    pub(super) file_systems: Vec<RawFd>,
    /// Whether the kernel has to be asked for a file system that cannot be opened.
    pub(super) is_hidden: bool,
}

/// A device, or a file system on it, by its place in the orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Which device.
    pub(super) layer: usize,
    /// Which file system on it; none for the device itself.
    pub(super) file_system: Option<usize>,
}

/// What was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Step {
    /// To open it.
    Open,
    /// To flush it.
    Flush,
    /// To freeze it.
    Freeze,
    /// To thaw it.
    Thaw,
}

/// A step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fault {
    /// Which step.
    pub(super) step: Step,
    /// With what.
    pub(super) place: Place,
    /// The system's error number.
    pub(super) errno: i32,
}

/// A line from the guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Report {
    /// A file system is about to be frozen.
    Freezing(Place),
    /// Everything is flushed and, if so ordered, frozen.
    Ready,
    /// A step failed. Everything that was frozen will be thawed.
    Failed(Fault),
    /// The last line: nothing is frozen any more, but for these faults.
    Thawed {
        /// Whether everything stayed frozen until the guard was asked to thaw.
        in_time: bool,
        /// What could not be thawed.
        faults: Vec<Fault>,
    },
}
