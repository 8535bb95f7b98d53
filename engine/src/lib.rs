//! blockfork: a pool of copy-on-write volumes, forked as `fork(2)` forks a page table.
//!
//! Imports point down one list of rooms: `units`, `limits`, `error`, `name`, `clock`, `format`, `device`, `space`,
//! `map`, `journal`, `checkpoint`, `datapath`, `pool`, and the frontend `ublk` on top.

pub mod clock;
pub mod device;
pub mod error;
pub mod limits;
pub mod name;
pub mod pool;
pub mod ublk;
pub mod units;
