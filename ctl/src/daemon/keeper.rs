//! Looks each second whether the daemon's runtime files are still there, and puts back what somebody removed: without its
//! socket nobody reaches the daemon, and without its list of devices and its ring the next daemon knows nothing of either.

use super::Daemon;
use super::listener::{Listener, Listening};
use crate::exit_code::one_line;
use crate::state::{self, Runtime};
use blockfork::error::{Error, ErrorKind, Result};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tracing::error;

/// How often it looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// The running thread.
#[derive(Debug)]
pub(super) struct Keeper {
    thread: JoinHandle<()>,
    /// Dropped to end it.
    stop: Sender<()>,
}

impl Keeper {
    /// Starts the thread.
    pub(super) fn start(
        daemon: Arc<Daemon>,
        runtime: Runtime,
        listening: Listening,
    ) -> Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let run = move || {
            let mut files = Files {
                daemon,
                runtime,
                listening,
                failure: None,
            };
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(INTERVAL) {
                files.look();
            }
        };
        let thread = thread::Builder::new().name("keeper".into()).spawn(run);
        Ok(Self {
            thread: thread.map_err(|e| {
                Error::io(
                    e,
                    "the thread that looks after the runtime files cannot be started",
                )
            })?,
            stop,
        })
    }

    /// Ends the thread after the look that it is at.
    pub(super) fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            error!("the thread that looks after the runtime files panicked");
        }
    }
}

/// The runtime files of a daemon.
struct Files {
    daemon: Arc<Daemon>,
    runtime: Runtime,
    listening: Listening,
    /// What was said of files that cannot be put back.
    failure: Option<String>,
}

impl Files {
    fn look(&mut self) {
        let mut back = Vec::new();
        let put_back = self.put_back(&mut back);
        let directory = self.runtime.directory().display().to_string();
        let message = match put_back {
            Ok(()) if back.is_empty() => {
                self.failure = None;
                return;
            }
            Ok(()) => {
                self.failure = None;
                let back: Vec<String> =
                    back.iter().map(|path| path.display().to_string()).collect();
                format!(
                    "somebody removed files of this daemon, which are back: {}",
                    back.join(", ")
                )
            }
            Err(e) => {
                let message = format!(
                    "files of this daemon were removed and cannot be put back: {}; put {directory} right before the daemon ends, or its devices are left without a list and acknowledged writes without the ring",
                    one_line(&e)
                );
                // Once is enough.
                if self.failure.as_ref() == Some(&message) {
                    return;
                }
                self.failure = Some(message.clone());
                message
            }
        };
        error!("{message}");
        self.daemon.host.tell_error(ErrorKind::Io, message);
    }

    /// Makes what is missing anew, and notes it in `back`.
    fn put_back(&mut self, back: &mut Vec<PathBuf>) -> Result<()> {
        let host = &self.daemon.host;
        self.runtime.prepare()?;
        // The ring first: it has what nothing else has.
        if host.pool().put_ring_back()? {
            back.push(self.runtime.ring());
        }
        let devices = self.runtime.devices();
        if is_missing(&devices) {
            let list = host.devices();
            if list.count() > 0 {
                list.save()?;
                back.push(devices);
            }
        }
        let pid = self.runtime.pid();
        if is_missing(&pid) {
            state::write_file(&pid, format!("{}\n", std::process::id()).as_bytes())?;
            back.push(pid);
        }
        let socket = self.runtime.socket();
        if is_missing(&socket) {
            let listening = Listener::bind(&self.runtime)?.start(self.daemon.clone())?;
            std::mem::replace(&mut self.listening, listening).close();
            back.push(socket);
        }
        Ok(())
    }
}

/// Whether there is nothing of this name. A file that somebody put there is left alone.
fn is_missing(path: &Path) -> bool {
    let found = path.symlink_metadata();
    found.is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}
