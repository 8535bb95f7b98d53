//! Devices whose daemon died: what the driver says of them, taking them over, and forgetting them.

use super::command::Commands;
use super::control::Ask;
use super::mark::{self, is_ours};
use super::served::DeviceState;
use super::{block_path, holders, params, steps, sysfs};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Attached;
use libublk::sys;
use serde::{Deserialize, Serialize};
use std::thread;
use std::time::Duration;

/// How long an old daemon, and its I/O, may take to vanish.
const OLD_DAEMON_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// What the driver knows of a device, served by this process or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDevice {
    /// Its shape, as a daemon keeps it.
    pub state: DeviceState,
    /// What the driver makes of its daemon.
    pub phase: Phase,
    /// The process that serves it or served it last.
    pub pid: i32,
    /// Whether this program made it, as opposed to another ublk server.
    pub is_ours: bool,
}

/// The driver's view of a device's daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not started, or stopped: there is no block device.
    Dead,
    /// Served.
    Live,
    /// The daemon is gone; requests wait for the next one.
    Quiesced,
    /// The daemon is gone; requests fail.
    Failing,
    /// What this program does not know.
    Unknown,
}

impl Phase {
    fn of(state: u16) -> Self {
        match u32::from(state) {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => Self::Failing,
            _ => Self::Unknown,
        }
    }
}

/// What the driver knows of a device, `None` if it has none of this number.
pub fn device_state(dev_id: u32) -> Result<Option<KernelDevice>> {
    if !sysfs::has_device(dev_id) {
        return Ok(None);
    }
    Ask::query(dev_id, "GET_DEV_INFO").run(move |commands| info(commands, dev_id))
}

fn info(commands: &mut Commands, dev_id: u32) -> Result<Option<KernelDevice>> {
    let info = commands.info(dev_id);
    let info = info.map_err(|e| {
        Error::io(
            e,
            format!("{}: cannot be asked about", block_path(dev_id).display()),
        )
    })?;
    Ok(info.map(|info| KernelDevice {
        state: DeviceState::of(&info),
        phase: Phase::of(info.state),
        pid: info.ublksrv_pid,
        is_ours: is_ours(info.ublksrv_flags),
    }))
}

/// Whether the kernel no longer has the device that a daemon noted, so that nobody can be using it. Another device may have
/// its number by now.
pub fn is_gone(noted: &DeviceState) -> Result<bool> {
    match device_state(noted.dev_id)? {
        Some(device) if device.state.mark == noted.mark => clear_dead(&device),
        Some(_) | None => Ok(true),
    }
}

/// Deletes a device that was stopped, or was never started, and that no process serves: there is no block device, and
/// nobody else would clean it away. False if the device is not like that.
fn clear_dead(device: &KernelDevice) -> Result<bool> {
    let dev_id = device.state.dev_id;
    let is_dead = device.phase == Phase::Dead && holders::servers(dev_id).is_empty();
    if is_dead {
        steps::delete(dev_id)?;
    }
    Ok(is_dead)
}

/// An error where the kernel has a device of the same volume: whoever uses that would not see what is written through
/// another one.
pub(super) fn refuse_twin(attached: &Attached) -> Result<()> {
    for dev_id in sysfs::devices() {
        let Some(device) = device_state(dev_id)? else {
            continue;
        };
        let is_twin = mark::is_of(device.state.mark, attached.pool_id(), attached.id());
        if is_twin && !clear_dead(&device)? {
            let (node, path) = (block_path(dev_id), attached.path());
            let node = node.display();
            let message = format!(
                "{path}: the kernel still has {node} of it, which no daemon of the pool knows; unmount it, then `ublkctl detach --force {node}` gives it up"
            );
            return Err(Error::with(ErrorKind::Busy, message));
        }
    }
    Ok(())
}

/// All devices that this program made and no process serves.
pub fn orphans() -> Result<Vec<KernelDevice>> {
    let mut orphans = Vec::new();
    for dev_id in sysfs::devices() {
        if let Some(device) = device_state(dev_id)?
            && device.is_ours
            && holders::servers(dev_id).is_empty()
        {
            orphans.push(device);
        }
    }
    Ok(orphans)
}

/// Deletes a device whose daemon is gone: its parked requests fail, and what was not flushed from the page cache is lost.
/// Refused while its daemon lives, and for another program's device. The caller has sealed it with a
/// [`Claim`](super::Claim), and `release` gives the claim back.
pub fn forget(dev_id: u32, release: impl FnOnce() -> Result<()>) -> Result<()> {
    let shown = block_path(dev_id);
    let shown = shown.display();
    let Some(device) = device_state(dev_id)? else {
        return Ok(());
    };
    if !device.is_ours {
        return Err(foreign(dev_id));
    }
    if let Some(server) = holders::servers(dev_id).first() {
        let message = format!("{shown}: its control file is {server}; stop that daemon first");
        return Err(Error::with(ErrorKind::Busy, message));
    }
    steps::stop(dev_id, release)?;
    steps::delete(dev_id)
}

fn foreign(dev_id: u32) -> Error {
    let shown = block_path(dev_id);
    Error::with(
        ErrorKind::NotFound,
        format!(
            "{}: is another program's device now; attach the volume anew",
            shown.display()
        ),
    )
}

/// Makes a device ready for this process's queues, once its old daemon is gone.
pub(super) fn take_over(state: &DeviceState) -> Result<()> {
    let dev_id = state.dev_id;
    let shown = block_path(dev_id);
    let shown = shown.display();
    let mut waited = Duration::ZERO;
    loop {
        let Some(device) = device_state(dev_id)? else {
            let message = format!("{shown}: is gone; attach the volume anew");
            return Err(Error::with(ErrorKind::NotFound, message));
        };
        if device.state.mark != state.mark {
            return Err(foreign(dev_id));
        }
        if device.state.flags & params::RECOVERY == 0 {
            let message = format!(
                "{shown}: this kernel's devices do not outlive their daemon; attach the volume anew"
            );
            return Err(Error::with(ErrorKind::Unsupported, message));
        }
        let is_dead = device.phase == Phase::Dead;
        if clear_dead(&device)? {
            let message =
                format!("{shown}: was never started, or was stopped; attach the volume anew");
            return Err(Error::with(ErrorKind::NotFound, message));
        }
        let started = !is_dead
            && Ask::of(dev_id, "START_USER_RECOVERY").run(move |commands| {
                match commands.start_recovery(dev_id) {
                    Ok(()) => Ok(true),
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(false),
                    Err(e) => {
                        let shown = block_path(dev_id);
                        Err(Error::io(
                            e,
                            format!("{}: cannot be recovered", shown.display()),
                        ))
                    }
                }
            })?;
        if started {
            return Ok(());
        }
        if waited >= OLD_DAEMON_LIMIT {
            let pid = device.pid;
            let message = format!(
                "{shown}: is still served by process {pid}, or its last requests are still under way"
            );
            return Err(Error::with(ErrorKind::Busy, message));
        }
        thread::sleep(POLL);
        waited += POLL;
    }
}
