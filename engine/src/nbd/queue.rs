//! The requests of one connection between the thread that reads them and the workers that carry them out.
//!
//! Invariant: at most [`NBD_REQUESTS_MAX`] requests and [`NBD_MEMORY_BYTES_MAX`] bytes of payload are under way; the
//! reader waits before it reads more. So a client that does not read its answers costs that much and no more.
//!
//! Requests begin in the order in which they came, but no more than [`NBD_FLUSHERS_MAX`] workers wait for flushes at a
//! time: reads and writes go on past the flushes that are left.

use super::request::Request;
use super::serve::Payload;
use crate::clock::{Clock, SystemClock};
use crate::limits::{NBD_FLUSHERS_MAX, NBD_MEMORY_BYTES_MAX, NBD_REQUESTS_MAX, NBD_WORKERS_MAX};
use crate::pool::{LOOK_NS, Patience};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::time::Duration;

/// A request with its payload.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) payload: Payload,
    /// How much longer it waits, if it found no space.
    pub(super) patience: Option<Patience>,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that wait for a worker, with their place in the order.
    quick: VecDeque<(u64, Job)>,
    /// Those among them that will wait for a flush.
    durable: VecDeque<(u64, Job)>,
    /// Those that found no space, and when they look again; the first one first.
    parked: VecDeque<(u64, Job)>,
    next: u64,
    under_way: usize,
    memory_bytes: usize,
    flushing: usize,
    workers: usize,
    idle: usize,
    is_closed: bool,
}

/// The queue of one connection.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Something ended.
    room: Condvar,
    /// Something came, or nothing comes any more.
    work: Condvar,
    clock: SystemClock,
}

impl Queue {
    /// Waits until there is room for a request and its memory, and takes it.
    pub(super) fn reserve(&self, request: &Request) {
        let bytes = request.memory_bytes();
        let mut state = self.state.lock();
        while state.under_way >= NBD_REQUESTS_MAX
            || (state.under_way > 0 && state.memory_bytes + bytes > NBD_MEMORY_BYTES_MAX)
        {
            self.room.wait(&mut state);
        }
        state.under_way += 1;
        state.memory_bytes += bytes;
    }

    /// Adds a request that has its room. True if the caller is to start one more worker.
    pub(super) fn push(&self, job: Job) -> bool {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        if job.request.waits_for_flush() {
            state.durable.push_back((number, job));
        } else {
            state.quick.push_back((number, job));
        }
        self.work.notify_one();
        let waiting = state.quick.len() + state.durable.len();
        let needs_worker = waiting > state.idle && state.workers < NBD_WORKERS_MAX;
        if needs_worker {
            state.workers += 1;
        }
        needs_worker
    }

    /// The next request to carry out; none when the queue is closed and empty.
    pub(super) fn take(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            let now = self.clock.monotonic_ns();
            if let Some(job) = state.due(now).or_else(|| state.next_job()) {
                if !state.parked.is_empty() {
                    // Somebody else looks after those.
                    self.work.notify_one();
                }
                return Some(job);
            }
            let is_empty = state.quick.is_empty() && state.durable.is_empty();
            if state.is_closed && is_empty && state.parked.is_empty() {
                return None;
            }
            let due = state.parked.front().map(|(due, _)| due.saturating_sub(now));
            state.idle += 1;
            match due {
                Some(ns) => {
                    // Whether the time is up shows at the next look.
                    self.work.wait_for(&mut state, Duration::from_nanos(ns));
                }
                None => self.work.wait(&mut state),
            }
            state.idle -= 1;
        }
    }

    /// Takes a request that found no space, to hand it out again later; at once where nobody waits for the answer.
    pub(super) fn park(&self, job: Job) {
        let due = self.clock.monotonic_ns().saturating_add(LOOK_NS);
        let mut state = self.state.lock();
        if job.request.waits_for_flush() {
            state.flushing -= 1;
        }
        state.parked.push_back((due, job));
    }

    /// Gives back the room of a request that was answered.
    pub(super) fn done(&self, request: &Request) {
        let mut state = self.state.lock();
        state.under_way -= 1;
        state.memory_bytes -= request.memory_bytes();
        if request.waits_for_flush() {
            state.flushing -= 1;
            // A flush that was held back may begin.
            self.work.notify_one();
        }
        self.room.notify_one();
    }

    /// No more requests come; what is there is still carried out.
    pub(super) fn close(&self) {
        self.state.lock().is_closed = true;
        self.work.notify_all();
    }
}

impl State {
    /// A parked request whose time has come: at the latest when nobody waits for its answer.
    fn due(&mut self, now: u64) -> Option<Job> {
        let is_due = self.parked.front().is_some_and(|(due, _)| *due <= now);
        if !is_due && !self.is_closed {
            return None;
        }
        let (_, mut job) = self.parked.pop_front()?;
        if self.is_closed {
            job.patience = job.patience.map(Patience::end);
        }
        if job.request.waits_for_flush() {
            self.flushing += 1;
        }
        Some(job)
    }

    fn next_job(&mut self) -> Option<Job> {
        let may_flush = self.flushing < NBD_FLUSHERS_MAX;
        let number = |lane: &VecDeque<(u64, Job)>| lane.front().map(|(number, _)| *number);
        let durable = number(&self.durable).filter(|_| may_flush);
        let lane = match (number(&self.quick), durable) {
            (Some(quick), Some(durable)) if durable < quick => &mut self.durable,
            (Some(_), _) => &mut self.quick,
            (None, Some(_)) => &mut self.durable,
            (None, None) => return None,
        };
        let job = lane.pop_front().map(|(_, job)| job)?;
        if job.request.waits_for_flush() {
            self.flushing += 1;
        }
        Some(job)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Message, REQUEST_MAGIC, command};
    use super::*;
    use std::thread;
    use std::time::Duration;

    fn job(number: u16, bytes: u32) -> Job {
        let message = Message::default().u32(REQUEST_MAGIC).u16(0).u16(number);
        let bytes = message.u64(0).u64(0).u32(bytes).0;
        Job {
            request: Request::decode(bytes.try_into().unwrap()).unwrap(),
            payload: Payload::zeroed(0),
            patience: None,
        }
    }

    fn add(queue: &Queue, number: u16, bytes: u32) {
        let job = job(number, bytes);
        queue.reserve(&job.request);
        queue.push(job);
    }

    #[test]
    fn reads_go_past_flushes_when_enough_workers_flush() {
        let queue = Queue::default();
        for _ in 0..=NBD_FLUSHERS_MAX {
            add(&queue, command::FLUSH, 0);
        }
        add(&queue, command::READ, 4096);
        let flushes: Vec<Job> = (0..NBD_FLUSHERS_MAX)
            .map(|_| queue.take().unwrap())
            .collect();
        assert!(flushes.iter().all(|job| job.request.waits_for_flush()));
        let read = queue.take().unwrap();
        assert!(!read.request.waits_for_flush());
        queue.done(&flushes[0].request);
        assert!(queue.take().unwrap().request.waits_for_flush());
        queue.close();
        assert!(queue.take().is_none());
    }

    #[test]
    fn the_reader_waits_for_room() {
        let queue = Queue::default();
        for _ in 0..2 {
            add(&queue, command::READ, 32 << 20);
        }
        thread::scope(|scope| {
            let third = scope.spawn(|| add(&queue, command::READ, 4096));
            thread::sleep(Duration::from_millis(20));
            assert!(!third.is_finished());
            let job = queue.take().unwrap();
            queue.done(&job.request);
            third.join().unwrap();
        });
        for _ in 0..2 {
            let job = queue.take().unwrap();
            queue.done(&job.request);
        }
        for _ in 0..NBD_REQUESTS_MAX {
            add(&queue, command::TRIM, 0);
        }
        thread::scope(|scope| {
            let one_more = scope.spawn(|| add(&queue, command::TRIM, 0));
            thread::sleep(Duration::from_millis(20));
            assert!(!one_more.is_finished());
            let job = queue.take().unwrap();
            queue.done(&job.request);
        });
    }

    #[test]
    fn workers_are_started_as_they_are_needed() {
        let queue = Queue::default();
        let started = (0..2 * NBD_WORKERS_MAX).filter(|_| queue.push(job(command::READ, 0)));
        assert_eq!(started.count(), NBD_WORKERS_MAX);
    }
}
