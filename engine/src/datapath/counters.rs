//! What an attached volume did since it was attached.

use crate::clock::Clock;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of so many requests of a kind, one is timed: reading the clock costs more than looking up a block.
const SAMPLING: u64 = 16;
/// Three significant figures up to ten minutes.
const LATENCY_NS_MAX: u64 = 600_000_000_000;

/// Counts and latencies of one kind of request.
#[derive(Debug)]
pub(crate) struct RequestCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) latency: Latencies,
}

/// A latency histogram, in nanoseconds.
#[derive(Debug)]
pub(crate) struct Latencies(Mutex<Histogram<u32>>);

/// Counters of an attached volume.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) reads: RequestCounters,
    pub(crate) writes: RequestCounters,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) redirected_blocks: AtomicU64,
    pub(crate) in_place_blocks: AtomicU64,
    pub(crate) snapshot_pause: Latencies,
    pub(crate) since_ns: u64,
}

impl RequestCounters {
    fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            latency: Latencies::new(),
        }
    }

    /// Counts a request that begins; the time, if this one is timed.
    pub(crate) fn begin(&self, bytes: usize, clock: &dyn Clock) -> Option<u64> {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        number
            .is_multiple_of(SAMPLING)
            .then(|| clock.monotonic_ns())
    }

    /// Forgets a request that was counted when it began, and is about to begin once more.
    pub(crate) fn forget(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
        self.requests.fetch_sub(1, Ordering::Relaxed);
    }

    /// Times a request that ends.
    pub(crate) fn end(&self, began: Option<u64>, clock: &dyn Clock) {
        if let Some(began) = began {
            self.latency
                .record(clock.monotonic_ns().saturating_sub(began));
        }
    }
}

impl Latencies {
    fn new() -> Self {
        #[expect(
            clippy::expect_used,
            reason = "the bounds are constants that the crate accepts"
        )]
        let histogram = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("valid bounds");
        Self(Mutex::new(histogram))
    }

    /// Adds one.
    pub(crate) fn record(&self, ns: u64) {
        self.0.lock().saturating_record(ns.max(1));
    }

    /// How many, the 50th, 99th and 99.9th percentile, and the longest.
    pub(crate) fn summary(&self) -> (u64, [u64; 3], u64) {
        let histogram = self.0.lock();
        let percentiles =
            [50.0, 99.0, 99.9].map(|percentile| histogram.value_at_percentile(percentile));
        (histogram.len(), percentiles, histogram.max())
    }
}

impl Counters {
    pub(crate) fn new(clock: &dyn Clock) -> Self {
        Self {
            reads: RequestCounters::new(),
            writes: RequestCounters::new(),
            flushes: AtomicU64::new(0),
            discards: AtomicU64::new(0),
            redirected_blocks: AtomicU64::new(0),
            in_place_blocks: AtomicU64::new(0),
            snapshot_pause: Latencies::new(),
            since_ns: clock.monotonic_ns(),
        }
    }
}
