//! What a queue's thread does: it fetches requests, carries them out and answers them.
//!
//! A request that is one run of blocks goes the short way: one entry for the pool file, begun when the request comes, and
//! answered when it is done. Any other, and one whose entry failed, goes the long way: its tag's task carries it out.
//!
//! All entries of a tick go to the kernel in the `io_uring_enter` that waits for what comes next.

use super::fetch::{self, Room};
use super::queue::{Places, Shared, Work, failed};
use super::registered::{Helpers, Registered};
use super::request::Request;
use super::ring_device::{InFlight, POOL_FILE, RingDevice, run_entry};
use super::wake::Belled;
use crate::pool::{Direct, Transfer};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::io::{UblkQueue, with_task_io_ring_mut};
use libublk::uring_async::ublk_wake_task;
use libublk::{UblkError, sys};
use smol::LocalExecutor;
use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::task::{Poll, Waker};

type Ring = IoUring<squeue::Entry>;

/// A fetch brought a request.
#[expect(clippy::cast_possible_wrap, reason = "the constant is 0")]
const OK: i32 = sys::UBLK_IO_RES_OK as i32;

/// What an entry was for, as its user data says. A task's own entries are libublk's: those have the highest bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Task,
    Fetch(u16),
    Direct(u16),
}

impl Purpose {
    const TASK: u64 = 1 << 63;
    const DIRECT: u64 = 1 << 16;

    fn of(user_data: u64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a tag is the lowest 16 bits"
        )]
        let tag = user_data as u16;
        if user_data & Self::TASK != 0 {
            Self::Task
        } else if user_data & Self::DIRECT != 0 {
            Self::Direct(tag)
        } else {
            Self::Fetch(tag)
        }
    }

    fn user_data(self) -> u64 {
        match self {
            Self::Task => Self::TASK,
            Self::Fetch(tag) => u64::from(tag),
            Self::Direct(tag) => u64::from(tag) | Self::DIRECT,
        }
    }
}

/// A tag, and the request that it has.
struct Slot<'a> {
    room: Room,
    /// The guard comes first, so that it is dropped first: blocks that the kernel still works on are never given back.
    direct: Cell<Option<(InFlight, Direct<'a>)>>,
    /// For the tag's task.
    request: Cell<Option<Request>>,
    task: Cell<Option<Waker>>,
}

impl Slot<'_> {
    fn new(room: Room) -> Self {
        Self {
            room,
            direct: Cell::new(None),
            request: Cell::new(None),
            task: Cell::new(None),
        }
    }

    /// Gives the tag's task a request.
    fn hand(&self, request: Request) {
        self.request.set(Some(request));
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    /// The next request for the tag's task.
    async fn next(&self) -> Request {
        poll_fn(|context| {
            let request = self.request.take();
            if request.is_none() {
                self.task.set(Some(context.waker().clone()));
            }
            request.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// A queue at work.
struct Server<'a> {
    work: &'a Work,
    shared: &'a Shared,
    queue: &'a UblkQueue<'a>,
    device: &'a RingDevice,
    slots: Vec<Slot<'a>>,
    /// Tags that wait for a request.
    fetching: Cell<u32>,
    /// Requests being carried out.
    serving: Cell<u32>,
    /// Whether the listener is to end.
    is_closing: Cell<bool>,
}

/// Where the tasks find the bytes of requests.
enum Bytes<'a> {
    Buffers(Vec<&'a mut [u8]>),
    Pages(&'a Helpers),
}

/// Fetches and serves until the device is stopped or the queue is frozen.
pub(super) fn serve(work: &Work, shared: &Shared, queue: &UblkQueue<'_>, places: &mut Places) {
    let device = RingDevice::new(Arc::clone(&work.file));
    let mut bytes = match places {
        Places::Copied(arena) => Bytes::Buffers(arena.buffers().collect()),
        Places::Registered(helpers) => Bytes::Pages(helpers),
    };
    let rooms: Vec<Room> = match &mut bytes {
        Bytes::Buffers(buffers) => (buffers.iter_mut())
            .map(|buffer| Room::Buffer(buffer.as_mut_ptr()))
            .collect(),
        Bytes::Pages(_) => queue.tags().map(|_| Room::Registered).collect(),
    };
    let server = Server {
        work,
        shared,
        queue,
        device: &device,
        slots: rooms.into_iter().map(Slot::new).collect(),
        fetching: Cell::new(0),
        serving: Cell::new(0),
        is_closing: Cell::new(false),
    };
    let mut rung = Box::new([0_u8; 8]);
    let executor = LocalExecutor::new();
    let listener = executor.spawn(server.listen(&mut rung));
    let bell = || Arc::clone(&shared.bell);
    match bytes {
        Bytes::Buffers(buffers) => {
            for (tag, buffer) in queue.tags().zip(buffers) {
                let task = Belled::new(server.serve_copied(tag, buffer), bell());
                executor.spawn(task).detach();
            }
        }
        Bytes::Pages(helpers) => {
            for tag in queue.tags() {
                let task = Belled::new(server.serve_registered(tag, helpers), bell());
                executor.spawn(task).detach();
            }
        }
    }
    let ended = server.run(&executor, || listener.is_finished());
    if let Err(error) = ended {
        let error = UblkError::IOError(error);
        shared.fail(&failed(&error, work, "stopped"));
    }
}

impl<'a> Server<'a> {
    /// The thread's loop. Each turn sends what the turn before made, and waits.
    fn run(
        &self,
        executor: &LocalExecutor<'_>,
        has_listener_ended: impl Fn() -> bool,
    ) -> io::Result<()> {
        for (tag, slot) in self.queue.tags().zip(&self.slots) {
            self.fetch(tag, fetch::fetch(self.work.index, tag, slot.room))?;
        }
        let mut answers: Vec<cqueue::Entry> = Vec::new();
        loop {
            self.shared.bell.lie_down();
            while executor.try_tick() {}
            if self.is_over() {
                self.close();
                if has_listener_ended() {
                    return Ok(());
                }
            }
            let waited = with_task_io_ring_mut(|ring: &mut Ring| ring.submit_and_wait(1));
            self.shared.bell.get_up();
            if let Err(error) = waited
                && !is_passing(&error)
            {
                return Err(error);
            }
            with_task_io_ring_mut(|ring: &mut Ring| answers.extend(ring.completion()));
            for answer in answers.drain(..) {
                match Purpose::of(answer.user_data()) {
                    Purpose::Task => ublk_wake_task(answer.user_data(), &answer),
                    Purpose::Fetch(tag) => self.fetched(tag, answer.result())?,
                    Purpose::Direct(tag) => self.moved(tag, answer.result())?,
                }
            }
        }
    }

    /// Whether nothing is left to do: frozen, or the driver gave all fetches back.
    fn is_over(&self) -> bool {
        self.serving.get() == 0 && (self.shared.is_frozen() || self.fetching.get() == 0)
    }

    /// Puts an entry into the ring.
    fn push(&self, entry: squeue::Entry, purpose: Purpose) -> io::Result<()> {
        let pushed = (self.queue).ublk_submit_sqe_sync(entry.user_data(purpose.user_data()));
        pushed.map_err(|e| super::os_error(&e))
    }

    fn fetch(&self, tag: u16, entry: squeue::Entry) -> io::Result<()> {
        self.push(entry, Purpose::Fetch(tag))?;
        self.fetching.set(self.fetching.get() + 1);
        Ok(())
    }

    /// A fetch came back: with a request, or because the device is stopped.
    fn fetched(&self, tag: u16, code: i32) -> io::Result<()> {
        self.fetching.set(self.fetching.get() - 1);
        let Some(slot) = self.slots.get(usize::from(tag)) else {
            return Ok(());
        };
        match code {
            OK if !self.shared.is_frozen() => {
                self.serving.set(self.serving.get() + 1);
                let request = Request::decode(self.queue.get_iod(tag));
                if self.go_direct(tag, slot, request)? {
                    return Ok(());
                }
                slot.hand(request);
            }
            // A request that is not answered goes to the next daemon.
            OK | sys::UBLK_IO_RES_ABORT => {}
            code => {
                let error = UblkError::UringIOError(code);
                self.shared
                    .fail(&failed(&error, self.work, "a fetch failed"));
            }
        }
        Ok(())
    }

    /// Begins a request the short way, if that leads anywhere.
    fn go_direct(&self, tag: u16, slot: &Slot<'a>, request: Request) -> io::Result<bool> {
        let Some((transfer, offset, bytes)) = request.transfer() else {
            return Ok(false);
        };
        if bytes > self.work.device.dev_info.max_io_buf_bytes {
            return Ok(false);
        }
        let attached: &'a _ = &self.work.attached;
        let Some(direct) = attached.direct(transfer, offset, bytes as usize) else {
            return Ok(false);
        };
        let entry = match (transfer, slot.room) {
            (Transfer::Read, Room::Buffer(start)) => {
                let entry = opcode::Read::new(POOL_FILE, start, bytes);
                entry.offset(direct.offset()).build()
            }
            (Transfer::Write, Room::Buffer(start)) => {
                let entry = opcode::Write::new(POOL_FILE, start, bytes);
                entry.offset(direct.offset()).build()
            }
            (Transfer::Read, Room::Registered) => {
                let entry = opcode::ReadFixed::new(POOL_FILE, ptr::null_mut(), bytes, tag);
                entry.offset(direct.offset()).build()
            }
            (Transfer::Write, Room::Registered) => {
                let entry = opcode::WriteFixed::new(POOL_FILE, ptr::null(), bytes, tag);
                entry.offset(direct.offset()).build()
            }
        };
        self.push(entry, Purpose::Direct(tag))?;
        slot.direct.set(Some((InFlight::begin(), direct)));
        Ok(true)
    }

    /// An entry of the short way came back.
    fn moved(&self, tag: u16, result: i32) -> io::Result<()> {
        let Some(slot) = self.slots.get(usize::from(tag)) else {
            return Ok(());
        };
        let Some((in_flight, direct)) = slot.direct.take() else {
            return Ok(());
        };
        in_flight.end();
        // What is short, put off, failed or cannot be mapped at once is done again from its beginning, by what knows how to
        // go on and what to say.
        if usize::try_from(result) != Ok(direct.bytes()) {
            direct.give_up();
        } else if direct.done() {
            return self.answer(tag, slot, result);
        }
        slot.hand(Request::decode(self.queue.get_iod(tag)));
        Ok(())
    }

    /// Gives the driver a result and fetches the tag's next request.
    fn answer(&self, tag: u16, slot: &Slot<'_>, result: i32) -> io::Result<()> {
        self.serving.set(self.serving.get() - 1);
        if self.shared.is_frozen() {
            return Ok(());
        }
        self.fetch(
            tag,
            fetch::commit_and_fetch(self.work.index, tag, slot.room, result),
        )
    }

    /// A tag's task, where the driver copies between the client's pages and `buffer`.
    async fn serve_copied(&self, tag: u16, buffer: &mut [u8]) {
        self.serve_tag(tag, async |request| {
            let (attached, device) = (&self.work.attached, self.device);
            request
                .serve(attached, device, |bytes| buffer.get_mut(..bytes))
                .await
        })
        .await;
    }

    /// A tag's task, where the driver registers the client's pages.
    async fn serve_registered(&self, tag: u16, helpers: &Helpers) {
        let info = &self.work.device.dev_info;
        let longest = info.max_io_buf_bytes as usize;
        let place = u64::from(self.work.index) * u64::from(info.queue_depth) + u64::from(tag);
        self.serve_tag(tag, async |request| {
            let room = |bytes| {
                (bytes <= longest).then_some(Registered {
                    index: tag,
                    bytes,
                    scratch: &helpers.scratch,
                    scratch_at: place * longest as u64,
                })
            };
            let (attached, device) = (&self.work.attached, self.device);
            request.serve(attached, device, room).await
        })
        .await;
    }

    /// Carries out what the tag's slot is handed, as long as the queue is served.
    async fn serve_tag(&self, tag: u16, mut serve: impl AsyncFnMut(Request) -> i32) {
        let Some(slot) = self.slots.get(usize::from(tag)) else {
            return;
        };
        loop {
            let result = serve(slot.next().await).await;
            if let Err(error) = self.answer(tag, slot, result) {
                let error = UblkError::IOError(error);
                self.shared
                    .fail(&failed(&error, self.work, "an answer is lost"));
                return;
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

/// Whether to wait for completions is to be tried again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)
    )
}
