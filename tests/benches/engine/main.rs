//! The engine's own speed, without a kernel device: `cargo bench -p blockfork-tests`.
//!
//! The pool lies in a file of `$BENCH_DIR`: by default on a tmpfs, where what is measured is the engine and one system call
//! for each piece of data; elsewhere with `O_DIRECT`. Allocations are counted beside the times.

mod commands;
mod fixture;
mod memory;
mod order;
mod requests;

#[global_allocator]
static ALLOCATIONS: divan::AllocProfiler = divan::AllocProfiler::system();

fn main() {
    divan::main();
}
