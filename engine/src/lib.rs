//! blockfork: a pool of copy-on-write volumes, forked as `fork(2)` forks a page table.
//!
//! Imports point down one list of rooms: `units`, `limits`, `error`, `name`, `clock`, `sync`, `format`, `device`,
//! `space`, `map`, `metadata`, `journal`, `checkpoint`, `datapath`, `pool`, the frontends `nbd` and `ublk` on top, and
//! `fuzz`, which only tests have.

mod checkpoint;
pub mod clock;
mod datapath;
pub mod device;
pub mod error;
mod format;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod journal;
pub mod limits;
mod map;
mod metadata;
pub mod name;
// The frontends need a kernel, which no model of threads has.
#[cfg(not(any(shuttle, loom_cells)))]
pub mod nbd;
pub mod pool;
mod space;
mod sync;
#[cfg(not(any(shuttle, loom_cells)))]
pub mod ublk;
pub mod units;
