//! The steps with the driver that adding, recovering and removing a device have in common.

use super::command::{Affinity, Commands, is_gone};
use super::control::{Ask, cannot_control};
use super::params::{self, DEPTH_MAX, IO_BUFFER_BYTES};
use super::registered::Helpers;
use super::served::DeviceOptions;
use super::{block_path, char_path, os_error, sysfs};
use crate::error::{Error, ErrorKind, Result};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// How long a device may take to stop: the kernel writes what is dirty in its page cache first.
const STOP_LIMIT: Duration = Duration::from_mins(2);

/// A device whose control file this process has open, before its queues start.
pub(super) struct Opened {
    pub(super) device: UblkDev,
    /// Per queue, where the driver tells.
    pub(super) affinities: Vec<Option<Affinity>>,
    /// Whether this process added it, and so takes it away again if it cannot be started.
    pub(super) is_new: bool,
    /// Where the driver registers clients' pages.
    pub(super) helpers: Option<Arc<Helpers>>,
}

/// Refuses options that can't be.
pub(super) fn check(options: &DeviceOptions) -> Result<()> {
    let refuse = |message| Err(Error::with(ErrorKind::Invalid, message));
    if options.queues == 0 {
        return refuse(String::from("a device needs at least 1 queue"));
    }
    if !(1..=DEPTH_MAX).contains(&options.depth) {
        return refuse(format!(
            "a queue's depth is from 1 to {DEPTH_MAX}, not {}",
            options.depth
        ));
    }
    if options
        .dev_id
        .is_some_and(|dev_id| i32::try_from(dev_id).is_err())
    {
        return refuse(String::from("a device's number has at most 31 bits"));
    }
    Ok(())
}

/// 32 bits from the kernel's random source.
pub(super) fn random() -> Result<u32> {
    const SOURCE: &str = "/dev/urandom";
    let mut bytes = [0; 4];
    let read = File::open(SOURCE).and_then(|mut source| source.read_exact(&mut bytes));
    read.map_err(|e| Error::io(e, format!("{SOURCE}: cannot be read")))?;
    Ok(u32::from_le_bytes(bytes))
}

/// Adds a device and opens it.
pub(super) fn add(
    commands: &mut Commands,
    options: &DeviceOptions,
    mark: u64,
    pool_fd: RawFd,
) -> Result<Opened> {
    let features = commands.features().map_err(cannot_control)?;
    // libublk answers a refused number by deleting the device that has it, so it must not come to that.
    if let Some(dev_id) = options.dev_id
        && sysfs::has_device(dev_id)
    {
        return Err(taken(dev_id));
    }
    let id = options.dev_id.map_or(Ok(-1), i32::try_from);
    let control = UblkCtrlBuilder::default()
        .name("blockfork")
        .id(id.unwrap_or(i32::MAX))
        .nr_queues(options.queues)
        .depth(options.depth)
        .io_buf_bytes(IO_BUFFER_BYTES)
        .ctrl_flags(params::flags(features))
        .ctrl_target_flags(mark)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|e| cannot_add(&e, options.dev_id))?;
    // Otherwise it would delete the device on its way out.
    control.disown();
    let dev_id = control.dev_info().dev_id;
    // libublk takes EBUSY for success, so the driver is asked whether it really has the device, and this one.
    let info = commands.info(dev_id).map_err(cannot_control)?;
    if info.is_none_or(|info| info.ublksrv_flags != mark) {
        return Err(cannot_add(
            &UblkError::OtherError(-libc::EBUSY),
            options.dev_id,
        ));
    }
    let opened = open_with(commands, &control, pool_fd, true);
    if opened.is_err()
        && let Err(error) = commands.delete(dev_id)
    {
        tracing::warn!(
            "{}: cannot be deleted: {error}",
            block_path(dev_id).display()
        );
    }
    opened
}

/// Opens a device that is being recovered.
pub(super) fn open(commands: &mut Commands, dev_id: u32, pool_fd: RawFd) -> Result<Opened> {
    let shown = block_path(dev_id);
    let failed = |e: UblkError| {
        Error::io(
            os_error(&e),
            format!("{}: cannot be recovered", shown.display()),
        )
    };
    let control = UblkCtrlBuilder::default()
        .name("blockfork")
        .id(i32::try_from(dev_id).or(Err(failed(UblkError::InvalidVal)))?)
        .io_buf_bytes(IO_BUFFER_BYTES)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(failed)?;
    open_with(commands, &control, pool_fd, false)
}

fn open_with(
    commands: &mut Commands,
    control: &UblkCtrl,
    pool_fd: RawFd,
    is_new: bool,
) -> Result<Opened> {
    let info = control.dev_info();
    let registers = info.flags & u64::from(sys::UBLK_F_AUTO_BUF_REG) != 0;
    let helpers = registers.then(Helpers::open).transpose()?;
    let register = |device: &mut UblkDev| {
        device.tgt.fds[1] = pool_fd;
        device.tgt.nr_fds = 2;
        if let Some(helpers) = &helpers {
            device.tgt.fds[2] = helpers.zeros.as_raw_fd();
            device.tgt.fds[3] = helpers.scratch.as_raw_fd();
            device.tgt.nr_fds = 4;
        }
        Ok(())
    };
    let device = UblkDev::new(String::from("blockfork"), register, control);
    let cannot_open = |e: UblkError| {
        let path = char_path(info.dev_id);
        // libublk says EACCES whatever the reason was.
        let source = File::open(&path).err().unwrap_or_else(|| os_error(&e));
        let way_out = if source.kind() == io::ErrorKind::NotFound {
            "; the nodes of ublk devices do not appear in this /dev, see `ublkctl doctor`"
        } else {
            ""
        };
        Error::io(
            source,
            format!("{}: cannot be opened{way_out}", path.display()),
        )
    };
    let affinities = (0..info.nr_hw_queues).map(|queue| commands.affinity(info.dev_id, queue).ok());
    Ok(Opened {
        affinities: affinities.collect(),
        device: device.map_err(cannot_open)?,
        is_new,
        helpers: helpers.map(Arc::new),
    })
}

fn taken(dev_id: u32) -> Error {
    let shown = block_path(dev_id);
    Error::with(
        ErrorKind::AlreadyExists,
        format!("{}: exists already", shown.display()),
    )
}

/// Why the driver refuses a new device, with the way out.
fn cannot_add(error: &UblkError, dev_id: Option<u32>) -> Error {
    let source = os_error(error);
    match (source.raw_os_error(), dev_id) {
        (Some(libc::EEXIST), Some(dev_id)) => taken(dev_id),
        (Some(libc::EACCES), _) => {
            let limit = sysfs::devices_max().map_or(String::new(), |max| format!(" of {max}"));
            let message = format!(
                "the kernel's limit{limit} for ublk devices is reached; raise {}",
                sysfs::DEVICES_MAX_PATH
            );
            Error::with(ErrorKind::Busy, message)
        }
        (Some(libc::EPERM), _) => cannot_control(source),
        _ => Error::io(source, "the kernel's ublk driver refuses a new device"),
    }
}

/// Removes the block device once its requests are answered: the one place where a device is stopped. Nothing to do if it is
/// gone. The caller has sealed the device with a [`Claim`](super::Claim), so nobody has it and nobody can get it;
/// `release` gives the claim back.
///
/// `TRY_STOP_DEV` of 7.0 is not used: docs/decisions/claim-before-stop.md says why.
pub(super) fn stop(dev_id: u32, release: impl FnOnce() -> Result<()>) -> Result<()> {
    finish(
        dev_id,
        &Ask::of(dev_id, "STOP_DEV").within(STOP_LIMIT),
        "stopped",
        Commands::stop,
    )?;
    // Before the device is deleted, which waits for everybody who has it open.
    release()
}

/// Makes the driver forget a device that nobody serves, and waits until its files are gone.
pub(super) fn delete(dev_id: u32) -> Result<()> {
    finish(
        dev_id,
        &Ask::of(dev_id, "DEL_DEV"),
        "deleted",
        Commands::delete,
    )?;
    sysfs::await_no_node(&block_path(dev_id));
    Ok(())
}

fn finish(
    dev_id: u32,
    ask: &Ask,
    participle: &'static str,
    command: fn(&mut Commands, u32) -> io::Result<()>,
) -> Result<()> {
    ask.run(move |commands| match command(commands, dev_id) {
        Err(e) if is_gone(&e) => Ok(()),
        done => done.map_err(|e| {
            let shown = block_path(dev_id);
            Error::io(e, format!("{}: cannot be {participle}", shown.display()))
        }),
    })
}
