//! The driver's control commands, one method each, over the ring of the thread that sends them.
//!
//! libublk's own are not used after `ADD_DEV`: they take EBUSY for success, lose an answer when a signal arrives, write a
//! state file below a folder that anybody may write to, and cannot carry parameters that libublk does not know.

#![expect(
    unsafe_code,
    reason = "io_uring entries carry addresses, and no crate wraps these commands"
)]

use super::params::Params;
use crate::sync::Latch;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// The driver's control device.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// How often a waiting command looks whether it should be given up.
const LOOK: Duration = Duration::from_millis(100);
/// What the answer to a cancellation carries; commands count from 1.
const CANCEL_TOKEN: u64 = 0;

/// Bytes of a mask of processors: room for 8192.
const AFFINITY_BYTES: usize = 1024;

/// The processors that a queue's requests come from, as `sched_setaffinity` takes them.
pub(super) type Affinity = Box<[u8; AFFINITY_BYTES]>;

/// The bytes of a command that one `io_uring` entry carries.
const COMMAND_BYTES: usize = size_of::<sys::ublksrv_ctrl_cmd>();
const _: () = assert!(COMMAND_BYTES == 32);

/// The control ring.
pub(super) struct Commands {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    control: File,
    next_token: u64,
    is_given_up: Arc<Latch>,
}

/// What a command carries besides its number.
#[derive(Clone, Copy, Default)]
struct Payload {
    address: u64,
    bytes: u16,
    data: u64,
}

impl Payload {
    fn data(data: u64) -> Self {
        Self {
            data,
            ..Self::default()
        }
    }

    /// A buffer that the driver reads, or fills where it came from a `&mut`.
    fn buffer<T>(buffer: *const T, data: u64) -> Self {
        Self {
            address: buffer.expose_provenance() as u64,
            bytes: u16::try_from(size_of::<T>()).unwrap_or(u16::MAX),
            data,
        }
    }
}

impl Commands {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            control: OpenOptions::new()
                .read(true)
                .write(true)
                .open(CONTROL_PATH)?,
            ring: IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(4)?,
            next_token: 0,
            is_given_up: Arc::default(),
        })
    }

    /// The commands from now on end early once `is_given_up` holds.
    pub(super) fn heed(&mut self, is_given_up: &Arc<Latch>) {
        self.is_given_up = Arc::clone(is_given_up);
    }

    /// The driver's features, `None` where it is older than the question (6.5).
    pub(super) fn features(&mut self) -> io::Result<Option<u64>> {
        let mut features = 0_u64;
        let payload = Payload::buffer(&raw mut features, 0);
        match self.run(sys::UBLK_U_CMD_GET_FEATURES, u32::MAX, payload) {
            Ok(()) => Ok(Some(features)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => Err(e),
            Err(_) => Ok(None),
        }
    }

    /// What the driver knows of a device, `None` if there is no such device.
    pub(super) fn info(&mut self, dev_id: u32) -> io::Result<Option<sys::ublksrv_ctrl_dev_info>> {
        let mut info = sys::ublksrv_ctrl_dev_info::default();
        let payload = Payload::buffer(&raw mut info, 0);
        match self.run(sys::UBLK_U_CMD_GET_DEV_INFO, dev_id, payload) {
            Ok(()) => Ok(Some(info)),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The processors of a queue.
    pub(super) fn affinity(&mut self, dev_id: u32, queue: u16) -> io::Result<Affinity> {
        let mut mask = Box::new([0_u8; AFFINITY_BYTES]);
        let payload = Payload::buffer(&raw mut *mask, u64::from(queue));
        self.run(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, dev_id, payload)?;
        Ok(mask)
    }

    pub(super) fn set_params(&mut self, dev_id: u32, params: &Params) -> io::Result<()> {
        let payload = Payload::buffer(params, 0);
        self.run(sys::UBLK_U_CMD_SET_PARAMS, dev_id, payload)
    }

    /// Waits for every queue's fetches, then makes the block device. The process is the one that opened the device.
    pub(super) fn start(&mut self, dev_id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_START_DEV, dev_id, this_process())
    }

    /// Removes the block device once its requests are answered, then ends all fetches.
    pub(super) fn stop(&mut self, dev_id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_STOP_DEV, dev_id, Payload::default())
    }

    /// Forgets the device; waits until nobody has its files open.
    pub(super) fn delete(&mut self, dev_id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_DEL_DEV, dev_id, Payload::default())
    }

    /// Takes a device over whose daemon is gone; EBUSY while it is not.
    pub(super) fn start_recovery(&mut self, dev_id: u32) -> io::Result<()> {
        self.run(
            sys::UBLK_U_CMD_START_USER_RECOVERY,
            dev_id,
            Payload::default(),
        )
    }

    /// Waits for every queue's fetches, then lets the parked requests go on.
    pub(super) fn end_recovery(&mut self, dev_id: u32) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_END_USER_RECOVERY, dev_id, this_process())
    }

    pub(super) fn update_size(&mut self, dev_id: u32, sectors: u64) -> io::Result<()> {
        self.run(sys::UBLK_U_CMD_UPDATE_SIZE, dev_id, Payload::data(sectors))
    }

    /// Sends one command and waits for its answer. A driver before 6.4 knows only the bare number of a command.
    fn run(&mut self, operation: u32, dev_id: u32, payload: Payload) -> io::Result<()> {
        let bare = operation & 0xff;
        match self.run_as(operation, dev_id, payload) {
            Err(e) if bare <= sys::UBLK_CMD_GET_DEV_INFO2 && is_unknown_command(&e) => {
                self.run_as(bare, dev_id, payload).or(Err(e))
            }
            other => other,
        }
    }

    fn run_as(&mut self, operation: u32, dev_id: u32, payload: Payload) -> io::Result<()> {
        let command = sys::ublksrv_ctrl_cmd {
            dev_id,
            queue_id: u16::MAX,
            len: payload.bytes,
            addr: payload.address,
            data: [payload.data],
            ..sys::ublksrv_ctrl_cmd::default()
        };
        // SAFETY: a plain C struct of 32 bytes, without padding, as the driver reads it.
        let head =
            unsafe { std::mem::transmute::<sys::ublksrv_ctrl_cmd, [u8; COMMAND_BYTES]>(command) };
        let mut bytes = [0; 80];
        bytes[..COMMAND_BYTES].copy_from_slice(&head);
        self.next_token += 1;
        let entry = opcode::UringCmd80::new(types::Fd(self.control.as_raw_fd()), operation)
            .cmd(bytes)
            .build()
            .user_data(self.next_token);
        // SAFETY: the payload's buffer lives in the caller's frame, which waits here for the answer.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        self.await_answer(self.next_token)
    }

    /// Waits for the answer to a command. Where the caller gives up, the kernel is asked to end the command, which it
    /// does for those that wait for something.
    fn await_answer(&mut self, token: u64) -> io::Result<()> {
        let mut is_cancelled = false;
        let look = types::Timespec::from(LOOK);
        let look = types::SubmitArgs::new().timespec(&look);
        loop {
            let entered = self.ring.submitter().submit_with_args(1, &look);
            while let Some(answer) = self.ring.completion().next() {
                if answer.user_data() == token {
                    return match answer.result() {
                        0.. => Ok(()),
                        error => Err(io::Error::from_raw_os_error(-error)),
                    };
                }
            }
            if !is_cancelled && self.is_given_up.is_set() {
                let cancel = opcode::AsyncCancel::new(token).build();
                let cancel = squeue::Entry128::from(cancel.user_data(CANCEL_TOKEN));
                // SAFETY: the entry carries no address.
                is_cancelled = unsafe { self.ring.submission().push(&cancel) }.is_ok();
            }
            let is_usual =
                |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR));
            if entered.is_err_and(|e| !is_usual(&e)) {
                // The kernel may have the buffer, so there is no way out but its answer; the watchdog reports the wait.
                thread::sleep(LOOK);
            }
        }
    }
}

fn this_process() -> Payload {
    Payload::data(u64::from(std::process::id()))
}

/// Whether the driver does not know the command, or not in this form.
fn is_unknown_command(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY)
    )
}

/// Whether the driver has no such device.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT))
}
