//! Fuzz targets: each takes any bytes and must end without a panic, soon, and within the memory that the bytes allow.
//! `cargo x fuzz` runs them under libFuzzer, the suite `corpus` over what is kept in tests/corpus.

mod image;
mod memory;
mod operations;
mod seeds;

pub use memory::{Counting, peak_of};
pub use seeds::seeds;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder of tests/corpus.
    pub name: &'static str,
    /// What it does with an input.
    pub run: fn(&[u8]),
    /// Bytes that it may allocate at a time for an empty input, and more for each byte of it.
    pub memory: (usize, usize),
}

const fn target(name: &'static str, run: fn(&[u8]), memory: (usize, usize)) -> Target {
    Target { name, run, memory }
}

/// What a decoder of one block allocates at most, whatever is in it.
const BLOCK: (usize, usize) = (64 << 10, 4);
/// What a parser of text allocates at most.
const TEXT: (usize, usize) = (64 << 10, 64);
/// What a handshake allocates at most: one option of the longest, and its answers.
const OPTIONS: (usize, usize) = (160 << 10, 256);
/// What looking for signatures allocates at most: the start and the end of the file.
const SIGNATURE: (usize, usize) = (2 << 20, 4096);
/// What an open pool of 16 MiB allocates at most, with all that is done to it.
const POOL: (usize, usize) = (24 << 20, 4096);

/// All targets.
pub const TARGETS: &[Target] = &[
    target("superblock", blockfork::fuzz::superblock, BLOCK),
    target("page-header", blockfork::fuzz::page_header, BLOCK),
    target("map-page", blockfork::fuzz::map_page, BLOCK),
    target("counts-page", blockfork::fuzz::counts_page, BLOCK),
    target("counts-index", blockfork::fuzz::counts_index, BLOCK),
    target("catalog-page", blockfork::fuzz::catalog_page, BLOCK),
    target("catalog-index", blockfork::fuzz::catalog_index, BLOCK),
    target("journal-block", blockfork::fuzz::journal_block, BLOCK),
    target("record", blockfork::fuzz::record, BLOCK),
    target("ring", blockfork::fuzz::ring, TEXT),
    target("request", ublkctl::fuzz::requests, TEXT),
    target("message", ublkctl::fuzz::message, TEXT),
    target("state-file", ublkctl::fuzz::state_files, TEXT),
    target("word", ublkctl::fuzz::word, TEXT),
    target("name", blockfork::fuzz::name, TEXT),
    target("nbd-handshake", blockfork::fuzz::nbd_handshake, OPTIONS),
    target("nbd-request", blockfork::fuzz::nbd_requests, TEXT),
    target("signature", ublkctl::fuzz::signatures, SIGNATURE),
    target("pool", image::run, POOL),
    target("operations", operations::run, POOL),
];

/// The target of this name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Runs it on an input, and panics if it took more memory than the input allows.
    pub fn hold(&self, input: &[u8]) {
        let (least, each) = self.memory;
        let peak = peak_of(|| (self.run)(input));
        let allowed = least + each * input.len();
        assert!(
            peak <= allowed,
            "{}: {peak} bytes allocated at a time for {} bytes of input, {allowed} allowed",
            self.name,
            input.len()
        );
    }
}
