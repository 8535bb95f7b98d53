//! The primitives of a normal build.

pub(crate) use async_lock::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
pub(crate) use parking_lot::{Mutex, RwLock};
#[cfg(not(loom_cells))]
pub(crate) use std::sync::atomic;

/// Somebody changed something that others wait for.
#[cfg(not(loom_cells))]
#[derive(Debug, Default)]
pub(crate) struct Event(event_listener::Event);

#[cfg(not(loom_cells))]
impl Event {
    /// All who wait look again.
    pub(crate) fn notify_all(&self) {
        self.0.notify(usize::MAX);
    }

    /// Waits until `ready` gives a value. It listens before it looks, so no notification between is lost.
    pub(crate) async fn wait_for<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            event_listener::listener!(self.0 => changed);
            if let Some(value) = ready() {
                return value;
            }
            changed.await;
        }
    }
}
