//! How a command reaches its pool: through the daemon that serves it, or by opening it under its lock.
//!
//! Which of the two it is can change at any moment, so a request that found neither a daemon nor a free lock looks again.

use crate::devices::Devices;
use crate::events::Told;
use crate::exit_code::{about, from_code, one_line};
use crate::host::{Host, Progress, Role};
use crate::inherited;
use crate::marks::Marks;
use crate::protocol::{self, LineLimits, Message, Reply, Request};
use crate::state::{self, PoolEntry, RUNTIME_DIR, Registry, Runtime};
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use blockfork::pool::{OpenOptions, Pool, RingPlace};
use futures_lite::future::block_on;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use std::fs::{File, OpenOptions as FileOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long a request looks for a daemon or a free lock.
const LOOK_NS_MAX: u64 = 5_000_000_000;
/// How long one try waits for the lock before it looks for a daemon again.
const LOCK_WAIT_MS: u64 = 200;
/// How long a daemon may take to greet.
const GREETING_NS_MAX: u64 = 15_000_000_000;
/// How long a daemon may take to open its pool and recover its devices.
const START_NS_MAX: u64 = 120_000_000_000;
const POLL: Duration = Duration::from_millis(20);
/// Answers are not limited as requests are: the daemon is trusted, and a diff is as long as it is.
const ANSWER_BYTES_MAX: usize = 4 << 30;

/// What came of one way to reach the pool.
enum Outcome {
    Answer(Result<Reply>),
    /// It is changing hands; look again.
    Again(Error),
}

/// Sends a request to a pool.
pub(crate) fn call(pool: &Name, request: &Request, progress: Progress<'_>) -> Result<Reply> {
    let entry = Registry::from_env()?.find(pool)?;
    call_entry(&entry, request, progress)
}

/// Sends a request to a pool whose entry is known.
pub(crate) fn call_entry(
    entry: &PoolEntry,
    request: &Request,
    progress: Progress<'_>,
) -> Result<Reply> {
    let runtime = Runtime::of(&entry.name)?;
    let clock = SystemClock::new();
    loop {
        let outcome = match Connection::open(&runtime, &entry.id, &clock)? {
            Some(mut connection) => connection.call(request, progress)?,
            None => offline(entry, &runtime, request, progress),
        };
        match outcome {
            Outcome::Answer(answer) => return answer,
            Outcome::Again(_) if clock.monotonic_ns() < LOOK_NS_MAX => thread::sleep(POLL),
            Outcome::Again(error) => return Err(error),
        }
    }
}

/// Sends a request to the pool's daemon, started if there is none.
pub(crate) fn call_daemon(pool: &Name, request: &Request, progress: Progress<'_>) -> Result<Reply> {
    ask_daemon(pool, request, progress).map(|(_, reply)| reply)
}

/// The same, with the connection over which the answer came. A daemon that is just stopping is replaced by the next one.
fn ask_daemon(
    pool: &Name,
    request: &Request,
    progress: Progress<'_>,
) -> Result<(Connection, Reply)> {
    let entry = Registry::from_env()?.find(pool)?;
    let runtime = Runtime::of(pool)?;
    let clock = SystemClock::new();
    loop {
        ensure_daemon(pool)?;
        let answered = match Connection::open(&runtime, &entry.id, &clock)? {
            Some(mut connection) => {
                let outcome = connection.call(request, progress)?;
                Some((connection, outcome))
            }
            None => None,
        };
        match answered {
            Some((connection, Outcome::Answer(answer))) => return Ok((connection, answer?)),
            // The daemon was about to stop; the next one is not.
            _ if clock.monotonic_ns() < LOOK_NS_MAX => thread::sleep(POLL),
            Some((_, Outcome::Again(error))) => return Err(error),
            None => {
                let fact = format!("pool {pool}: its daemon comes and goes; try again");
                return Err(Error::with(ErrorKind::Busy, fact));
            }
        }
    }
}

/// Asks the pool's daemon, started if there is none, for something that lasts as long as this process; `begun` gets the
/// answer. Returns when a signal ended it and the daemon has put everything in order.
pub(crate) fn hold(
    pool: &Name,
    request: &Request,
    begun: impl FnOnce(Reply) -> Result<()>,
) -> Result<()> {
    let (connection, reply) = ask_daemon(pool, request, &mut |_, _| {})?;
    connection.shut_down_on_signal()?;
    begun(reply)?;
    connection.end()
}

/// Hands over what the pool's daemon tells, until the daemon ends or `hear` fails or says that it hears no longer.
pub(crate) fn watch(pool: &Name, mut hear: impl FnMut(Told) -> Result<bool>) -> Result<()> {
    let entry = Registry::from_env()?.find(pool)?;
    let connection = Connection::open(&Runtime::of(pool)?, &entry.id, &SystemClock::new())?;
    let Some(mut connection) = connection else {
        return Err(Error::with(
            ErrorKind::NotFound,
            format!(
                "pool {pool}: no daemon serves it, so nothing would be told; start one with `ublkctl serve {pool}`"
            ),
        ));
    };
    match connection.call(&Request::Watch, &mut |_, _| {})? {
        Outcome::Answer(answer) => answer?,
        Outcome::Again(error) => return Err(error),
    };
    let pid = connection.pid;
    let ended = |e: io::Error| Error::io(e, format!("the daemon (process {pid}) ended"));
    let limits = LineLimits {
        bytes_max: protocol::REQUEST_BYTES_MAX,
        wait_ns_max: u64::MAX,
    };
    let clock = SystemClock::new();
    loop {
        let line = protocol::read_line(&mut connection.input, limits, &clock).map_err(ended)?;
        let line = line.ok_or_else(|| ended(io::ErrorKind::UnexpectedEof.into()))?;
        match serde_json::from_slice(&line).map_err(|e| ended(e.into()))? {
            Message::Event(told) => {
                if !hear(told)? {
                    return Ok(());
                }
            }
            Message::Error { kind, message } => return Err(Message::into_error(&kind, message)),
            Message::Hello { .. }
            | Message::Progress { .. }
            | Message::Reply(_)
            | Message::Stopping => return Err(ended(io::ErrorKind::InvalidData.into())),
        }
    }
}

/// Whether a daemon answers for a pool. That of another pool of this name is an error.
pub(crate) fn is_served(pool: &Name) -> Result<bool> {
    let entry = Registry::from_env()?.find(pool)?;
    let connection = Connection::open(&Runtime::of(pool)?, &entry.id, &SystemClock::new())?;
    Ok(connection.is_some())
}

/// The process that answers for a pool of this name, whichever it is.
pub(crate) fn daemon_of(name: &Name) -> Result<Option<u32>> {
    let greeted = Connection::greet(&Runtime::of(name)?, &SystemClock::new())?;
    Ok(greeted.map(|(connection, _)| connection.pid))
}

/// A connection to a daemon that has greeted.
struct Connection {
    input: BufReader<UnixStream>,
    pid: u32,
}

impl Connection {
    /// Connects to the daemon of the pool with this id; none if no daemon answers.
    fn open(runtime: &Runtime, id: &str, clock: &dyn Clock) -> Result<Option<Self>> {
        match Self::greet(runtime, clock)? {
            Some((connection, other)) if other != id => Err(Error::with(
                ErrorKind::Busy,
                format!(
                    "{}: process {} answers there for another pool of this name, {other}, and this one is {id}; give each state directory a runtime directory of its own, {RUNTIME_DIR}",
                    runtime.socket().display(),
                    connection.pid
                ),
            )),
            greeted => Ok(greeted.map(|(connection, _)| connection)),
        }
    }

    /// Connects to whatever daemon answers, and hears the id of its pool.
    fn greet(runtime: &Runtime, clock: &dyn Clock) -> Result<Option<(Self, String)>> {
        let path = runtime.socket();
        let shown = path.display();
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(e) => {
                return Err(Error::io(
                    e,
                    format!("{shown}: the daemon cannot be reached"),
                ));
            }
        };
        let failed = |e| Error::io(e, format!("{shown}: the daemon cannot be talked to"));
        refuse_stranger(&stream, &path)?;
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .map_err(failed)?;
        let mut input = BufReader::new(stream);
        let limits = LineLimits {
            bytes_max: protocol::REQUEST_BYTES_MAX,
            wait_ns_max: GREETING_NS_MAX,
        };
        let line = match protocol::read_line(&mut input, limits, clock) {
            Ok(Some(line)) => line,
            // It stopped between the connection and the greeting.
            Ok(None) => return Ok(None),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                return Ok(None);
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!(
                        "{shown}: the daemon does not answer; look at it, or kill it and run `ublkctl recover`"
                    ),
                ));
            }
            Err(e) => return Err(failed(e)),
        };
        match serde_json::from_slice(&line) {
            Ok(Message::Hello {
                version, pid, id, ..
            }) if version == protocol::VERSION => Ok(Some((Self { input, pid }, id))),
            Ok(Message::Error { kind, message }) => Err(Message::into_error(&kind, message)),
            _ => Err(Error::with(
                ErrorKind::Unsupported,
                format!(
                    "{shown}: the daemon speaks another version of the protocol; stop it with the ublkctl that started it"
                ),
            )),
        }
    }

    fn call(&mut self, request: &Request, progress: Progress<'_>) -> Result<Outcome> {
        let pid = self.pid;
        let gone = |e: io::Error| {
            Error::io(
                e,
                format!(
                    "the daemon (process {pid}) went away before it answered; look with `ublkctl list`, then `ublkctl recover`"
                ),
            )
        };
        // One that ends before it has taken the request has done nothing, so another may be asked.
        let unasked = |e: io::Error| {
            let is_gone = matches!(
                e.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            );
            let error = gone(e);
            if is_gone {
                Ok(Outcome::Again(error))
            } else {
                Err(error)
            }
        };
        if let Err(e) = protocol::write_line(self.input.get_mut(), request) {
            return unasked(e);
        }
        self.input.get_ref().set_read_timeout(None).map_err(gone)?;
        let limits = LineLimits {
            bytes_max: ANSWER_BYTES_MAX,
            wait_ns_max: u64::MAX,
        };
        let clock = SystemClock::new();
        let mut is_taken = false;
        loop {
            let line = match protocol::read_line(&mut self.input, limits, &clock) {
                Ok(line) => line,
                // The kernel says so where the request was still unread.
                Err(e) if !is_taken => return unasked(e),
                Err(e) => return Err(gone(e)),
            };
            is_taken = true;
            let Some(line) = line else {
                return Err(gone(io::ErrorKind::UnexpectedEof.into()));
            };
            match serde_json::from_slice(&line).map_err(|e| gone(e.into()))? {
                Message::Progress { done, total } => progress(done, total),
                Message::Reply(reply) => return Ok(Outcome::Answer(Ok(reply))),
                Message::Error { kind, message } => {
                    return Ok(Outcome::Answer(Err(Message::into_error(&kind, message))));
                }
                // Nobody who watches calls.
                Message::Event(_) => return Err(gone(io::ErrorKind::InvalidData.into())),
                Message::Stopping | Message::Hello { .. } => {
                    return Ok(Outcome::Again(Error::with(
                        ErrorKind::Busy,
                        format!("the daemon (process {pid}) is stopping; try again"),
                    )));
                }
            }
        }
    }
}

/// Refuses a daemon of another user, which could answer anything. Root's is everybody's.
fn refuse_stranger(stream: &UnixStream, path: &Path) -> Result<()> {
    let shown = path.display();
    let peer = getsockopt(stream, PeerCredentials)
        .map_err(|e| Error::io(e.into(), format!("{shown}: nobody knows who listens there")))?;
    if state::is_trusted(peer.uid()) {
        return Ok(());
    }
    Err(Error::with(
        ErrorKind::Permission,
        format!(
            "{shown}: process {} of user {} listens there, which is neither root nor this user",
            peer.pid(),
            peer.uid()
        ),
    ))
}

impl Connection {
    /// Ends this side of the connection when a signal asks this process to end. A second one ends it at once.
    fn shut_down_on_signal(&self) -> Result<()> {
        let failed = |e| Error::io(e, "signals cannot be caught");
        let stream = self.input.get_ref().try_clone().map_err(failed)?;
        let wanted = [SIGINT, SIGHUP].into_iter();
        let wanted = wanted.filter(|signal| !inherited::is_ignored(*signal));
        let mut signals = Signals::new(wanted.chain([SIGTERM])).map_err(failed)?;
        let wait = move || {
            let mut is_first = true;
            for signal in signals.forever() {
                if std::mem::replace(&mut is_first, false)
                    && stream.shutdown(Shutdown::Write).is_ok()
                {
                    continue;
                }
                if let Err(e) = emulate_default_handler(signal) {
                    tracing::warn!("signal {signal}: {e}");
                }
            }
        };
        let started = thread::Builder::new().name("signals".into()).spawn(wait);
        started.map(drop).map_err(failed)
    }

    /// Waits for the last answer.
    fn end(mut self) -> Result<()> {
        let pid = self.pid;
        let gone = |e: Option<io::Error>| {
            let fact = format!("the daemon (process {pid}) ended, and with it what it served");
            match e {
                Some(e) => Error::io(e, fact),
                None => Error::with(ErrorKind::Io, fact),
            }
        };
        let limits = LineLimits {
            bytes_max: protocol::REQUEST_BYTES_MAX,
            wait_ns_max: u64::MAX,
        };
        let line = protocol::read_line(&mut self.input, limits, &SystemClock::new());
        let line = line.map_err(|e| gone(Some(e)))?.ok_or_else(|| gone(None))?;
        match serde_json::from_slice(&line) {
            Ok(Message::Reply(_)) => Ok(()),
            Ok(Message::Error { kind, message }) => Err(Message::into_error(&kind, message)),
            _ => Err(gone(None)),
        }
    }
}

/// Runs a request on the pool itself.
fn offline(
    entry: &PoolEntry,
    runtime: &Runtime,
    request: &Request,
    progress: Progress<'_>,
) -> Outcome {
    let read_only = request.is_read_only();
    let access = Access {
        write: !read_only,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let file = match PoolFile::open(&entry.path, access) {
        Ok(file) => Arc::new(file),
        Err(e) if e.kind() == ErrorKind::Busy => return Outcome::Again(e),
        Err(e) => return Outcome::Answer(Err(named(entry, e))),
    };
    Outcome::Answer(offline_locked(entry, runtime, file, request, progress))
}

/// What most mistakes come to: found before the pool is opened for writing, which would mark it.
fn preflight(
    entry: &PoolEntry,
    runtime: &Runtime,
    file: &Arc<PoolFile>,
    request: &Request,
) -> Result<()> {
    open(entry, runtime, file.clone(), true, Role::Command)?.preflight(request)
}

/// Where a missing pool file is concerned, the way out.
fn named(entry: &PoolEntry, error: Error) -> Error {
    if error.kind() != ErrorKind::NotFound {
        return error;
    }
    Error::with(
        ErrorKind::NotFound,
        format!(
            "pool {}: {} is not there; put it back, or forget the pool with `ublkctl pool export --force {}`",
            entry.name,
            entry.path.display(),
            entry.name
        ),
    )
}

fn offline_locked(
    entry: &PoolEntry,
    runtime: &Runtime,
    file: Arc<PoolFile>,
    request: &Request,
    progress: Progress<'_>,
) -> Result<Reply> {
    let read_only = request.is_read_only();
    if !read_only {
        preflight(entry, runtime, &file, request)?;
    }
    let host = open(entry, runtime, file, read_only, Role::Command)?;
    let answer = host.handle(request.clone(), progress);
    if read_only {
        return answer;
    }
    let settled = settle(&host, progress);
    let reply = answer?;
    settled?;
    Ok(reply)
}

/// Finishes the background work of a pool that no daemon serves, and closes it.
fn settle(host: &Host, progress: Progress<'_>) -> Result<()> {
    let pool = host.pool();
    let most = pool.status().backlog_bytes;
    while block_on(pool.maintain(host.device()))? {
        if most > 0 {
            progress(most.saturating_sub(pool.status().backlog_bytes), most);
        }
    }
    block_on(pool.close(host.device()))
}

/// Opens a pool that is locked already, and that is still known as `entry` says.
pub(crate) fn open(
    entry: &PoolEntry,
    runtime: &Runtime,
    file: Arc<PoolFile>,
    read_only: bool,
    role: Role,
) -> Result<Host> {
    let registry = Registry::from_env()?;
    registry.refuse_changed(entry)?;
    let boot_id = state::boot_id()?;
    let ring = runtime.ring();
    // Without a daemon nothing new comes to the ring, but what a killed daemon left in it counts.
    let ring = if role == Role::Daemon || ring.exists() {
        RingPlace::File {
            path: ring,
            boot_id,
        }
    } else {
        RingPlace::Nowhere
    };
    let options = OpenOptions {
        read_only,
        device_blocks: file.blocks(),
        ring,
        clock: Arc::new(SystemClock::new()),
    };
    let device = FileDevice::new(file);
    let opened = block_on(Pool::open(&device, options));
    let pool = opened.map_err(|e| match about(&entry.path, &e) {
        // Where a pool is known to live, nothing is damage.
        e if e.kind() == ErrorKind::NotFound => {
            Error::corrupt(format!("{e}, but pool {} lived there", entry.name))
        }
        e => e,
    })?;
    pool.limit_metadata(state::metadata_cache());
    let (name, id) = (pool.name(), pool.id().to_string());
    if name != entry.name || (id != entry.id) {
        return Err(Error::with(
            ErrorKind::NotFound,
            format!(
                "pool {}: {} holds another pool now ({name}, {id}); export {} and import that",
                entry.name,
                entry.path.display(),
                entry.name
            ),
        ));
    }
    let devices = Devices::saved(runtime, &entry.name, id, boot_id)?;
    // Marks that cannot be read keep nobody from a pool.
    let marks = registry.marks(&entry.name).unwrap_or_else(|e| {
        tracing::warn!("the usual space marks count: {}", one_line(&e));
        Marks::default()
    });
    Ok(Host::new(pool, device, devices, role, marks))
}

/// Sees to it that a daemon serves the pool: starts one if there is none. True if it did.
pub(crate) fn ensure_daemon(pool: &Name) -> Result<bool> {
    let entry = Registry::from_env()?.find(pool)?;
    let runtime = Runtime::of(pool)?;
    runtime.prepare()?;
    // Two commands that find no daemon start one, not two.
    let _lock = state::lock_file(&runtime.start_lock(), START_NS_MAX)?;
    let clock = SystemClock::new();
    if Connection::open(&runtime, &entry.id, &clock)?.is_some() {
        return Ok(false);
    }
    let mut log = open_log(&runtime)?;
    let begin = log
        .seek(SeekFrom::End(0))
        .map_err(|e| Error::io(e, format!("{}", runtime.log().display())))?;
    let mut child = spawn(&entry, &log)?;
    loop {
        if Connection::open(&runtime, &entry.id, &clock)?.is_some() {
            return Ok(true);
        }
        if let Some(error) = death(&mut child, &runtime, begin)? {
            return Err(error);
        }
        if clock.monotonic_ns() > START_NS_MAX {
            return Err(Error::with(
                ErrorKind::Busy,
                format!(
                    "pool {pool}: the daemon (process {}) is not ready yet; see {}",
                    child.id(),
                    runtime.log().display()
                ),
            ));
        }
        thread::sleep(POLL);
    }
}

fn open_log(runtime: &Runtime) -> Result<File> {
    const LOG_BYTES_MAX: u64 = 1 << 20;
    let path = runtime.log();
    let failed = |e| Error::io(e, format!("{}: cannot be opened", path.display()));
    let log = FileOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed)?;
    if log.metadata().map_err(failed)?.len() > LOG_BYTES_MAX {
        log.set_len(0).map_err(failed)?;
    }
    Ok(log)
}

fn spawn(entry: &PoolEntry, log: &File) -> Result<Child> {
    let failed = |e| {
        Error::io(
            e,
            format!("pool {}: the daemon cannot be started", entry.name),
        )
    };
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(["serve", "--detached", entry.name.as_str()]);
    for (variable, path) in state::directories()? {
        command.env(variable, path);
    }
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command.stderr(log.try_clone().map_err(failed)?);
    command.spawn().map_err(failed)
}

/// The error of a daemon that died before it was ready: its own last line.
fn death(child: &mut Child, runtime: &Runtime, log_begin: u64) -> Result<Option<Error>> {
    let path = runtime.log();
    let failed = |e| Error::io(e, format!("{}: cannot be read", path.display()));
    let Some(status) = child.try_wait().map_err(failed)? else {
        return Ok(None);
    };
    let said = last_line(&path, log_begin).map_err(failed)?;
    let message = match (said, status.signal()) {
        (Some(line), None) => line.strip_prefix("ublkctl: ").unwrap_or(&line).to_owned(),
        (_, Some(signal)) => format!(
            "the daemon was killed by signal {signal}; see {}",
            path.display()
        ),
        (None, None) => format!(
            "the daemon ended before it was ready; see {}",
            path.display()
        ),
    };
    Ok(Some(from_code(status.code(), message)))
}

fn last_line(path: &Path, begin: u64) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(begin))?;
    let mut bytes = Vec::new();
    file.take(1 << 20).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .map(str::to_owned))
}
