//! The command's side of its guard: starts it, hears from it, and thaws in its place if it is killed.

use super::kernel;
use super::messages::{Fault, Orders, Place, Report, Step};
use super::plan::Plan;
use crate::client;
use crate::output;
use crate::protocol::{self, LineLimits};
use blockfork::clock::SystemClock;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::io::{self, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// The longest line from the guard.
const REPORT_BYTES_MAX: usize = 1 << 20;
/// How often to look whether the daemon lives, without which a flush does not end.
const LOOK: Duration = Duration::from_secs(1);

/// What was heard.
#[derive(Debug)]
enum Heard {
    Report(Report),
    /// The guard is gone, and said no last word. These file systems may have been frozen; they are thawed.
    Gone,
}

/// A guard at work. When this is dropped, the guard thaws and ends.
#[derive(Debug)]
pub(super) struct Guarded<'a> {
    pool: &'a Name,
    plan: Arc<Plan>,
    seconds: Option<u32>,
    child: Child,
    orders: Option<ChildStdin>,
    heard: Receiver<Heard>,
}

impl<'a> Guarded<'a> {
    /// Starts a guard that flushes everything in `plan` and, if `seconds` are given, freezes it for so long at most.
    pub(super) fn start(pool: &'a Name, plan: Plan, seconds: Option<u32>) -> Result<Self> {
        let failed = |e: io::Error| Error::io(e, "the process that flushes cannot be started");
        for file in plan.files() {
            let inherited = FcntlArg::F_SETFD(FdFlag::empty());
            fcntl(file, inherited).map_err(|e| failed(e.into()))?;
        }
        // The program itself, even if its file has been replaced meanwhile.
        let mut child = Command::new("/proc/self/exe")
            .arg("guard")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let (Some(mut orders), Some(reports)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let first = Orders {
            layers: plan.orders(),
            freeze_seconds: seconds,
        };
        protocol::write_line(&mut orders, &first).map_err(failed)?;
        let plan = Arc::new(plan);
        let (sender, heard) = channel();
        let hear = {
            let plan = plan.clone();
            move || hear(reports, &plan, &sender)
        };
        let started = thread::Builder::new().name("guard".into()).spawn(hear);
        started.map_err(failed)?;
        Ok(Self {
            pool,
            plan,
            seconds,
            child,
            orders: Some(orders),
            heard,
        })
    }

    /// Waits until everything is flushed, and frozen if that was asked for.
    pub(super) fn ready(&mut self) -> Result<()> {
        loop {
            match self.next()? {
                Report::Freezing(_) => {}
                Report::Ready => return Ok(()),
                Report::Failed(fault) => {
                    let error = self.error(fault);
                    if self.seconds.is_some()
                        && let Err(thawed) = self.thawed()
                    {
                        output::say(&crate::exit_code::one_line(&thawed));
                    }
                    return Err(error);
                }
                Report::Thawed { .. } => return Err(self.late()),
            }
        }
    }

    /// Thaws everything. An error if something was not frozen until now, or still is.
    pub(super) fn thaw(&mut self) -> Result<()> {
        let in_time = self.thawed()?;
        if in_time { Ok(()) } else { Err(self.late()) }
    }

    /// Waits for the last word; whether everything was frozen up to here.
    fn thawed(&mut self) -> Result<bool> {
        // The guard thaws at the end of its input.
        drop(self.orders.take());
        loop {
            match self.next()? {
                Report::Freezing(_) | Report::Ready | Report::Failed(_) => {}
                Report::Thawed { in_time, faults } => {
                    return match faults.first() {
                        None => Ok(in_time),
                        Some(fault) => Err(self.error(*fault)),
                    };
                }
            }
        }
    }

    /// The guard's next report. An error if none can come.
    fn next(&self) -> Result<Report> {
        loop {
            match self.heard.recv_timeout(LOOK) {
                Ok(Heard::Report(report)) => return Ok(report),
                Ok(Heard::Gone) | Err(RecvTimeoutError::Disconnected) => {
                    let fact = "the process that flushes has ended too early; what it had frozen is thawed";
                    return Err(Error::with(ErrorKind::Io, fact));
                }
                Err(RecvTimeoutError::Timeout) if client::is_served(self.pool)? => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::with(
                        ErrorKind::Busy,
                        format!(
                            "pool {0}: the daemon is gone, and until it is back its devices are neither flushed nor thawed; `ublkctl recover {0}`",
                            self.pool
                        ),
                    ));
                }
            }
        }
    }

    fn late(&self) -> Error {
        Error::with(
            ErrorKind::Io,
            format!(
                "pool {}: the file systems were thawed after {} s, the limit of --freeze",
                self.pool,
                self.seconds.unwrap_or_default()
            ),
        )
    }

    fn error(&self, fault: Fault) -> Error {
        let shown = self.plan.shown(fault.place);
        let source = io::Error::from_raw_os_error(fault.errno);
        let freezes = self.seconds.is_some();
        match (fault.step, fault.errno) {
            (Step::Freeze, libc::EBUSY) => Error::with(
                ErrorKind::Busy,
                format!("{shown}: is frozen already, by somebody else; nothing was done"),
            ),
            (Step::Freeze, libc::EOPNOTSUPP) => Error::with(
                ErrorKind::Unsupported,
                format!("{shown}: this file system cannot be frozen; nothing was done"),
            ),
            (Step::Thaw, libc::EINVAL) => Error::with(
                ErrorKind::Io,
                format!("{shown}: somebody else thawed it in between"),
            ),
            (Step::Thaw, _) => Error::io(
                source,
                format!(
                    "{shown}: is still frozen, `fsfreeze --unfreeze` may help; it cannot be thawed"
                ),
            ),
            (Step::Freeze, _) => Error::io(
                source,
                format!("{shown}: cannot be frozen; nothing was done"),
            ),
            (Step::Flush | Step::Open, _) => {
                let way_out = if freezes {
                    ""
                } else {
                    "; --no-sync goes without"
                };
                Error::io(
                    source,
                    format!("{shown}: cannot be flushed, so nothing was done{way_out}"),
                )
            }
        }
    }
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        drop(self.orders.take());
        // It may hang in the kernel, so it is not waited for.
        if let Err(e) = self.child.try_wait() {
            tracing::debug!("the guard: {e}");
        }
    }
}

/// Passes on what the guard says. If it is killed with something frozen, thaws that.
fn hear(reports: ChildStdout, plan: &Plan, heard: &Sender<Heard>) {
    let mut reports = BufReader::new(reports);
    let limits = LineLimits {
        bytes_max: REPORT_BYTES_MAX,
        wait_ns_max: u64::MAX,
    };
    let clock = SystemClock::new();
    let mut freezing: Vec<Place> = Vec::new();
    while let Ok(Some(line)) = protocol::read_line(&mut reports, limits, &clock) {
        let Ok(report) = serde_json::from_slice::<Report>(&line) else {
            break;
        };
        match &report {
            Report::Freezing(place) => freezing.push(*place),
            Report::Failed(fault) if fault.step == Step::Freeze => {
                freezing.retain(|place| *place != fault.place);
            }
            Report::Thawed { .. } => freezing.clear(),
            Report::Ready | Report::Failed(_) => {}
        }
        // If nobody receives, the command is about to end.
        drop(heard.send(Heard::Report(report)));
    }
    for place in freezing.into_iter().rev() {
        if let Some(file) = plan.file_system(place)
            && let Err(e) = kernel::thaw(file)
        {
            tracing::debug!("{}: {e}", plan.shown(place));
        }
    }
    drop(heard.send(Heard::Gone));
}
