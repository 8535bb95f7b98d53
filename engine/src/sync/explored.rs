//! Atomics and the event under a tool. The event keeps the promise of `event-listener`, listen before you look, with
//! a lock that the tool knows.

#[cfg(loom_cells)]
use loom::sync::Mutex;
#[cfg(loom_cells)]
pub(crate) use loom::sync::atomic;
#[cfg(shuttle)]
use shuttle::sync::Mutex;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic;

use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Poll, Waker};

/// Somebody changed something that others wait for.
#[derive(Debug, Default)]
pub(crate) struct Event(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    notified: u64,
    wakers: Vec<Waker>,
}

impl Event {
    fn with<T>(&self, change: impl FnOnce(&mut Waiting) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All who wait look again.
    pub(crate) fn notify_all(&self) {
        let wakers = self.with(|waiting| {
            waiting.notified += 1;
            std::mem::take(&mut waiting.wakers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Waits until `ready` gives a value. It listens before it looks, so no notification between is lost.
    pub(crate) async fn wait_for<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            let before = self.with(|waiting| waiting.notified);
            if let Some(value) = ready() {
                return value;
            }
            poll_fn(|context| {
                self.with(|waiting| {
                    if waiting.notified == before {
                        waiting.wakers.push(context.waker().clone());
                        Poll::Pending
                    } else {
                        Poll::Ready(())
                    }
                })
            })
            .await;
        }
    }
}
