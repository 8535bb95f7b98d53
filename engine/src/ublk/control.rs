//! The one thread that sends control commands, and the watchdog before it: a caller waits for an answer for a limited
//! time, so that a command that the kernel never answers becomes an error and not a hang.
//!
//! The kernel is asked to end what is given up: most commands wait for something, and can stop waiting. A thread that
//! hangs all the same is left behind, and the next command starts another.
//!
//! All commands of the process go through one long-lived thread and ring: rings made for each device are under
//! suspicion of losing commands.

use super::command::{CONTROL_PATH, Commands};
use super::{block_path, task};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Latch;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

type Job = Box<dyn FnOnce(&mut Slot) + Send>;

/// The control thread's ring, opened at its first command.
struct Slot {
    commands: Option<Commands>,
}

static THREAD: Mutex<Option<Sender<Job>>> = Mutex::new(None);

/// How long a command waits for its turn behind others.
const TURN: Duration = Duration::from_mins(3);
/// How long the kernel may take to end a command that is given up.
const CANCEL_LIMIT: Duration = Duration::from_secs(2);
/// How often a waiting caller looks whether it should give up.
const LOOK: Duration = Duration::from_millis(20);

/// How long the kernel may take for what needs no writing.
const LIMIT: Duration = Duration::from_secs(30);

/// What a caller asks of the control thread.
pub(super) struct Ask {
    what: String,
    limit: Duration,
}

/// What the control thread says to a caller.
enum Answer<T> {
    Begun,
    Done(Result<T>),
}

impl Ask {
    /// A command of the driver about a device.
    pub(super) fn of(dev_id: u32, command: &str) -> Self {
        Self::about(&block_path(dev_id).display().to_string(), command)
    }

    /// A command of the driver about something.
    pub(super) fn about(subject: &str, command: &str) -> Self {
        Self {
            what: format!("{subject}: {command}"),
            limit: LIMIT,
        }
    }

    /// The same with another limit for the kernel's answer.
    pub(super) fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs `job` on the control thread.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Commands) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_unless(|| None, job)
    }

    /// Runs `job` on the control thread, and gives up waiting for it as soon as `failed` has something to say.
    pub(super) fn run_unless<T: Send + 'static>(
        &self,
        failed: impl Fn() -> Option<Error>,
        job: impl FnOnce(&mut Commands) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answers, answered) = mpsc::channel();
        let is_given_up = Arc::new(Latch::default());
        let heeded = Arc::clone(&is_given_up);
        submit(Box::new(move |slot| {
            // A caller that has given up must not have its command carried out behind its back.
            if answers.send(Answer::Begun).is_err() {
                return;
            }
            let result = slot.commands(&heeded).and_then(job);
            if answers.send(Answer::Done(result)).is_err() {
                tracing::warn!("the kernel answered a ublk control command that was given up");
            }
        }))?;
        let waited = match self.wait(&answered, TURN, &failed) {
            Ok(Answer::Begun) => self.wait(&answered, self.limit, &failed),
            other => other,
        };
        match waited {
            Ok(Answer::Done(result)) => result,
            Ok(Answer::Begun) => Err(self.vanished()),
            Err(error) => {
                is_given_up.set();
                if answered.recv_timeout(CANCEL_LIMIT).is_err() {
                    leave_behind();
                }
                Err(error)
            }
        }
    }

    fn wait<T>(
        &self,
        answered: &Receiver<Answer<T>>,
        limit: Duration,
        failed: &impl Fn() -> Option<Error>,
    ) -> Result<Answer<T>> {
        let mut waited = Duration::ZERO;
        loop {
            match answered.recv_timeout(LOOK) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(self.vanished()),
                Err(RecvTimeoutError::Timeout) => waited += LOOK,
            }
            if let Some(error) = failed() {
                return Err(error);
            }
            if waited >= limit {
                return Err(self.too_late(limit));
            }
        }
    }

    fn too_late(&self, limit: Duration) -> Error {
        let way_out = if self.what.ends_with("ADD_DEV") {
            "6.18.4, 6.18.5 and some of Ubuntu's 6.17 crash here; boot another kernel"
        } else {
            "the kernel's log may tell why"
        };
        let (what, seconds) = (&self.what, limit.as_secs());
        Error::with(
            ErrorKind::Io,
            format!(
                "{what}: the kernel's ublk driver has not answered for {seconds} seconds; {way_out}"
            ),
        )
    }

    fn vanished(&self) -> Error {
        Error::with(
            ErrorKind::Io,
            format!("{}: the control thread ended", self.what),
        )
    }
}

impl Slot {
    fn commands(&mut self, is_given_up: &Arc<Latch>) -> Result<&mut Commands> {
        let commands = match &mut self.commands {
            Some(commands) => commands,
            slot @ None => slot.insert(Commands::open().map_err(cannot_control)?),
        };
        commands.heed(is_given_up);
        Ok(commands)
    }
}

fn submit(mut job: Job) -> Result<()> {
    let mut thread = THREAD.lock();
    if let Some(jobs) = &*thread {
        match jobs.send(job) {
            Ok(()) => return Ok(()),
            Err(unsent) => job = unsent.0,
        }
    }
    let (jobs, queue) = mpsc::channel::<Job>();
    task::spawn("ublk-control", move || {
        task::block_signals();
        task::become_io_flusher();
        let mut slot = Slot { commands: None };
        for job in queue {
            job(&mut slot);
        }
    })?;
    if jobs.send(job).is_ok() {
        *thread = Some(jobs);
    }
    Ok(())
}

/// Lets the next command start a fresh thread: this one waits for the kernel.
fn leave_behind() {
    *THREAD.lock() = None;
}

/// Why the driver cannot be spoken to.
pub(super) fn cannot_control(source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::with(
            ErrorKind::Unsupported,
            format!(
                "{CONTROL_PATH}: the kernel's ublk driver is not loaded; run `modprobe ublk_drv`"
            ),
        ),
        Some(libc::EACCES | libc::EPERM) => Error::with(
            ErrorKind::Permission,
            format!("{CONTROL_PATH}: permission denied; block devices need root"),
        ),
        _ => Error::io(source, format!("{CONTROL_PATH}: cannot be used")),
    }
}
