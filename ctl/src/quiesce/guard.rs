//! The guard: the process that flushes and freezes for a command, and thaws whatever becomes of the command.
//!
//! One thread works through the orders, one waits for the command. This way a freeze that hangs in the kernel keeps
//! nothing else frozen longer than the time limit.

use super::kernel;
use super::messages::{Fault, LayerOrders, Orders, Place, Report, Step};
use crate::protocol::{self, LineLimits};
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use nix::unistd::setsid;
use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::{self, File};
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// The longest line of orders.
const ORDERS_BYTES_MAX: usize = 1 << 20;

/// What wakes the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The first file system is about to be frozen: time is running.
    FreezeBegins,
    /// All orders are carried out, or one has failed.
    WorkEnded { failed: bool },
    /// The command wants a thaw, or is gone.
    ThawAsked,
}

/// Runs as the guard of the command at the other ends of stdin and stdout.
pub(crate) fn run() -> Result<()> {
    // A signal to the terminal, or a shutdown, must not end this process while something is frozen. It ends with the
    // command anyway.
    let _ignored = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|e| Error::io(e, "signals cannot be caught"))?;
    if let Err(e) = setsid() {
        tracing::debug!("still in the command's session: {e}");
    }
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!("it may be chosen by the OOM killer: {e}");
    }
    let limits = LineLimits {
        bytes_max: ORDERS_BYTES_MAX,
        wait_ns_max: u64::MAX,
    };
    let clock = SystemClock::new();
    let mut input = io::stdin().lock();
    let line = protocol::read_line(&mut input, limits, &clock);
    let line = line.map_err(|e| Error::io(e, "orders"))?;
    drop(input);
    let orders: Orders = serde_json::from_slice(&line.unwrap_or_default())
        .map_err(|e| Error::with(ErrorKind::Invalid, format!("orders: {e}")))?;
    let seconds = orders.freeze_seconds;
    let opened = match open(&orders.layers) {
        Ok(layers) => layers,
        Err(fault) => {
            report(&Report::Failed(fault))?;
            return report(&Report::Thawed {
                in_time: false,
                faults: Vec::new(),
            });
        }
    };
    let work = Arc::new(Work {
        layers: opened,
        frozen: Mutex::default(),
    });
    let (events, received) = channel();
    start("command", {
        let events = events.clone();
        move || await_command(&events)
    })?;
    let worker = start("work", {
        let work = work.clone();
        move || work.carry_out(seconds.is_some(), &events)
    })?;
    let in_time = watch(&received, seconds, &clock)?;
    if seconds.is_none() {
        return Ok(());
    }
    let mut faults = work.thaw();
    // If a freeze is still under way, the worker thaws that as soon as it is done.
    match worker.join() {
        Ok(more) => faults.extend(more),
        Err(_) => return Err(Error::with(ErrorKind::Io, "the worker ended")),
    }
    report(&Report::Thawed { in_time, faults })
}

fn start<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<thread::JoinHandle<T>> {
    let started = thread::Builder::new().name(name.into()).spawn(run);
    started.map_err(|e| Error::io(e, "a thread cannot be started"))
}

/// Tells the command. If it is gone, nobody has to know.
fn report(report: &Report) -> Result<()> {
    match protocol::write_line(&mut io::stdout().lock(), report) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io(e, "stdout")),
        _ => Ok(()),
    }
}

/// Wakes the main thread, unless that has ended.
fn tell(events: &Sender<Event>, event: Event) {
    if events.send(event).is_err() {
        tracing::debug!("{event:?}: nobody waits for it");
    }
}

/// Waits until the command asks for a thaw, or ends.
fn await_command(events: &Sender<Event>) {
    let mut byte = [0];
    if let Err(e) = io::stdin().lock().read(&mut byte) {
        tracing::debug!("the command cannot be heard: {e}");
    }
    tell(events, Event::ThawAsked);
}

/// Waits until it is time to thaw, or without a freeze until the work is done. False if the time limit came first.
fn watch(events: &Receiver<Event>, seconds: Option<u32>, clock: &dyn Clock) -> Result<bool> {
    let mut deadline_ns = u64::MAX;
    loop {
        let left_ns = deadline_ns.saturating_sub(clock.monotonic_ns());
        match events.recv_timeout(Duration::from_nanos(left_ns)) {
            Ok(Event::FreezeBegins) => {
                let limit_ns = u64::from(seconds.unwrap_or(0)) * 1_000_000_000;
                deadline_ns = clock.monotonic_ns().saturating_add(limit_ns);
            }
            Ok(Event::WorkEnded { failed }) => {
                if failed || seconds.is_none() {
                    return Ok(!failed);
                }
            }
            Ok(Event::ThawAsked) => return Ok(true),
            Err(RecvTimeoutError::Timeout) => return Ok(false),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::with(ErrorKind::Io, "both threads ended"));
            }
        }
    }
}

/// An open device with open file systems on it.
#[derive(Debug)]
struct OpenLayer {
    device: File,
    file_systems: Vec<File>,
    is_hidden: bool,
}

/// Opens again what was inherited: the standard library makes no file of a number.
fn open(layers: &[LayerOrders]) -> std::result::Result<Vec<OpenLayer>, Fault> {
    let open = |descriptor, layer, file_system| {
        File::open(format!("/proc/self/fd/{descriptor}")).map_err(|e| Fault {
            step: Step::Open,
            place: Place { layer, file_system },
            errno: e.raw_os_error().unwrap_or(libc::EIO),
        })
    };
    let layer = |(at, orders): (usize, &LayerOrders)| {
        let file_systems = orders.file_systems.iter().enumerate();
        let file_systems =
            file_systems.map(|(number, descriptor)| open(*descriptor, at, Some(number)));
        Ok(OpenLayer {
            device: open(orders.device, at, None)?,
            file_systems: file_systems.collect::<std::result::Result<_, _>>()?,
            is_hidden: orders.is_hidden,
        })
    };
    layers.iter().enumerate().map(layer).collect()
}

/// The orders, and how far they are carried out.
#[derive(Debug)]
struct Work {
    layers: Vec<OpenLayer>,
    frozen: Mutex<Frozen>,
}

/// What is frozen.
#[derive(Debug, Default)]
struct Frozen {
    places: Vec<Place>,
    /// Nothing more may be frozen.
    is_over: bool,
}

impl Work {
    /// Flushes everything, then freezes it. Returns what it had to thaw itself and could not.
    fn carry_out(&self, freezes: bool, events: &Sender<Event>) -> Vec<Fault> {
        let mut late = Vec::new();
        let done = self.flush().and_then(|()| {
            if !freezes {
                return Ok(());
            }
            tell(events, Event::FreezeBegins);
            self.freeze(&mut late)
        });
        let last = match done {
            Ok(()) => Report::Ready,
            Err(fault) => Report::Failed(fault),
        };
        if let Err(e) = report(&last) {
            tracing::debug!("{e}");
        }
        let failed = done.is_err();
        tell(events, Event::WorkEnded { failed });
        late
    }

    fn flush(&self) -> std::result::Result<(), Fault> {
        for (at, layer) in self.layers.iter().enumerate() {
            for (number, file) in layer.file_systems.iter().enumerate() {
                kernel::sync_file_system(file)
                    .map_err(|e| fault(Step::Flush, at, Some(number), &e))?;
            }
            if layer.is_hidden {
                kernel::sync_holder(&layer.device).map_err(|e| fault(Step::Flush, at, None, &e))?;
            }
            layer
                .device
                .sync_all()
                .map_err(|e| fault(Step::Flush, at, None, &e))?;
        }
        Ok(())
    }

    /// Freezes from the top down. A device is flushed before anything below it is frozen: a flush of a device above a
    /// frozen file system would wait.
    fn freeze(&self, late: &mut Vec<Fault>) -> std::result::Result<(), Fault> {
        for (at, layer) in self.layers.iter().enumerate() {
            for (number, file) in layer.file_systems.iter().enumerate() {
                let place = Place {
                    layer: at,
                    file_system: Some(number),
                };
                if self.frozen.lock().is_over {
                    return Ok(());
                }
                if let Err(e) = report(&Report::Freezing(place)) {
                    tracing::debug!("{e}");
                }
                kernel::freeze(file).map_err(|e| fault(Step::Freeze, at, Some(number), &e))?;
                let mut frozen = self.frozen.lock();
                if frozen.is_over {
                    drop(frozen);
                    late.extend(self.thaw_one(place));
                    return Ok(());
                }
                frozen.places.push(place);
            }
            layer
                .device
                .sync_all()
                .map_err(|e| fault(Step::Flush, at, None, &e))?;
        }
        Ok(())
    }

    /// Thaws what is frozen, the lowest first: the thaw of a file system may write to the devices below it.
    fn thaw(&self) -> Vec<Fault> {
        let places = {
            let mut frozen = self.frozen.lock();
            frozen.is_over = true;
            std::mem::take(&mut frozen.places)
        };
        let places = places.into_iter().rev();
        places.filter_map(|place| self.thaw_one(place)).collect()
    }

    fn thaw_one(&self, place: Place) -> Option<Fault> {
        let layer = self.layers.get(place.layer)?;
        let file = layer.file_systems.get(place.file_system?)?;
        let error = kernel::thaw(file).err()?;
        Some(fault(Step::Thaw, place.layer, place.file_system, &error))
    }
}

fn fault(step: Step, layer: usize, file_system: Option<usize>, error: &io::Error) -> Fault {
    Fault {
        step,
        place: Place { layer, file_system },
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockfork::clock::ManualClock;

    fn watched(events: &[Event], seconds: Option<u32>) -> bool {
        let (sender, receiver) = channel();
        for event in events {
            sender.send(*event).unwrap();
        }
        watch(&receiver, seconds, &ManualClock::default()).unwrap()
    }

    #[test]
    fn a_flush_ends_with_its_work_and_a_freeze_when_it_is_asked_to() {
        let ended = |failed| Event::WorkEnded { failed };
        assert!(watched(&[ended(false)], None));
        assert!(!watched(&[ended(true)], None));
        assert!(!watched(&[Event::FreezeBegins, ended(true)], Some(10)));
        let frozen = [Event::FreezeBegins, ended(false), Event::ThawAsked];
        assert!(watched(&frozen, Some(10)));
    }

    #[test]
    fn a_freeze_ends_when_its_time_is_over() {
        let frozen = [Event::FreezeBegins, Event::WorkEnded { failed: false }];
        assert!(!watched(&frozen, Some(0)));
    }
}
