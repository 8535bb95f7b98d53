//! A queue of a device: one thread, one ring, one task per tag.
//!
//! A task fetches a request, carries it out, commits the result with the next fetch, and so on. All tasks of a tick put
//! their entries into the ring, and then one `io_uring_enter` sends them and waits for what comes next.
//!
//! The tags' buffers outlive the thread, and so its ring: the kernel may write into a buffer as long as the ring lives.

use super::arena::Arena;
use super::command::Affinity;
use super::request::Request;
use super::ring_device::{RingDevice, run_entry};
use super::task;
use super::wake::{Bell, Belled};
use crate::device::PoolFile;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Attached;
use crate::sync::Latch;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::io::{UblkDev, UblkQueue, ublk_init_task_ring};
use libublk::uring_async::{
    run_uring_tasks, ublk_reap_io_events_with_update_queue, ublk_wake_task, uring_poll_io_fn,
};
use libublk::{BufDesc, UblkError};
use parking_lot::Mutex;
use smol::LocalExecutor;
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
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
}

/// A running queue thread, as the others see it.
pub(super) struct Queue {
    shared: Arc<Shared>,
    thread: JoinHandle<Option<Arena>>,
}

/// What a queue thread and its owner share.
struct Shared {
    bell: Arc<Bell>,
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
        let arena = self.thread.join();
        if arena.is_err() {
            tracing::error!("a queue thread panicked");
        }
    }
}

impl Shared {
    fn fail(&self, error: &Error) {
        tracing::error!("{error}");
        let mut failure = self.failure.lock();
        failure.get_or_insert_with(|| (error.kind(), error.to_string()));
    }

    fn is_frozen(&self) -> bool {
        self.frozen.is_set()
    }
}

/// The thread's body; hands its buffers back, to be unmapped after the thread's end.
fn run(work: &Work, shared: &Shared, ready: &Sender<Result<()>>) -> Option<Arena> {
    task::block_signals();
    task::become_io_flusher();
    if let Some(affinity) = &work.affinity {
        task::run_on(affinity);
    }
    shared.bell.belongs_here();
    match open(work) {
        Ok((mut arena, queue)) => {
            tell(ready, Ok(()));
            serve(work, shared, &queue, &mut arena);
            Some(arena)
        }
        Err(error) => {
            shared.fail(&error);
            tell(ready, Err(error));
            None
        }
    }
}

/// Makes the buffers, the ring and the queue on it.
fn open(work: &Work) -> Result<(Arena, UblkQueue<'_>)> {
    let info = work.device.dev_info;
    let arena = Arena::map(info.queue_depth, info.max_io_buf_bytes)?;
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
    Ok((arena, queue))
}

/// Says whether the queue has its ring; an owner that has given up no longer listens.
fn tell(ready: &Sender<Result<()>>, news: Result<()>) {
    if ready.send(news).is_err() {
        tracing::debug!("nobody waits for the queue");
    }
}

/// Fetches and serves until the device is stopped or the queue is frozen.
fn serve(work: &Work, shared: &Shared, queue: &UblkQueue<'_>, arena: &mut Arena) {
    let device = RingDevice::new(Arc::clone(&work.file));
    let context = Context {
        work,
        shared,
        queue,
        device: &device,
        serving: Cell::new(0),
        is_closing: Cell::new(false),
    };
    let mut rung = Box::new([0_u8; 8]);
    let executor = LocalExecutor::new();
    let listener = executor.spawn(context.listen(&mut rung));
    let tags: Vec<_> = (queue.tags().zip(arena.buffers()))
        .map(|(tag, buffer)| {
            executor.spawn(Belled::new(
                context.serve_tag(tag, buffer),
                Arc::clone(&shared.bell),
            ))
        })
        .collect();

    let run_ops = || while executor.try_tick() {};
    let poll = || {
        let mut is_over = shared.is_frozen() && context.serving.get() == 0;
        if is_over {
            context.close();
            is_over = listener.is_finished();
        }
        let polled = if is_over {
            Err(UblkError::QueueIsDown)
        } else {
            shared.bell.lie_down();
            run_ops();
            let polled = uring_poll_io_fn::<squeue::Entry>(queue, None, 1);
            shared.bell.get_up();
            polled
        };
        std::future::ready(polled)
    };
    let reap = |timed_out| {
        ublk_reap_io_events_with_update_queue(queue, timed_out, None, |answer| {
            ublk_wake_task(answer.user_data(), answer);
        })
    };
    let is_done = || {
        if shared.is_frozen() {
            return context.serving.get() == 0 && listener.is_finished();
        }
        if tags.iter().any(|task| !task.is_finished()) {
            return false;
        }
        context.close();
        listener.is_finished()
    };
    // Not a sleeping executor: the future itself sleeps in the ring, and never waits for a waker.
    let ended = smol::future::block_on(run_uring_tasks(poll, reap, run_ops, is_done));
    if let Err(error) = ended {
        shared.fail(&failed(&error, work, "stopped"));
    }
}

/// What the tasks of a queue share.
struct Context<'a> {
    work: &'a Work,
    shared: &'a Shared,
    queue: &'a UblkQueue<'a>,
    device: &'a RingDevice,
    /// Requests being carried out.
    serving: Cell<u32>,
    /// Whether the listener is to end.
    is_closing: Cell<bool>,
}

impl Context<'_> {
    /// One tag's life.
    async fn serve_tag(&self, tag: u16, buffer: &mut [u8]) {
        let address = buffer.as_mut_ptr().cast_const();
        let fetch = self
            .queue
            .submit_io_prep_cmd(tag, BufDesc::RawAddress(address), 0, None);
        let mut fetched = fetch.await;
        while self.has_request(fetched) {
            let request = Request::decode(self.queue.get_iod(tag));
            self.serving.set(self.serving.get() + 1);
            let result = request
                .serve(&self.work.attached, self.device, buffer)
                .await;
            self.serving.set(self.serving.get() - 1);
            if self.shared.is_frozen() {
                break;
            }
            let commit = self
                .queue
                .submit_io_commit_cmd(tag, BufDesc::RawAddress(address), result);
            fetched = commit.await;
        }
    }

    /// Whether a fetch brought a request that is to be served here.
    fn has_request(&self, fetched: Result<i32, UblkError>) -> bool {
        match fetched {
            Ok(0) => !self.shared.is_frozen(),
            Ok(code) => {
                let error = UblkError::UringIOError(code);
                self.shared
                    .fail(&failed(&error, self.work, "a fetch failed"));
                false
            }
            Err(UblkError::QueueIsDown) => false,
            Err(error) => {
                self.shared
                    .fail(&failed(&error, self.work, "a fetch failed"));
                false
            }
        }
    }

    /// Keeps a read of the bell in the ring.
    async fn listen(&self, rung: &mut [u8; 8]) {
        let bell = types::Fd(self.shared.bell.as_raw_fd());
        while !self.is_closing.get() {
            let entry = opcode::Read::new(bell, rung.as_mut_ptr(), 8).build();
            let result = run_entry(entry).await;
            if result < 0 && !matches!(-result, libc::EINTR | libc::EAGAIN) {
                let error = UblkError::UringIOError(result);
                self.shared
                    .fail(&failed(&error, self.work, "cannot be woken"));
                return;
            }
        }
    }

    /// Ends the listener, so that the ring dies without an operation under way.
    fn close(&self) {
        if !self.is_closing.replace(true) {
            self.shared.bell.ring();
        }
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
    let mut deferred = base();
    deferred
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    let mut cooperative = base();
    cooperative
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    let plain = base();

    let mut refusal = None;
    for (kind, builder) in [
        ("deferred", deferred),
        ("cooperative", cooperative),
        ("plain", plain),
    ] {
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
fn failed(error: &UblkError, work: &Work, fact: &str) -> Error {
    let dev_id = work.device.dev_info.dev_id;
    Error::io(
        super::os_error(error),
        format!("/dev/ublkb{dev_id}: queue {}: {fact}", work.index),
    )
}
