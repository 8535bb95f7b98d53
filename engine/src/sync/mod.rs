//! Where threads meet: the locks, the event and every lock-free cell of the engine, in one room, so that a tool can
//! take the machine's place.
//!
//! A normal build uses `parking_lot`, `async-lock`, `event-listener` and `std`. Under `cfg(shuttle)` all of it goes
//! through shuttle, which runs whole pools in schedules of its choice. Under `cfg(loom_cells)` the atomics and the
//! event go through loom, which runs each cell in every order that the memory model allows (`models.rs`).
//!
//! Invariant: an atomic that orders anything stands in this room. Elsewhere an atomic is a statistic or a hint.

mod epochs;
mod latch;
mod published;
mod signal;
// Its user, the frontend, is left out of shuttle's build.
#[cfg(not(shuttle))]
mod sleeper;
mod tickets;
mod watermark;

#[cfg(any(shuttle, loom_cells))]
mod explored;
#[cfg(all(test, loom_cells))]
mod models;
#[cfg(not(shuttle))]
mod native;
#[cfg(shuttle)]
mod scheduled;

pub(crate) use epochs::Epochs;
#[cfg(any(shuttle, loom_cells))]
pub(crate) use explored::{Event, atomic};
pub(crate) use latch::Latch;
#[cfg(not(shuttle))]
pub(crate) use native::{AsyncMutex, AsyncMutexGuard, Mutex, RwLock};
#[cfg(not(any(shuttle, loom_cells)))]
pub(crate) use native::{Event, atomic};
pub(crate) use published::Published;
#[cfg(shuttle)]
pub(crate) use scheduled::{AsyncMutex, AsyncMutexGuard, Mutex, RwLock};
pub(crate) use signal::Signal;
#[cfg(not(shuttle))]
pub(crate) use sleeper::Sleeper;
pub(crate) use tickets::Tickets;
pub(crate) use watermark::Watermark;
