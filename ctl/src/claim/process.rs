//! A claim of a device, held by a process of its own.
//!
//! Whoever claims a device reads it, writes its dirty pages, and may be the last to close it: all of that waits for the
//! daemon that serves the device. If a thread of that daemon waited, a `kill -9` could not end the daemon, and the next
//! one would wait for the pool's lock for ever. So the daemon starts this program once more, and talks with it over a
//! socket: one line of JSON for each step. The claim ends with that process, and the process with its socket.

use crate::exit_code::one_line;
use crate::protocol::{self, LineLimits};
use blockfork::clock::SystemClock;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::ublk::{self, Claimed, Holder};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// How long a claim may take: longer than the look at all processes.
const TAKE_NS_MAX: u64 = 20_000_000_000;
/// How long a step may take that writes dirty pages.
const STEP_NS_MAX: u64 = 120_000_000_000;
/// How long the search for partitions may take.
const PARTITIONS_NS_MAX: u64 = 30_000_000_000;
/// How often a wait looks at the clock.
const LOOK: Duration = Duration::from_millis(200);
/// The longest line.
const LINE_BYTES_MAX: usize = 16 << 20;

/// What the process is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Step {
    /// Claim the device.
    Take,
    /// See once more that nobody has it, and hide its nodes.
    Seal,
    /// Show its nodes.
    Unseal,
    /// Write its dirty pages.
    Flush,
    /// Drop its cached pages.
    DropPages,
    /// Read its partition table anew.
    RereadPartitions,
    /// Wait until the kernel has found its partitions. Without a claim.
    AwaitPartitions,
    /// Give the claim back.
    Release,
}

/// What came of a step.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Done,
    Held(Vec<Holder>),
    Gone,
    Failed { kind: String, message: String },
}

/// A claim of a device.
#[derive(Debug)]
pub(crate) struct Claim(Helper);

/// What came of claiming a device.
#[derive(Debug)]
pub(super) enum Taken {
    Claim(Claim),
    Held(Vec<Holder>),
    /// There is no such block device.
    Gone,
}

impl Claim {
    /// Claims a device.
    pub(super) fn take(dev_id: u32) -> Result<Taken> {
        let mut helper = match Helper::start(dev_id) {
            Ok(helper) => helper,
            // As when this process has no descriptor left: nobody has looked, so nobody knows.
            Err(e) => return Ok(Taken::Held(vec![Holder::Unseen(one_line(&e))])),
        };
        match helper.ask(Step::Take, TAKE_NS_MAX) {
            Ok(Answer::Done) => Ok(Taken::Claim(Self(helper))),
            Ok(Answer::Held(holders)) => Ok(Taken::Held(holders)),
            Ok(Answer::Gone) => Ok(Taken::Gone),
            Ok(Answer::Failed { kind, message }) => Err(refused(&kind, message)),
            // As when the device waits for a daemon and a program has it half open.
            Err(e) if e.kind() == ErrorKind::Busy => {
                Ok(Taken::Held(vec![Holder::Unseen(one_line(&e))]))
            }
            Err(e) => Err(e),
        }
    }

    /// Hides the device's nodes and looks once more; whoever has the device.
    pub(super) fn seal_unless_held(&mut self) -> Result<Vec<Holder>> {
        match self.0.ask(Step::Seal, TAKE_NS_MAX)? {
            Answer::Held(holders) => Ok(holders),
            answer @ (Answer::Done | Answer::Gone | Answer::Failed { .. }) => {
                self.0.success(Ok(answer)).map(|()| Vec::new())
            }
        }
    }

    /// Shows the device's nodes.
    pub(crate) fn unseal(&mut self) -> Result<()> {
        self.0.step(Step::Unseal)
    }

    /// Writes the dirty pages that an earlier user left.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.0.step(Step::Flush)
    }

    /// Drops the cached pages, all of them or it is an error.
    pub(crate) fn drop_cached_pages(&mut self) -> Result<()> {
        self.0.step(Step::DropPages)
    }

    /// Makes the kernel read the partition table anew.
    pub(crate) fn reread_partitions(&mut self) -> Result<()> {
        self.0.step(Step::RereadPartitions)
    }

    /// Gives the claim back: nobody has it any more on return.
    pub(crate) fn release(mut self) -> Result<()> {
        self.0.step(Step::Release)
    }
}

/// Returns once the kernel has found the partitions of a device.
pub(crate) fn await_partitions(dev_id: u32) -> Result<()> {
    let mut helper = Helper::start(dev_id)?;
    let answer = helper.ask(Step::AwaitPartitions, PARTITIONS_NS_MAX);
    helper.success(answer)
}

/// The process that holds the claim, as long as this is not dropped.
#[derive(Debug)]
struct Helper {
    dev_id: u32,
    child: Option<Child>,
    socket: BufReader<UnixStream>,
}

impl Helper {
    fn start(dev_id: u32) -> Result<Self> {
        let failed = |e| Error::io(e, "the process that claims a device cannot be started");
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_read_timeout(Some(LOOK)).map_err(failed)?;
        // This same program, also after its file was replaced.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["claim-device", &dev_id.to_string()])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null());
        Ok(Self {
            dev_id,
            child: Some(command.spawn().map_err(failed)?),
            socket: BufReader::new(ours),
        })
    }

    /// Does a step that only succeeds or fails.
    fn step(&mut self, step: Step) -> Result<()> {
        let answer = self.ask(step, STEP_NS_MAX);
        self.success(answer)
    }

    fn success(&self, answer: Result<Answer>) -> Result<()> {
        match answer? {
            Answer::Done => Ok(()),
            Answer::Failed { kind, message } => Err(refused(&kind, message)),
            Answer::Held(_) | Answer::Gone => Err(self.lost("answers something else")),
        }
    }

    fn ask(&mut self, step: Step, wait_ns_max: u64) -> Result<Answer> {
        let limits = LineLimits {
            bytes_max: LINE_BYTES_MAX,
            wait_ns_max,
        };
        if let Err(e) = protocol::write_line(self.socket.get_mut(), &step) {
            return Err(self.lost(&e.to_string()));
        }
        match protocol::read_line(&mut self.socket, limits, &SystemClock::new()) {
            Ok(Some(line)) => serde_json::from_slice(&line).map_err(|e| self.lost(&e.to_string())),
            Ok(None) => Err(self.lost("ended")),
            Err(e) => Err(self.lost(&e.to_string())),
        }
    }

    fn lost(&self, fact: &str) -> Error {
        let dev_id = self.dev_id;
        Error::with(
            ErrorKind::Busy,
            format!("/dev/ublkb{dev_id}: the process that claims it: {fact}"),
        )
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // It shows hidden nodes and ends, because its socket has ended. If the kernel holds it up, as with a device whose
        // daemon is dead, that comes later.
        if let Err(e) = self.socket.get_ref().shutdown(Shutdown::Both) {
            tracing::debug!("the process that claims a device has ended: {e}");
        }
        let reap = move || {
            if let Err(e) = child.wait() {
                tracing::warn!("the process that claimed a device is lost: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("reap".into()).spawn(reap) {
            tracing::warn!("the process that claimed a device stays a zombie: {e}");
        }
    }
}

fn refused(kind: &str, message: String) -> Error {
    protocol::Message::into_error(kind, message)
}

/// The process that holds a claim: does what comes over its standard input, until that ends.
pub(crate) fn serve(dev_id: u32) -> Result<()> {
    let failed = |e| Error::io(e, "standard input is not the socket of a daemon");
    let input = io::stdin();
    let fd = std::os::fd::AsFd::as_fd(&input)
        .try_clone_to_owned()
        .map_err(failed)?;
    let mut socket = BufReader::new(UnixStream::from(fd));
    let mut claim = None;
    let mut line = String::new();
    loop {
        line.clear();
        if socket.read_line(&mut line).map_err(failed)? == 0 {
            return Ok(());
        }
        let step = serde_json::from_str(&line).map_err(|e| failed(e.into()))?;
        let answer = match act(dev_id, step, &mut claim) {
            Ok(answer) => answer,
            Err(e) => Answer::Failed {
                kind: e.kind().word().to_owned(),
                message: one_line(&e),
            },
        };
        protocol::write_line(socket.get_mut(), &answer).map_err(failed)?;
    }
}

fn act(dev_id: u32, step: Step, claim: &mut Option<ublk::Claim>) -> Result<Answer> {
    let unclaimed = || Error::with(ErrorKind::Invalid, "the device is not claimed");
    match step {
        Step::Take => match ublk::Claim::take(dev_id)? {
            Claimed::Claim(taken) => *claim = Some(taken),
            Claimed::Held(holders) => return Ok(Answer::Held(holders)),
            Claimed::Gone => return Ok(Answer::Gone),
        },
        Step::Seal => {
            let holders = claim.as_mut().ok_or_else(unclaimed)?.seal()?;
            if !holders.is_empty() {
                return Ok(Answer::Held(holders));
            }
        }
        Step::Unseal => claim.as_mut().ok_or_else(unclaimed)?.unseal(),
        Step::Flush => claim.as_ref().ok_or_else(unclaimed)?.flush()?,
        Step::DropPages => claim.as_ref().ok_or_else(unclaimed)?.drop_cached_pages()?,
        Step::RereadPartitions => claim.as_ref().ok_or_else(unclaimed)?.reread_partitions()?,
        Step::AwaitPartitions => ublk::await_partitions(dev_id)?,
        Step::Release => drop(claim.take().ok_or_else(unclaimed)?),
    }
    Ok(Answer::Done)
}
