//! A socket between commands and a pool's daemon that stops the conversation at a chosen point, until the test has done
//! something there.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::guest::Pool;

/// Where a conversation stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Before the daemon gets a request of this kind.
    Request(&'static str),
    /// Before the command gets the answer to a request of this kind.
    AnswerTo(&'static str),
}

/// A socket that holds back conversations. Commands find it in a runtime folder of its own.
#[derive(Debug)]
pub struct HeldBack {
    folder: PathBuf,
    socket: PathBuf,
    reached: Receiver<()>,
    go_on: Sender<()>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The part of a [`HeldBack`] that its threads share.
#[derive(Debug)]
struct Middle {
    daemon: PathBuf,
    at: At,
    reached: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl HeldBack {
    /// Listens in a new folder for commands about a pool whose daemon runs.
    pub fn new(pool: &Pool, at: At) -> Self {
        let folder = PathBuf::from(format!("/run/held-{}-{}", pool.name(), std::process::id()));
        Self::in_folder(pool, at, &folder)
    }

    /// The same, in this folder.
    pub fn in_folder(pool: &Pool, at: At, folder: &Path) -> Self {
        fs::create_dir_all(folder).expect("a folder for the socket");
        let socket = folder.join(format!("{}.sock", pool.name()));
        let listener = UnixListener::bind(&socket).expect("the socket listens");
        let (reached_sender, reached) = channel();
        let (go_on, go_on_receiver) = channel();
        let middle = Arc::new(Middle {
            daemon: pool.runtime().join(format!("{}.sock", pool.name())),
            at,
            reached: reached_sender,
            go_on: Mutex::new(go_on_receiver),
        });
        let is_over = Arc::new(AtomicBool::new(false));
        let listening = is_over.clone();
        let thread = thread::spawn(move || {
            for command in listener.incoming().map_while(Result::ok) {
                if listening.load(Ordering::Acquire) {
                    break;
                }
                let middle = middle.clone();
                // If the daemon is gone, the command meets a closed connection.
                thread::spawn(move || middle.converse(command));
            }
        });
        Self {
            folder: folder.to_owned(),
            socket,
            reached,
            go_on,
            is_over,
            thread: Some(thread),
        }
    }

    /// Runs ublkctl through this socket, beside the test.
    pub fn start_ctl(&self, pool: &Pool, words: &[&str]) -> Running {
        let child = pool
            .prepared("ublkctl")
            .env("UBLKCTL_RUNTIME_DIR", &self.folder)
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        Running(child.expect("ublkctl starts"))
    }

    /// Waits, half a minute at most, until a command has come to the point where it is held back.
    #[track_caller]
    pub fn await_command(&self) {
        self.reached
            .recv_timeout(Duration::from_secs(30))
            .expect("a command comes to this point");
    }

    /// Lets that command go on.
    #[track_caller]
    pub fn let_go(&self) {
        self.go_on.send(()).expect("somebody is held back");
    }
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        // A last connection wakes the thread, so that it sees that.
        if UnixStream::connect(&self.socket).is_ok() {
            drop(self.thread.take().map(JoinHandle::join));
        }
        drop(fs::remove_dir_all(&self.folder));
    }
}

impl Middle {
    /// Passes requests and answers on, one at a time.
    fn converse(&self, command: UnixStream) -> Option<()> {
        let daemon = UnixStream::connect(&self.daemon).ok()?;
        let mut from_daemon = BufReader::new(daemon.try_clone().ok()?);
        let mut from_command = BufReader::new(command.try_clone().ok()?);
        let (mut to_daemon, mut to_command) = (daemon, command);
        pass(&mut from_daemon, &mut to_command)?;
        loop {
            let request = line(&mut from_command)?;
            let is = |kind: &str| request.contains(&format!("\"{kind}\""));
            if matches!(self.at, At::Request(kind) if is(kind)) {
                self.hold()?;
            }
            to_daemon.write_all(request.as_bytes()).ok()?;
            let answer = loop {
                let answer = line(&mut from_daemon)?;
                if !answer.starts_with("{\"progress\"") {
                    break answer;
                }
                to_command.write_all(answer.as_bytes()).ok()?;
            };
            if matches!(self.at, At::AnswerTo(kind) if is(kind)) {
                self.hold()?;
            }
            to_command.write_all(answer.as_bytes()).ok()?;
        }
    }

    fn hold(&self) -> Option<()> {
        self.reached.send(()).ok()?;
        self.go_on.lock().ok()?.recv().ok()
    }
}

fn line(from: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    let bytes = from.read_line(&mut line).ok()?;
    (bytes > 0).then_some(line)
}

fn pass(from: &mut impl BufRead, to: &mut impl Write) -> Option<()> {
    to.write_all(line(from)?.as_bytes()).ok()
}

/// A command that runs beside the test.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Kills it as nothing else does, and waits for its end.
    #[track_caller]
    pub fn kill(mut self) {
        self.0.kill().expect("the command can be killed");
        self.0.wait().expect("the command ends");
    }

    /// Waits for its end: the exit code, and what it said.
    #[track_caller]
    pub fn ends(self) -> (Option<i32>, String) {
        let output = self.0.wait_with_output().expect("the command ends");
        let said = String::from_utf8_lossy(&output.stderr)
            .trim_end()
            .to_owned();
        (output.status.code(), said)
    }

    /// The processes that it has started.
    pub fn children(&self) -> Vec<u32> {
        children(self.pid())
    }
}

/// The children of a process.
fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("/proc can be read").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_child = |child: &u32| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        status.lines().any(|line| line == format!("PPid:\t{pid}"))
    };
    numbers.filter(is_child).collect()
}
