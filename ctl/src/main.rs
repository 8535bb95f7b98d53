//! ublkctl: the command line of blockfork.
fn main() {}
