//! Volumes as `/dev/ublkbN`: the kernel's ublk driver hands the requests of a block device to this process.
//!
//! What happens, in order:
//!
//! 1. [`Served::add`] asks the driver for its features and adds a device with those that help (`steps`). The threads that
//!    send control commands have a watchdog in front of them (`control`), so that a kernel that hangs is an error.
//! 2. Each queue gets a thread and a ring (`queue`), and fetches for each tag (`fetch`): such an entry is answered when the
//!    kernel has a request for that tag.
//! 3. The driver gets the parameters (`params`) and starts: it waits for all fetches, then makes `/dev/ublkbN`. The
//!    kernel reads the partition table through the queues before `add` returns.
//! 4. A request that is one run of blocks is begun and answered by the queue's loop (`serving`). Any other is given to the
//!    volume by its tag's task (`request`), which works on the pool's file through the same ring (`ring_device`). What it
//!    waits for in another thread wakes this one (`wake`). The bytes are in the client's pages (`registered`), or in
//!    buffers (`arena`) that the driver copies from and to. The result goes back with the next fetch of that tag.
//! 5. A [`Claim`] sees that nobody has the device. [`Served::stop`] stops it, which answers everything first.
//!    [`Served::delete`] waits until the fetches, the threads and the rings have ended, and then deletes the device.
//! 6. Or the process dies, or [`Served::abandon`]s the device. The kernel sees the rings close, keeps the block device,
//!    and parks its requests, those under way too. [`Served::recover`] in the next process fetches again, and the parked
//!    requests come. A write that was under way may so be carried out twice.

mod arena;
mod claim;
mod command;
mod control;
mod driver;
mod fetch;
mod holders;
mod mark;
mod nodes;
mod params;
mod partitions;
mod queue;
mod recover;
mod registered;
mod request;
mod ring_device;
mod served;
mod serving;
mod stack;
mod steps;
mod sysfs;
mod task;
mod wake;

pub use claim::{Claim, Claimed};
pub use control::refuse_stuck;
pub use driver::{Check, Driver, driver};
pub use holders::{Holder, Process};
pub use partitions::await_partitions;
pub use recover::{KernelDevice, Phase, device_state, forget, is_gone, orphans};
pub use served::{DeviceOptions, DeviceState, Served};
pub use stack::{FileSystem, Layer, MountPoint, Stack};

use libublk::UblkError;
use std::io;
use std::path::PathBuf;

/// The block device of a number.
fn block_path(dev_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{dev_id}"))
}

/// The control file of a device, which its daemon holds open.
fn char_path(dev_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{dev_id}"))
}

/// The system's error in libublk's.
fn os_error(error: &UblkError) -> io::Error {
    let code = match error {
        UblkError::UringIOError(code) | UblkError::OtherError(code) => -code,
        UblkError::IOError(e) => e.raw_os_error().unwrap_or(libc::EIO),
        UblkError::InvalidVal => libc::EINVAL,
        UblkError::UringTimeout => libc::ETIMEDOUT,
        UblkError::QueueIsDown => libc::ENODEV,
        UblkError::UringIoQueued | UblkError::JsonError(_) => libc::EIO,
    };
    io::Error::from_raw_os_error(code)
}
