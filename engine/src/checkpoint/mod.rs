//! Checkpoints: the frozen metadata written to new places, then the superblock that names it.
//!
//! The freeze is short: every page of the generation that ends is already immutable, so it only hands them over.
//! Writing goes on while the live maps change. What was released before the freeze becomes reusable when the
//! superblock is durable and every request of the time before has ended.

mod catalog;
mod load;
mod superblock;
// Each writes pages by the hundred, which takes Miri minutes.
#[cfg(test)]
#[cfg(not(miri))]
mod tests;
mod write;

pub(crate) use load::{Losses, load, load_catalog, load_index, load_readable};
pub(crate) use superblock::{read_superblocks, write_superblocks};
pub(crate) use write::{Checkpoints, Ending};
