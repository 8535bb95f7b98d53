//! A served device, from `ADD_DEV` or recovery to its removal or to the hand-over to the next daemon.

use super::command::Commands;
use super::control::Ask;
use super::params::{self, Geometry};
use super::queue::{Queue, Work};
use super::steps::{self, Opened};
use super::{block_path, holders, mark, recover, sysfs};
use crate::device::PoolFile;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Attached;
use crate::units::SECTOR_BYTES;
use libublk::io::UblkDev;
use libublk::sys;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// How a volume is to be served.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The N of `/dev/ublkbN`; the kernel picks a free one otherwise.
    pub dev_id: Option<u32>,
    /// Queues, each with a thread of its own; the kernel makes no more than there are processors.
    pub queues: u16,
    /// Requests that each queue takes at a time.
    pub depth: u16,
    /// Refuse writes, also where the volume would take them.
    pub read_only: bool,
}

/// What a daemon keeps of a device so that the next one can recover it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The N of `/dev/ublkbN`.
    pub dev_id: u32,
    /// Queues that it has.
    pub queues: u16,
    /// Requests that each queue takes at a time.
    pub depth: u16,
    /// Bytes of the longest request.
    pub io_buffer_bytes: u32,
    /// What the driver granted: its `UBLK_F_` bits.
    pub flags: u64,
    /// A mark that the driver keeps with the device, to tell it from another one that got the same number later.
    pub mark: u64,
}

impl DeviceState {
    pub(super) fn of(info: &sys::ublksrv_ctrl_dev_info) -> Self {
        Self {
            dev_id: info.dev_id,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            io_buffer_bytes: info.max_io_buf_bytes,
            flags: info.flags,
            mark: info.ublksrv_flags,
        }
    }

    /// Whether the device outlives its daemon, with every request served by the next.
    pub fn is_recoverable(&self) -> bool {
        self.flags & params::RECOVERY == params::RECOVERY
    }
}

/// How long queue threads may take to begin or to end.
const THREADS_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// A device that this process serves; it owns the queue threads.
///
/// Dropped without [`Served::delete`] or [`Served::abandon`], it goes on being served until the process ends.
pub struct Served {
    state: DeviceState,
    file: Arc<PoolFile>,
    attached: Arc<Attached>,
    queues: Vec<Queue>,
    device: Arc<UblkDev>,
}

impl Served {
    /// Makes a device and serves it: returns once `/dev/ublkbN` is usable. Refused while the kernel has a device of the same
    /// volume. Blocks. `announce` notes the device where the
    /// next daemon looks, before anybody can use it.
    pub fn add(
        file: Arc<PoolFile>,
        attached: Arc<Attached>,
        options: &DeviceOptions,
        announce: impl FnOnce(DeviceState) -> Result<()>,
    ) -> Result<Self> {
        let geometry = Geometry {
            bytes: attached.bytes(),
            sector_bytes: attached.sector_bytes(),
            read_only: options.read_only || attached.is_read_only(),
            memory_alignment: file.memory_alignment(),
        };
        steps::check(options)?;
        recover::refuse_twin(&attached)?;
        let mark = mark::draw(attached.pool_id(), attached.id())?;
        let wanted = options.clone();
        let pool_fd = file.as_raw_fd();
        let opened = Ask::about("a new device", "ADD_DEV")
            .run(move |commands| steps::add(commands, &wanted, mark, pool_fd))?;
        let (dev_id, flags) = (opened.device.dev_info.dev_id, opened.device.dev_info.flags);
        let served = Self::serve(opened, file, attached)?;
        let start = move |commands: &mut Commands| {
            let shown = block_path(dev_id);
            let shown = shown.display();
            (commands.set_params(dev_id, &geometry.params(flags)))
                .map_err(|e| Error::io(e, format!("{shown}: the kernel refuses its parameters")))?;
            commands
                .start(dev_id)
                .map_err(|e| Error::io(e, format!("{shown}: cannot be started")))
        };
        let started =
            announce(served.state()).and_then(|()| served.while_serving("START_DEV", start));
        match started {
            Ok(()) => Ok(served.settled()),
            Err(error) => {
                served.give_up();
                Err(error)
            }
        }
    }

    /// Serves a device again whose daemon died; requests that the kernel parked meanwhile go on. Waits, within limits,
    /// for the old daemon's end. Blocks.
    pub fn recover(
        file: Arc<PoolFile>,
        attached: Arc<Attached>,
        state: &DeviceState,
    ) -> Result<Self> {
        let dev_id = state.dev_id;
        recover::take_over(state)?;
        let pool_fd = file.as_raw_fd();
        let opened = Ask::of(dev_id, "GET_DEV_INFO")
            .run(move |commands| steps::open(commands, dev_id, pool_fd))?;
        let served = Self::serve(opened, file, attached)?;
        let end = move |commands: &mut Commands| {
            let ended = commands.end_recovery(dev_id);
            ended.map_err(|e| {
                Error::io(
                    e,
                    format!("{}: cannot be recovered", block_path(dev_id).display()),
                )
            })
        };
        match served.while_serving("END_USER_RECOVERY", end) {
            Ok(()) => Ok(served.settled()),
            Err(error) => {
                // Left behind as it was found, for another attempt.
                served.abandon();
                Err(error)
            }
        }
    }

    /// Starts the queues, and waits until each has its ring.
    fn serve(opened: Opened, file: Arc<PoolFile>, attached: Arc<Attached>) -> Result<Self> {
        let device = Arc::new(opened.device);
        let mut served = Self {
            state: DeviceState::of(&device.dev_info),
            file,
            attached,
            queues: Vec::new(),
            device,
        };
        let (ready, news) = mpsc::channel();
        let mut begun = Ok(());
        for (index, affinity) in (0..served.state.queues).zip(opened.affinities) {
            let work = Work {
                index,
                device: Arc::clone(&served.device),
                file: Arc::clone(&served.file),
                attached: Arc::clone(&served.attached),
                affinity,
                helpers: opened.helpers.clone(),
            };
            match Queue::start(work, ready.clone()) {
                Ok(queue) => served.queues.push(queue),
                Err(error) => {
                    begun = Err(error);
                    break;
                }
            }
        }
        drop(ready);
        for _ in 0..served.queues.len() {
            let said = news.recv_timeout(THREADS_LIMIT);
            begun = begun.and(said.unwrap_or_else(|_| Err(served.late_queue())));
        }
        match begun {
            Ok(()) => Ok(served),
            Err(error) => {
                if opened.is_new {
                    served.give_up();
                } else {
                    served.abandon();
                }
                Err(error)
            }
        }
    }

    /// Runs a command that the kernel answers when all queues fetch; a queue that fails ends the wait.
    fn while_serving(
        &self,
        command: &str,
        job: impl FnOnce(&mut Commands) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        Ask::of(self.state.dev_id, command).run_unless(|| self.has_failed(), job)
    }

    /// The device as it is once the block device exists.
    fn settled(self) -> Self {
        let dev_id = self.state.dev_id;
        if self.state.queues == 1 {
            // With one queue the kernel would put a scheduler in front of the pool's own.
            sysfs::disable_scheduler(dev_id);
        }
        sysfs::await_node(&block_path(dev_id));
        tracing::info!(device = %block_path(dev_id).display(), volume = %self.attached.path(), "serving");
        self
    }

    /// What the next daemon needs to recover the device.
    pub fn state(&self) -> DeviceState {
        self.state.clone()
    }

    /// The N of `/dev/ublkbN`.
    pub fn dev_id(&self) -> u32 {
        self.state.dev_id
    }

    /// `/dev/ublkbN`.
    pub fn path(&self) -> PathBuf {
        block_path(self.state.dev_id)
    }

    /// What it serves.
    pub fn attached(&self) -> &Arc<Attached> {
        &self.attached
    }

    /// The size in bytes that the kernel gives its block device, where it can be asked.
    pub fn size(&self) -> Option<u64> {
        sysfs::size(self.state.dev_id)
    }

    /// Tells the kernel a new size, in whole sectors; false where the kernel has no way to be told.
    pub fn update_size(&self, bytes: u64) -> Result<bool> {
        let sector_bytes = u64::from(self.attached.sector_bytes());
        let dev_id = self.state.dev_id;
        let shown = block_path(dev_id);
        if !bytes.is_multiple_of(sector_bytes) {
            let message = format!(
                "{}: {bytes} bytes are not whole sectors of {sector_bytes}",
                shown.display()
            );
            return Err(Error::with(ErrorKind::Invalid, message));
        }
        Ask::of(dev_id, "UPDATE_SIZE").run(move |commands| {
            let failed = |e| Error::io(e, format!("{}: cannot be resized", shown.display()));
            let features = commands.features().map_err(failed)?.unwrap_or(0);
            if features & u64::from(sys::UBLK_F_UPDATE_SIZE) == 0 {
                return Ok(false);
            }
            // Some kernels crash on a device that has no disk.
            let info = commands.info(dev_id).map_err(failed)?;
            if info.is_none_or(|info| u32::from(info.state) == sys::UBLK_S_DEV_DEAD) {
                return Err(Error::with(
                    ErrorKind::NotFound,
                    format!("{}: was stopped", shown.display()),
                ));
            }
            commands
                .update_size(dev_id, bytes / SECTOR_BYTES)
                .map_err(failed)?;
            Ok(true)
        })
    }

    /// Whether somebody else stopped the device: there is nothing left to serve.
    pub fn was_stopped(&self) -> bool {
        let mut queues = self.queues.iter();
        queues.all(|queue| queue.has_ended() && queue.failure().is_none())
    }

    /// Why the device is not served as it should be, if so: a queue failed, or somebody else stopped the device.
    pub fn has_failed(&self) -> Option<Error> {
        if let Some(error) = self.queues.iter().find_map(Queue::failure) {
            return Some(error);
        }
        self.queues.iter().any(Queue::has_ended).then(|| {
            let shown = block_path(self.state.dev_id);
            Error::with(
                ErrorKind::NotFound,
                format!("{}: was stopped from outside", shown.display()),
            )
        })
    }

    /// Stops the device: `/dev/ublkbN` is gone on return. If this fails, the queues go on serving, and it can be tried
    /// again. The caller has sealed the device with a [`Claim`](super::Claim), and `release` gives the claim back. Blocks.
    pub fn stop(&self, release: impl FnOnce() -> Result<()>) -> Result<()> {
        // The queues serve until this returned: what is dirty in the page cache comes first.
        steps::stop(self.state.dev_id, release)
    }

    /// Deletes a device that was stopped. Blocks.
    pub fn delete(self) -> Result<()> {
        let dev_id = self.state.dev_id;
        self.attached().stop_waiting();
        self.end_queues(false)?;
        steps::delete(dev_id)?;
        tracing::info!(device = %block_path(dev_id).display(), "removed");
        Ok(())
    }

    /// Leaves the device to the next daemon: requests under way are carried out but not answered, further ones not taken.
    /// On return this process does nothing more for the device; the kernel parks its requests. Never deletes it. Blocks.
    pub fn abandon(self) {
        let device = self.path();
        // First, so that what waits for space ends without an answer and the next daemon gets it again.
        self.queues.iter().for_each(Queue::freeze);
        self.attached().stop_waiting();
        match self.end_queues(true) {
            Ok(()) => tracing::info!(device = %device.display(), "left to be recovered"),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Takes a device that never became usable away again.
    fn give_up(self) {
        let dev_id = self.state.dev_id;
        // The kernel may have started it all the same, and somebody may have found it: then it stays, for `recover`.
        let holders = holders::holders(dev_id);
        let stopped = match holders.first() {
            None => steps::stop(dev_id, || Ok(())),
            Some(holder) => {
                let shown = block_path(dev_id);
                let fact = format!("{}: stays, it is {holder}", shown.display());
                Err(Error::with(ErrorKind::Busy, fact))
            }
        };
        let ended = self.end_queues(true);
        let removed = stopped.and(ended).and_then(|()| steps::delete(dev_id));
        if let Err(error) = removed {
            tracing::warn!("{error}");
        }
    }

    /// Waits until the queue threads have ended, then closes the device's file.
    fn end_queues(self, freeze: bool) -> Result<()> {
        if freeze {
            self.queues.iter().for_each(Queue::freeze);
        }
        let mut waited = Duration::ZERO;
        while !self.queues.iter().all(Queue::has_ended) {
            if waited >= THREADS_LIMIT {
                return Err(self.late_queue());
            }
            thread::sleep(POLL);
            waited += POLL;
        }
        self.queues.into_iter().for_each(Queue::join);
        drop(self.device);
        Ok(())
    }

    fn late_queue(&self) -> Error {
        let shown = block_path(self.state.dev_id);
        Error::with(
            ErrorKind::Io,
            format!(
                "{}: a queue thread does not answer; stop the daemon and recover the pool",
                shown.display()
            ),
        )
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Served");
        debug
            .field("pool", &self.file.path())
            .field("state", &self.state);
        debug.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_can_be_kept_by_any_thread() {
        fn is_shareable<T: Send + Sync>() {}
        is_shareable::<Served>();
    }
}
