//! The control socket: who may talk, how much, how long; one thread a connection.

use super::Daemon;
use super::progress::ProgressLines;
use crate::exit_code::one_line;
use crate::protocol::{self, LineLimits, Message, Reply, Request};
use crate::state::{self, Runtime};
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt::PeerCredentials};
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use tracing::{debug, warn};

/// The most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to write a request, the first byte included.
const REQUEST_NS_MAX: u64 = 30_000_000_000;
/// How long a client may take to read an answer.
const WRITE_WAIT: Duration = Duration::from_secs(30);
/// How often a thread that waits for a request looks at the clock.
const READ_WAIT: Duration = Duration::from_millis(500);
/// How often a thread whose client watches looks for what happened.
const WATCH_WAIT: Duration = Duration::from_millis(100);

/// The bound socket.
pub(super) struct Listener(UnixListener);

impl Listener {
    /// Binds the socket, over one that a dead daemon left. Nobody can connect to it before its mode is right.
    pub(super) fn bind(runtime: &Runtime) -> Result<Self> {
        let path = runtime.socket();
        let failed = |e| Error::io(e, format!("{}: cannot be bound", path.display()));
        // As long as the shortest name, so it fits a socket's address whenever the other does.
        let temporary = path.with_file_name(format!(".{}", std::process::id()));
        state::remove_file(&temporary)?;
        let listener = UnixListener::bind(&temporary).map_err(failed)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)?;
        Ok(Self(listener))
    }

    /// Accepts connections until [`Listening::close`], or until the process ends.
    pub(super) fn start(self, daemon: Arc<Daemon>) -> Result<Listening> {
        let failed = |e| Error::io(e, "the thread that listens cannot be started");
        let listening = Listening(self.0.try_clone().map_err(failed)?);
        let accept = move || {
            let open = daemon.clients.clone();
            for stream in self.0.incoming() {
                match stream {
                    Ok(stream) => accept(stream, &daemon, &open),
                    // Its socket is closed: there is another one.
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return,
                    Err(e) => {
                        warn!("a connection was lost: {e}");
                        // Out of descriptors, most likely: don't spin until some are closed.
                        thread::sleep(READ_WAIT);
                    }
                }
            }
        };
        let started = thread::Builder::new().name("accept".into()).spawn(accept);
        started.map(|_| listening).map_err(failed)
    }
}

/// The socket that a thread accepts connections on.
#[derive(Debug)]
pub(super) struct Listening(UnixListener);

impl Listening {
    /// Ends the thread; the connections that it accepted go on.
    pub(super) fn close(self) {
        if let Err(e) = shutdown(self.0.as_raw_fd(), Shutdown::Both) {
            warn!("a socket without a name stays open: {e}");
        }
    }
}

/// Counts a connection while it is open.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(stream: UnixStream, daemon: &Arc<Daemon>, open: &Arc<AtomicUsize>) {
    let is_full = open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX;
    let counted = Counted(open.clone());
    let daemon = daemon.clone();
    let talk = move || {
        let refusal = if is_full {
            Some(Error::with(
                ErrorKind::Busy,
                "the daemon has too many connections; try again",
            ))
        } else {
            stranger(&stream)
        };
        if let Err(e) = converse(&stream, &daemon, refusal.as_ref(), counted) {
            debug!("a connection ended: {e}");
        }
    };
    if let Err(e) = thread::Builder::new().name("client".into()).spawn(talk) {
        warn!("a connection was turned away: {e}");
    }
}

/// The refusal of a client that is neither root nor this user. The socket's mode says the same; this does not depend on it.
fn stranger(stream: &UnixStream) -> Option<Error> {
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) if state::is_trusted(peer.uid()) => None,
        Ok(peer) => Some(Error::with(
            ErrorKind::Permission,
            format!("user {} may not control this pool", peer.uid()),
        )),
        Err(e) => Some(Error::io(e.into(), "the client is not known")),
    }
}

fn converse(
    stream: &UnixStream,
    daemon: &Daemon,
    refusal: Option<&Error>,
    counted: Counted,
) -> io::Result<()> {
    stream.set_read_timeout(Some(READ_WAIT))?;
    stream.set_write_timeout(Some(WRITE_WAIT))?;
    let mut out = stream;
    if let Some(error) = refusal {
        return protocol::write_line(&mut out, &Message::from(error));
    }
    let hello = Message::Hello {
        version: protocol::VERSION,
        pool: daemon.host.pool().name(),
        id: daemon.host.pool().id().to_string(),
        pid: std::process::id(),
    };
    protocol::write_line(&mut out, &hello)?;
    let mut input = BufReader::new(stream);
    let limits = LineLimits {
        bytes_max: protocol::REQUEST_BYTES_MAX,
        wait_ns_max: REQUEST_NS_MAX,
    };
    let clock = SystemClock::new();
    loop {
        let line = match protocol::read_line(&mut input, limits, &clock) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(e) => {
                let error = Error::with(ErrorKind::Invalid, format!("request: {e}"));
                return protocol::write_line(&mut out, &Message::from(&error));
            }
        };
        match answer(&line, daemon, stream)? {
            // What stays may stay for weeks, so it does not count among those who come with a question.
            Next::Export(path) => {
                drop(counted);
                return hold(&mut input, daemon, &path);
            }
            Next::Watch => {
                drop(counted);
                return watch(&mut input, daemon);
            }
            Next::Request => {}
        }
    }
}

/// What a connection is for, after an answer.
enum Next {
    Request,
    /// This is served over NBD for as long as it lasts.
    Export(VolumePath),
    /// It hears what happens.
    Watch,
}

/// Tells a client what happens, until it goes away. One that does not read waits for nobody but itself.
fn watch(input: &mut BufReader<&UnixStream>, daemon: &Daemon) -> io::Result<()> {
    let (first, watcher) = match daemon.host.watch() {
        Ok(watching) => watching,
        Err(e) => return protocol::write_line(input.get_mut(), &Message::from(&e)),
    };
    input.get_ref().set_read_timeout(Some(WATCH_WAIT))?;
    let mut told = vec![first];
    loop {
        for told in told {
            protocol::write_line(input.get_mut(), &Message::Event(told))?;
        }
        match input.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if is_timeout(&e) => {}
            Err(e) => return Err(e),
        }
        // In this order: what is told before the end is heard.
        let has_ended = daemon.has_ended.load(Ordering::Acquire);
        told = watcher.take(SystemClock::new().now());
        if has_ended && told.is_empty() {
            return Ok(());
        }
    }
}

/// Whether a socket's timeout ended a call, to look around.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Waits until the client shuts down its side or goes away, then ends what is served for it over NBD.
fn hold(input: &mut BufReader<&UnixStream>, daemon: &Daemon, path: &VolumePath) -> io::Result<()> {
    let mut ignored = [0; 64];
    loop {
        match input.read(&mut ignored) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if is_timeout(&e) => {}
            Err(e) => {
                debug!("a client that had something served was lost: {e}");
                break;
            }
        }
    }
    end_nbd(input.get_mut(), daemon, path)
}

fn end_nbd(out: &mut impl Write, daemon: &Daemon, path: &VolumePath) -> io::Result<()> {
    let message = match daemon.host.end_nbd(path) {
        Ok(()) => Message::Reply(Reply::Done),
        Err(e) => {
            warn!(volume = %path, "ending: {}", one_line(&e));
            Message::from(&e)
        }
    };
    let written = protocol::write_line(out, &message);
    if daemon.is_detached {
        daemon.stop_if_idle();
    }
    written
}

/// Answers one request, and ends a daemon that nobody needs after it. What is served from now on, for as long as this
/// client stays, is returned.
fn answer(line: &[u8], daemon: &Daemon, stream: &UnixStream) -> io::Result<Next> {
    let mut out = stream;
    let request = match protocol::parse_request(line) {
        Ok(request) => request,
        Err(e) => {
            return protocol::write_line(&mut out, &Message::from(&e)).map(|()| Next::Request);
        }
    };
    let is_watch = matches!(request, Request::Watch);
    let mut held = None;
    if let Request::ServeNbd { path, .. } = &request {
        held = Some(path.clone());
    }
    let may_be_last = matches!(request, Request::Stop)
        || (daemon.is_detached && matches!(request, Request::Detach { .. }));
    let mut lines = ProgressLines::new(stream);
    let message = match daemon.requests.begin() {
        None => Message::Stopping,
        Some(_running) => {
            // A client that went away does not stop what it asked for.
            let mut progress = |done, total| lines.tell(done, total);
            match daemon.host.handle(request, &mut progress) {
                Ok(reply) => Message::Reply(reply),
                Err(e) => {
                    debug!("refused: {}", one_line(&e));
                    Message::from(&e)
                }
            }
        }
    };
    let is_done = matches!(message, Message::Reply(_));
    if !is_done {
        held = None;
    }
    let written = lines
        .end()
        .and_then(|()| protocol::write_line(&mut out, &message));
    if let (Err(_), Some(path)) = (&written, &held) {
        // The client left before it heard of it.
        end_nbd(&mut io::sink(), daemon, path)?;
    }
    if may_be_last {
        daemon.stop_if_idle();
    }
    written?;
    Ok(match held {
        Some(path) => Next::Export(path),
        None if is_watch && is_done => Next::Watch,
        None => Next::Request,
    })
}
