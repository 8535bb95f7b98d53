//! A queue of a device: one thread with one ring.
//!
//! Its buffers, if it has any, outlive the thread, and so its ring: the kernel may write into a buffer as long as the ring
//! lives.

use super::arena::Arena;
use super::command::Affinity;
use super::registered::Helpers;
use super::serving::serve;
use super::task;
use super::wake::Bell;
use crate::device::PoolFile;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Attached;
use crate::sync::Latch;
use io_uring::{IoUring, cqueue, squeue};
use libublk::UblkError;
use libublk::io::{UblkDev, UblkQueue, ublk_init_task_ring};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

type Ring = IoUring<squeue::Entry, cqueue::Entry>;

/// What a queue thread works with.
pub(super) struct Work {
    pub(super) index: u16,
    pub(super) device: Arc<UblkDev>,
    pub(super) file: Arc<PoolFile>,
    pub(super) attached: Arc<Attached>,
    pub(super) affinity: Option<Affinity>,
    /// Where the driver registers clients' pages with the ring.
    pub(super) helpers: Option<Arc<Helpers>>,
}

/// A running queue thread, as the others see it.
pub(super) struct Queue {
    shared: Arc<Shared>,
    thread: JoinHandle<Option<Places>>,
}

/// Where the bytes of requests are.
pub(super) enum Places {
    /// The driver copies from and to these buffers.
    Copied(Arena),
    /// In the clients' pages, which the driver registers.
    Registered(Arc<Helpers>),
}

/// What a queue thread and its owner share.
pub(super) struct Shared {
    pub(super) bell: Arc<Bell>,
    frozen: Latch,
    failure: Mutex<Option<(ErrorKind, String)>>,
}

impl Queue {
    /// Starts the thread. It says on `ready` whether it has its ring, and then fetches.
    pub(super) fn start(work: Work, ready: Sender<Result<()>>) -> Result<Self> {
        let name = format!("ublk{}-{}", work.device.dev_info.dev_id, work.index);
        let shared = Arc::new(Shared {
            bell: Arc::new(Bell::new().map_err(|e| Error::io(e, format!("{name}: no eventfd")))?),
            frozen: Latch::default(),
            failure: Mutex::new(None),
        });
        let thread = task::spawn(&name, {
            let shared = Arc::clone(&shared);
            move || run(&work, &shared, &ready)
        })?;
        Ok(Self { shared, thread })
    }

    /// Why the queue serves no more, or not all of its tags.
    pub(super) fn failure(&self) -> Option<Error> {
        let failure = self.shared.failure.lock().clone();
        failure.map(|(kind, message)| Error::with(kind, message))
    }

    /// Whether the thread has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Takes no further request. The thread ends when those under way are done; their results stay here, so the kernel
    /// gives them to the next daemon.
    pub(super) fn freeze(&self) {
        self.shared.frozen.set();
        self.shared.bell.ring();
    }

    /// Waits for the thread's end, and with it for the end of its ring.
    pub(super) fn join(self) {
        let places = self.thread.join();
        if places.is_err() {
            tracing::error!("a queue thread panicked");
        }
    }
}

impl Shared {
    pub(super) fn fail(&self, error: &Error) {
        tracing::error!("{error}");
        let mut failure = self.failure.lock();
        failure.get_or_insert_with(|| (error.kind(), error.to_string()));
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.is_set()
    }
}

/// The thread's body; hands its buffers back, to be unmapped after the thread's end.
fn run(work: &Work, shared: &Shared, ready: &Sender<Result<()>>) -> Option<Places> {
    task::block_signals();
    task::become_io_flusher();
    if let Some(affinity) = &work.affinity {
        task::run_on(affinity);
    }
    shared.bell.belongs_here();
    match open(work) {
        Ok((mut places, queue)) => {
            tell(ready, Ok(()));
            serve(work, shared, &queue, &mut places);
            Some(places)
        }
        Err(error) => {
            shared.fail(&error);
            tell(ready, Err(error));
            None
        }
    }
}

/// Makes the buffers, the ring and the queue on it.
fn open(work: &Work) -> Result<(Places, UblkQueue<'_>)> {
    let info = work.device.dev_info;
    let places = match &work.helpers {
        Some(helpers) => Places::Registered(Arc::clone(helpers)),
        None => Places::Copied(Arena::map(info.queue_depth, info.max_io_buf_bytes)?),
    };
    make_ring(info.queue_depth).map_err(|e| {
        Error::io(
            e,
            format!(
                "/dev/ublkb{}: no ring for queue {}",
                info.dev_id, work.index
            ),
        )
    })?;
    let queue = UblkQueue::new(work.index, &work.device)
        .map_err(|e| failed(&e, work, "cannot be opened"))?;
    Ok((places, queue))
}

/// Says whether the queue has its ring; an owner that has given up no longer listens.
fn tell(ready: &Sender<Result<()>>, news: Result<()>) {
    if ready.send(news).is_err() {
        tracing::debug!("nobody waits for the queue");
    }
}

/// Makes this thread's ring: the fastest kind that the kernel takes.
fn make_ring(depth: u16) -> io::Result<()> {
    // A request can fan out to several operations; entries beyond this cost one more system call, nothing else.
    let entries = (u32::from(depth) * 4).clamp(64, 16384);
    let base = || {
        let mut builder = Ring::builder();
        builder.setup_cqsize(entries * 2);
        builder
    };
    let mut cooperative = base();
    cooperative
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    let plain = base();

    let mut refusal = None;
    for (kind, builder) in [("cooperative", cooperative), ("plain", plain)] {
        match builder.build(entries) {
            Ok(ring) => {
                tracing::debug!(kind, entries, "a queue's ring");
                let set = ublk_init_task_ring(|cell| match cell.set(RefCell::new(ring)) {
                    Ok(()) => Ok(()),
                    Err(_ring) => Err(UblkError::OtherError(-libc::EEXIST)),
                });
                return set.map_err(|e| super::os_error(&e));
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => refusal = Some(e),
            Err(e) => return Err(e),
        }
    }
    Err(refusal.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

#[cold]
pub(super) fn failed(error: &UblkError, work: &Work, fact: &str) -> Error {
    let dev_id = work.device.dev_info.dev_id;
    Error::io(
        super::os_error(error),
        format!("/dev/ublkb{dev_id}: queue {}: {fact}", work.index),
    )
}
