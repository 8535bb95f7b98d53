//! The daemon: one per pool, which serves its devices and answers commands on its socket.
//!
//! The pool's lock comes first, so a socket or pid file that is found is a dead daemon's. Devices are recovered before
//! the socket is there, so whoever gets an answer finds every device in place.

mod keeper;
mod listener;
mod maintenance;
mod monitor;
mod process;
mod progress;
mod requests;

use crate::client;
use crate::devices::Devices;
use crate::exit_code::one_line;
use crate::host::{Host, Role};
use crate::inherited;
use crate::state::{self, PoolEntry, Registry, Runtime};
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use futures_lite::future::block_on;
use keeper::Keeper;
use listener::Listener;
use maintenance::Maintenance;
use requests::Requests;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tracing::{error, info, warn};

/// How long a daemon that another command started waits for its first device.
const IDLE_START: Duration = Duration::from_secs(20);
/// How long to wait for a lock: the kernel may be finishing what a killed daemon had in flight.
const LOCK_WAIT_MS: u64 = 10_000;

/// How long a daemon that ends waits for clients that are being turned away, and for those who watch to hear the last.
const LAST_WORDS_NS_MAX: u64 = 1_000_000_000;

/// What all threads of the daemon share.
#[derive(Debug)]
struct Daemon {
    host: Host,
    requests: Requests,
    /// Ends the main thread's wait.
    wake: Handle,
    /// Nothing happens any more.
    has_ended: AtomicBool,
    /// How many ask something now.
    clients: Arc<AtomicUsize>,
    /// Whether another command started it, so that it ends with its last device.
    is_detached: bool,
}

impl Daemon {
    /// Ends the daemon if nobody needs it: nothing is attached once no request runs. Not while the daemon is the only one
    /// that has the pool.
    fn stop_if_idle(&self) {
        let is_idle = || self.host.devices().is_empty() && !self.host.is_deleted();
        if self.requests.stop_if(is_idle) {
            self.wake.close();
        }
    }
}

/// Serves a pool until a signal comes or, `detached`, until its last device is gone.
/// `metadata_cache`: memory for metadata in bytes, if not what is usual.
pub(crate) fn serve(pool: &Name, detached: bool, metadata_cache: Option<u64>) -> Result<()> {
    // Before anything is opened.
    let closed = if detached {
        inherited::close_descriptors()
    } else {
        Ok(())
    };
    start_log();
    if let Err(e) = closed {
        warn!("descriptors of the command that started it stay open: {e}");
    }
    let entry = Registry::from_env()?.find(pool)?;
    let runtime = Runtime::of(pool)?;
    runtime.prepare()?;
    // The daemon of another pool of this name, of another state directory: its files here are not to be overwritten. A
    // daemon of this pool has the pool's lock, and may be about to end.
    client::is_served(pool)?;
    Devices::refuse_of_another_pool(&runtime, &entry.id, state::boot_id()?)?;
    if detached {
        if let Err(e) = process::leave_session() {
            warn!("still in the session of the command that started it: {e}");
        }
        if let Err(e) = inherited::raise_priority() {
            warn!("its priority is that of the command that started it: {e}");
        }
    }
    // The limits of a service are meant for it. Those of a command that attaches a volume are not.
    inherited::lift_limits(detached);
    for fact in process::prepare() {
        warn!("{fact}");
    }
    // Before any other thread, so that no signal ends the process in between.
    let ends_on_interrupt = detached || !inherited::is_ignored(SIGINT);
    let caught = [SIGTERM, SIGHUP].into_iter();
    let signals = Signals::new(caught.chain(ends_on_interrupt.then_some(SIGINT)))
        .map_err(|e| Error::io(e, "signals cannot be caught"))?;
    let (host, _alone) = open(&entry, &runtime)?;
    if let Some(bytes) = metadata_cache {
        host.pool().limit_metadata(bytes);
    }
    host.recover()?;
    run(host, signals, &runtime, detached)
}

/// Opens the pool, for reading where its medium takes no writes. The second value is what keeps other daemons away then.
fn open(entry: &PoolEntry, runtime: &Runtime) -> Result<(Host, Option<File>)> {
    let open = |write| {
        let access = Access {
            write,
            lock_wait_ms: LOCK_WAIT_MS,
        };
        PoolFile::open(&entry.path, access)
    };
    let (file, alone) = match open(true) {
        Err(e) if e.kind() == ErrorKind::ReadOnly => {
            warn!(pool = %entry.name, "everything is read-only: {}", one_line(&e));
            (open(false)?, Some(lock_reader(runtime)?))
        }
        opened => (opened?, None),
    };
    if !file.is_direct() {
        warn!(path = %entry.path.display(), "the file system refuses O_DIRECT: I/O is buffered");
    }
    let file = Arc::new(file);
    let read_only = !file.is_writable();
    let host = match client::open(entry, runtime, file.clone(), read_only, Role::Daemon) {
        // What is whole of a damaged pool can be read, under the same lock.
        Err(e) if e.kind() == ErrorKind::Corrupt && !read_only => {
            let host = client::open(entry, runtime, file, true, Role::Daemon)?;
            warn!(pool = %entry.name, "cannot be opened for writing, everything is read-only: {}", one_line(&e));
            host
        }
        opened => opened?,
    };
    for warning in host.pool().status().warnings {
        warn!(pool = %entry.name, "{warning}");
    }
    Ok((host, alone))
}

/// Keeps a second daemon of these runtime files away.
fn lock_reader(runtime: &Runtime) -> Result<File> {
    let path = runtime.reader_lock();
    let failed = |e| Error::io(e, format!("{}: cannot be locked", path.display()));
    let opened = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let file = opened.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{}: another daemon serves this pool already",
                path.display()
            ),
        )),
        Err(TryLockError::Error(e)) => Err(failed(e)),
    }
}

fn run(host: Host, mut signals: Signals, runtime: &Runtime, is_detached: bool) -> Result<()> {
    let daemon = Arc::new(Daemon {
        host,
        requests: Requests::default(),
        wake: signals.handle(),
        has_ended: AtomicBool::new(false),
        clients: Arc::default(),
        is_detached,
    });
    let maintenance = Maintenance::start(daemon.clone())?;
    let listener = Listener::bind(runtime)?;
    state::write_file(
        &runtime.pid(),
        format!("{}\n", std::process::id()).as_bytes(),
    )?;
    let listening = listener.start(daemon.clone())?;
    let keeper = Keeper::start(daemon.clone(), runtime.clone(), listening)?;
    info!(pool = %daemon.host.pool().name(), devices = daemon.host.devices().count(), "serving");
    if is_detached {
        let daemon = daemon.clone();
        let idle = move || {
            std::thread::sleep(IDLE_START);
            daemon.stop_if_idle();
        };
        std::thread::Builder::new()
            .name("idle".into())
            .spawn(idle)
            .map_err(|e| Error::io(e, "thread"))?;
    }
    let mut is_warned = false;
    for signal in signals.forever() {
        if signal == SIGHUP {
            continue;
        }
        if let Some(fact) = daemon.host.deleted()
            && !std::mem::replace(&mut is_warned, true)
        {
            error!(signal, "not stopping at the first signal: {fact}");
            continue;
        }
        info!(signal, "stopping");
        break;
    }
    // Waits for the requests that run, and turns away those that come.
    daemon.requests.stop();
    keeper.stop();
    maintenance.stop();
    let ended = shut_down(&daemon.host, runtime);
    let ended = ended.and_then(|()| {
        if daemon.host.is_deleted() {
            let fact = "the pool's file was deleted, and what it held is gone";
            return Err(Error::with(ErrorKind::Io, fact));
        }
        Ok(())
    });
    daemon.has_ended.store(true, Ordering::Release);
    // Whoever asked in the last moment hears that nothing was done.
    let clock = SystemClock::new();
    let has_listeners = || daemon.clients.load(Ordering::Relaxed) > 0 || daemon.host.is_watched();
    while has_listeners() && clock.monotonic_ns() < LAST_WORDS_NS_MAX {
        std::thread::sleep(Duration::from_millis(5));
    }
    ended
}

/// Makes everything durable, and leaves devices that are still attached to the next daemon.
fn shut_down(host: &Host, runtime: &Runtime) -> Result<()> {
    let ended = host.end_all_nbd();
    ended.inspect_err(|e| error!("ending NBD: {}", one_line(e)))?;
    if host.pool().is_read_only() {
        return leave(host, runtime);
    }
    if host.devices().is_empty() {
        let closed = block_on(host.pool().close(host.device()));
        closed.inspect_err(|e| error!("closing: {}", one_line(e)))?;
        info!("closed");
        return runtime.clear();
    }
    let saved = block_on(host.pool().checkpoint(host.device()));
    let left = leave(host, runtime);
    let flushed = block_on(host.pool().flush(host.device()));
    left?;
    saved
        .and(flushed)
        .inspect_err(|e| error!("stopping: {}", one_line(e)))
}

/// Lets go of the devices. The ring stays: what it holds may be nowhere else.
fn leave(host: &Host, runtime: &Runtime) -> Result<()> {
    let released = host.devices().release();
    for (entry, served) in released {
        // No request runs any more, so nobody shares it.
        if let Ok(served) = Arc::try_unwrap(served) {
            served.abandon();
        } else {
            warn!(device = %entry.node(), "is still in use by a command; its requests wait until this process has ended");
        }
        info!(device = %entry.node(), volume = %entry.path, "left to the next daemon");
    }
    state::remove_file(&runtime.socket())?;
    state::remove_file(&runtime.pid())
}

fn start_log() {
    let started = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        // It would say on stderr that stderr cannot be written, and panic when that fails: a log without room would end
        // the daemon.
        .log_internal_errors(false)
        .try_init();
    if let Err(e) = started {
        crate::output::say(&format!("no log: {e}"));
    }
}
