//! The background thread: commits what no flush made durable, writes checkpoints, returns freed space.

use super::Daemon;
use super::monitor::Monitor;
use crate::exit_code::one_line;
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, Result};
use futures_lite::future::block_on;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;
use tracing::error;

/// How often it looks, if nobody asks for it earlier.
const INTERVAL: Duration = Duration::from_millis(100);
/// How often it looks for what is to be told, at most.
const OBSERVE_NS: u64 = 100_000_000;

/// The running thread.
#[derive(Debug)]
pub(super) struct Maintenance {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Maintenance {
    /// Starts the thread.
    pub(super) fn start(daemon: Arc<Daemon>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = thread::Builder::new()
            .name("maintain".into())
            .spawn(move || run(&daemon, &seen));
        Ok(Self {
            thread: thread.map_err(|e| Error::io(e, "the maintenance thread cannot be started"))?,
            stop,
        })
    }

    /// Ends the thread after the step that it is at.
    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            error!("the maintenance thread panicked");
        }
    }
}

fn run(daemon: &Daemon, stop: &AtomicBool) {
    let (pool, device) = (daemon.host.pool(), daemon.host.device());
    let mut has_failed = false;
    let (clock, mut monitor, mut observed_ns) = (SystemClock::new(), Monitor::default(), None);
    while !stop.load(Ordering::Relaxed) {
        let now = clock.monotonic_ns();
        if observed_ns.is_none_or(|then| now - then >= OBSERVE_NS) {
            observed_ns = Some(now);
            monitor.observe(&daemon.host);
        }
        if pool.is_read_only() {
            thread::park_timeout(INTERVAL);
            continue;
        }
        match block_on(pool.maintain(device)) {
            Ok(true) => continue,
            Ok(false) => has_failed = false,
            // A pool that fails goes on failing; once is enough for the log.
            Err(e) if !has_failed => {
                error!("maintenance: {}", one_line(&e));
                daemon.host.tell_error(e.kind(), one_line(&e));
                has_failed = true;
            }
            Err(_) => {}
        }
        wait(pool.maintenance_wanted(), stop, INTERVAL);
    }
}

/// Unparks a thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits until `wanted` is ready, `stop` is set, or the time is up.
fn wait(wanted: impl Future<Output = ()>, stop: &AtomicBool, time: Duration) {
    let mut wanted = pin!(wanted);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    if wanted.as_mut().poll(&mut context).is_pending() && !stop.load(Ordering::Relaxed) {
        thread::park_timeout(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};

    #[test]
    fn what_is_wanted_ends_the_wait() {
        let clock = SystemClock::new();
        let stop = AtomicBool::new(false);
        wait(ready(()), &stop, Duration::from_mins(1));
        wait(pending(), &stop, Duration::from_millis(1));
        wait(pending(), &AtomicBool::new(true), Duration::from_mins(1));
        assert!(clock.monotonic_ns() < 30_000_000_000);
    }
}
