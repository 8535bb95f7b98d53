//! The real binary, run as users run it: one test program, so that it is linked once.

mod bad_input;
mod daemon;
mod hostile;
mod identity;
mod inherited;
mod kit;
mod limits;
mod misplaced;
mod nbd;
mod offline;
mod order;
mod output;
mod read_only;
mod read_only_medium;
mod registry;
mod repair;
mod trust;
mod watch;
