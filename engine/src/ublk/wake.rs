//! Wake-ups from other threads. A queue thread sleeps in `io_uring_enter`, so a task that another thread woke would
//! lie in the executor's queue until the next completion; the bell is an eventfd that the ring reads.
//!
//! Invariant: whoever makes a task runnable from outside first makes it runnable, then looks whether the thread sleeps;
//! the thread first says that it sleeps, then looks for runnable tasks. So one of the two sees the other (`Sleeper`).

#![expect(unsafe_code, reason = "std cannot make an eventfd")]

use crate::sync::Sleeper;
use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// What wakes a queue thread out of its ring.
#[derive(Debug)]
pub(super) struct Bell {
    eventfd: File,
    sleeper: Sleeper,
    owner: AtomicUsize,
}

thread_local! {
    static HERE: Cell<u8> = const { Cell::new(0) };
}

/// A number that no other living thread has: the address of a thread-local.
fn this_thread() -> usize {
    HERE.with(|here| ptr::from_ref(here).addr())
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and nobody else has it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            eventfd: File::from(owned),
            sleeper: Sleeper::default(),
            owner: AtomicUsize::new(0),
        })
    }

    /// Says that the calling thread is the one to wake.
    pub(super) fn belongs_here(&self) {
        self.owner.store(this_thread(), Ordering::Relaxed);
    }

    /// The thread is about to sleep; it looks for runnable tasks once more after this.
    pub(super) fn lie_down(&self) {
        self.sleeper.lie_down();
    }

    /// The thread is awake, and will look for runnable tasks before it sleeps again.
    pub(super) fn get_up(&self) {
        self.sleeper.get_up();
    }

    /// Makes the ring's read of the eventfd complete, whether the thread sleeps or not.
    pub(super) fn ring(&self) {
        // An eventfd refuses only when its counter is full: then it is readable already.
        let _already_readable = (&self.eventfd).write(&1_u64.to_le_bytes()).is_err();
    }

    /// Wakes the thread if it sleeps and is another one than the caller.
    fn ring_from_outside(&self) {
        if self.owner.load(Ordering::Relaxed) != this_thread() && self.sleeper.must_be_woken() {
            self.ring();
        }
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

/// A future whose wake-ups from other threads ring the bell.
pub(super) struct Belled<F> {
    future: F,
    bell: Arc<Bell>,
    cached: Option<Cached>,
}

/// The executor's waker and ours around it, made once per task.
struct Cached {
    inner: Waker,
    outer: Waker,
}

struct BellWaker {
    inner: Waker,
    bell: Arc<Bell>,
}

impl<F> Belled<F> {
    pub(super) fn new(future: F, bell: Arc<Bell>) -> Self {
        Self {
            future,
            bell,
            cached: None,
        }
    }
}

impl<F: Future> Future for Belled<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `future` is pinned with `self` and never moved; the other fields are not pinned.
        let this = unsafe { self.get_unchecked_mut() };
        let is_fresh =
            (this.cached.as_ref()).is_some_and(|cached| cached.inner.will_wake(context.waker()));
        if !is_fresh {
            this.cached = None;
        }
        let cached = this.cached.get_or_insert_with(|| {
            let inner = context.waker().clone();
            let outer = Waker::from(Arc::new(BellWaker {
                inner: inner.clone(),
                bell: Arc::clone(&this.bell),
            }));
            Cached { inner, outer }
        });
        // SAFETY: as above: `this.future` stays where `self` is pinned.
        let future = unsafe { Pin::new_unchecked(&mut this.future) };
        future.poll(&mut Context::from_waker(&cached.outer))
    }
}

impl Wake for BellWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.inner.wake_by_ref();
        self.bell.ring_from_outside();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::atomic::AtomicU32;

    struct Counter(AtomicU32);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A bell of this thread, and a waker that a task under it got.
    fn bell_and_waker(counter: &Arc<Counter>) -> (Arc<Bell>, Waker) {
        let bell = Arc::new(Bell::new().unwrap());
        bell.belongs_here();
        let taken: Cell<Option<Waker>> = Cell::new(None);
        let future = std::future::poll_fn(|context| {
            taken.set(Some(context.waker().clone()));
            Poll::<()>::Pending
        });
        let mut belled = std::pin::pin!(Belled::new(future, Arc::clone(&bell)));
        let inner = Waker::from(Arc::clone(counter));
        assert!(
            belled
                .as_mut()
                .poll(&mut Context::from_waker(&inner))
                .is_pending()
        );
        let first = taken.take().unwrap();
        assert!(
            belled
                .as_mut()
                .poll(&mut Context::from_waker(&inner))
                .is_pending()
        );
        // Miri gives one table of functions several addresses, so that nobody relies on there being one.
        assert!(
            cfg!(miri) || first.will_wake(&taken.take().unwrap()),
            "the waker was made anew"
        );
        (bell, first)
    }

    #[test]
    fn a_wake_from_another_thread_rings_only_a_sleeper() {
        let counter = Arc::new(Counter(AtomicU32::new(0)));
        let (bell, waker) = bell_and_waker(&counter);
        let wake_outside = || {
            let waker = waker.clone();
            std::thread::spawn(move || waker.wake()).join().unwrap();
        };
        wake_outside();
        bell.lie_down();
        waker.wake_by_ref();
        wake_outside();
        wake_outside();
        assert_eq!(counter.0.load(Ordering::Relaxed), 4);
        let mut rung = [0; 8];
        (&bell.eventfd).read_exact(&mut rung).unwrap();
        assert_eq!(u64::from_le_bytes(rung), 1);
    }
}
