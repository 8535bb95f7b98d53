//! The threads that send control commands, and the watchdog before them: a caller waits for an answer for a limited
//! time, so that a command that the kernel never answers becomes an error and not a hang.
//!
//! A command runs on an idle thread, or on a new one if none is idle. So the commands of one device do not wait for those
//! of another, and a command that hangs in the kernel costs its thread and nothing else. Threads and their rings live as
//! long as the process, because a ring for each command is under suspicion of losing commands.
//!
//! When the caller gives up, the kernel is asked to end the command: most commands wait for something, and can stop
//! waiting. If the command hangs all the same, further changes of the same device are refused until it ends, because they
//! would wait for the same locks in the kernel.

use super::command::{CONTROL_PATH, Commands};
use super::{block_path, task};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Latch;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// A control thread's own things.
struct Worker {
    /// Its ring, opened at its first command.
    commands: Option<Commands>,
    /// Where it takes jobs from.
    jobs: Sender<Job>,
}

/// All control threads.
struct Workers {
    /// Those that wait for a job.
    idle: Vec<Sender<Job>>,
    /// How many there are, idle or not.
    count: usize,
}

static WORKERS: Mutex<Workers> = Mutex::new(Workers {
    idle: Vec::new(),
    count: 0,
});

/// Commands that their callers gave up and that the kernel has not ended yet, by device.
static STUCK: Mutex<Vec<(u32, String)>> = Mutex::new(Vec::new());

/// The most control threads: one for each command that clients can have under way, and as many that hang.
const WORKERS_MAX: usize = 128;
/// How long the kernel may take to end a command that is given up.
const CANCEL_LIMIT: Duration = Duration::from_secs(2);
/// How often a waiting caller looks whether it should give up.
const LOOK: Duration = Duration::from_millis(20);

/// How long the kernel may take for what needs no writing.
const LIMIT: Duration = Duration::from_secs(30);

/// What a caller asks of a control thread.
pub(super) struct Ask {
    what: String,
    limit: Duration,
    /// The device that the command changes, if it changes one.
    changes: Option<u32>,
}

impl Ask {
    /// A command of the driver that changes a device.
    pub(super) fn of(dev_id: u32, command: &str) -> Self {
        Self {
            changes: Some(dev_id),
            ..Self::query(dev_id, command)
        }
    }

    /// A question about a device. The driver answers it also while another command of the device hangs.
    pub(super) fn query(dev_id: u32, command: &str) -> Self {
        Self::about(&block_path(dev_id).display().to_string(), command)
    }

    /// A command of the driver about something.
    pub(super) fn about(subject: &str, command: &str) -> Self {
        Self {
            what: format!("{subject}: {command}"),
            limit: LIMIT,
            changes: None,
        }
    }

    /// The same with another limit for the kernel's answer.
    pub(super) fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs `job` on a control thread.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Commands) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_unless(|| None, job)
    }

    /// Runs `job` on a control thread, and gives up waiting for it as soon as `failed` returns an error.
    pub(super) fn run_unless<T: Send + 'static>(
        &self,
        failed: impl Fn() -> Option<Error>,
        job: impl FnOnce(&mut Commands) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if let Some(dev_id) = self.changes {
            refuse_stuck(dev_id)?;
        }
        let (answers, answered) = mpsc::channel();
        let is_given_up = Arc::new(Latch::default());
        let given_up = Arc::clone(&is_given_up);
        let changes = self.changes;
        submit(Box::new(move |worker| {
            let result = worker.commands(&given_up).and_then(job);
            // Before the answer, so that the caller's next command finds this thread idle.
            worker.rest();
            if let (Some(dev_id), true) = (changes, given_up.is_set()) {
                STUCK.lock().retain(|(other, _)| *other != dev_id);
            }
            if answers.send(result).is_err() {
                tracing::warn!("the kernel answered a ublk control command that was given up");
            }
        }))?;
        let error = match self.wait(&answered, &failed) {
            Ok(result) => return result,
            Err(error) => error,
        };
        if let Some(dev_id) = changes {
            STUCK.lock().push((dev_id, self.what.clone()));
        }
        is_given_up.set();
        match answered.recv_timeout(CANCEL_LIMIT) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) | Ok(Err(_)) => self.no_longer_stuck(),
            // It ended in the last moment.
            Ok(done) => {
                self.no_longer_stuck();
                if failed().is_none() {
                    return done;
                }
            }
        }
        Err(error)
    }

    fn no_longer_stuck(&self) {
        STUCK.lock().retain(|(_, what)| *what != self.what);
    }

    /// Waits for the answer; an error if `failed` returns one, or if it does not come in time.
    fn wait<T>(
        &self,
        answered: &Receiver<Result<T>>,
        failed: &impl Fn() -> Option<Error>,
    ) -> Result<Result<T>> {
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
            if waited >= self.limit {
                return Err(self.too_late(self.limit));
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

impl Worker {
    fn commands(&mut self, is_given_up: &Arc<Latch>) -> Result<&mut Commands> {
        // A caller that has given up must not have its command carried out behind its back.
        if is_given_up.is_set() {
            return Err(Error::new(ErrorKind::Io));
        }
        let commands = match &mut self.commands {
            Some(commands) => commands,
            slot @ None => slot.insert(Commands::open().map_err(cannot_control)?),
        };
        commands.heed(is_given_up);
        Ok(commands)
    }

    /// Takes the next job.
    fn rest(&self) {
        WORKERS.lock().idle.push(self.jobs.clone());
    }
}

/// Runs a job on an idle control thread, or on a new one.
fn submit(mut job: Job) -> Result<()> {
    let mut workers = WORKERS.lock();
    while let Some(idle) = workers.idle.pop() {
        match idle.send(job) {
            Ok(()) => return Ok(()),
            Err(unsent) => job = unsent.0,
        }
    }
    if workers.count >= WORKERS_MAX {
        let message = format!(
            "{WORKERS_MAX} ublk control commands are under way or hang in the kernel; the kernel's log may tell why"
        );
        return Err(Error::with(ErrorKind::Busy, message));
    }
    let (jobs, queue) = mpsc::channel::<Job>();
    task::spawn("ublk-control", move || {
        task::block_signals();
        task::become_io_flusher();
        let mut worker = Worker {
            commands: None,
            jobs,
        };
        job(&mut worker);
        for job in queue {
            job(&mut worker);
        }
    })?;
    workers.count += 1;
    Ok(())
}

/// An error while a command of this device hangs in the kernel: what would change the device, or open it, would hang too.
pub fn refuse_stuck(dev_id: u32) -> Result<()> {
    let stuck = STUCK.lock();
    match stuck.iter().find(|(other, _)| *other == dev_id) {
        None => Ok(()),
        Some((_, what)) => Err(Error::with(
            ErrorKind::Busy,
            format!("{what}: is still under way in the kernel; the kernel's log may tell why"),
        )),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_hangs_keeps_no_other_waiting() {
        let (resume, hangs) = mpsc::channel::<()>();
        let (says, said) = mpsc::channel();
        let ended = says.clone();
        submit(Box::new(move |_| {
            assert!(hangs.recv().is_ok());
            ended.send("the first").unwrap();
        }))
        .unwrap();
        submit(Box::new(move |worker| {
            says.send("the second").unwrap();
            worker.rest();
        }))
        .unwrap();
        assert_eq!(said.recv(), Ok("the second"));
        resume.send(()).unwrap();
        assert_eq!(said.recv(), Ok("the first"));
    }

    #[test]
    fn a_device_is_left_alone_while_the_kernel_hangs_over_it() {
        let dev_id = 4_000_000_001;
        refuse_stuck(dev_id).unwrap();
        let ask = Ask::of(dev_id, "STOP_DEV");
        STUCK.lock().push((dev_id, ask.what.clone()));
        let refused = ask.run(|_| Ok(())).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("STOP_DEV"), "{refused}");
        refuse_stuck(dev_id + 1).unwrap();
        ask.no_longer_stuck();
        refuse_stuck(dev_id).unwrap();
    }
}
