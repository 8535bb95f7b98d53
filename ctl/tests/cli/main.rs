//! The real binary, run as users run it: one test program, so that it is linked once.

mod bad_input;
mod daemon;
mod hostile;
mod kit;
mod limits;
mod nbd;
mod offline;
mod order;
mod read_only;
mod repair;
mod watch;
