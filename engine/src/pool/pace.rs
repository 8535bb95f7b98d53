//! How fast the background work goes: what it may take from whoever uses the pool, and when nobody does.

use std::sync::atomic::{AtomicU64, Ordering};

/// A pool without a request for so long is idle.
const QUIET_NS: u64 = 50_000_000;
/// So long after a write failed into new blocks, the file system below is taken to lack room.
const LACK_NS: u64 = 600_000_000_000;
/// While somebody uses the pool, the return of space works at most one part in so many of the time.
const SHARE: u64 = 200;
/// The longest rest, so that the commit of each second comes in time.
const REST_NS_MAX: u64 = 100_000_000;

/// What the pace depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Somebody uses the pool.
    pub(super) is_busy: bool,
    /// Blocks that data can still take.
    pub(super) free: u64,
    /// Blocks of the pool.
    pub(super) blocks: u64,
}

impl Load {
    fn low(self) -> u64 {
        self.blocks / 10
    }

    /// Less than a tenth of the pool is free: somebody may wait for space.
    pub(super) fn is_low(self) -> bool {
        self.free < self.low()
    }
}

/// How long the return of space rests after it worked for `worked_ns`: so long that it works one part of [`SHARE`] while
/// a fifth of the pool is free, less as space runs low, and not at all below a tenth.
pub(super) fn rest_ns(worked_ns: u64, load: Load) -> u64 {
    let low = load.low();
    if !load.is_busy || load.is_low() {
        return 0;
    }
    let full = worked_ns.saturating_mul(SHARE - 1).min(REST_NS_MAX);
    let above = (load.free - low).min(low);
    if above == low {
        return full;
    }
    let part = u128::from(full) * u128::from(above) / u128::from(low);
    u64::try_from(part).unwrap_or(full)
}

/// Notices whether a number changed lately.
#[derive(Debug)]
pub(super) struct Watch {
    lately_ns: u64,
    number: AtomicU64,
    until_ns: AtomicU64,
}

impl Watch {
    /// Of the requests of those who use the pool: whether somebody does.
    pub(super) fn of_requests() -> Self {
        Self::new(QUIET_NS)
    }

    /// Of the writes into new blocks that failed: whether the file system below may lack room.
    pub(super) fn of_failed_writes() -> Self {
        Self::new(LACK_NS)
    }

    fn new(lately_ns: u64) -> Self {
        Self {
            lately_ns,
            number: AtomicU64::new(0),
            until_ns: AtomicU64::new(0),
        }
    }

    /// Whether `number`, which begins at 0, changed lately.
    pub(super) fn has_changed(&self, number: u64, now_ns: u64) -> bool {
        if self.number.swap(number, Ordering::Relaxed) != number {
            let until = now_ns.saturating_add(self.lately_ns);
            self.until_ns.store(until, Ordering::Relaxed);
        }
        now_ns < self.until_ns.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Load = Load {
        is_busy: true,
        free: 500,
        blocks: 1000,
    };

    #[test]
    fn the_return_of_space_takes_a_small_part_of_the_time_while_somebody_works() {
        assert_eq!(rest_ns(100_000, BUSY), 19_900_000);
        assert_eq!(rest_ns(0, BUSY), 0);
        // However long a step took, the next is not far.
        assert_eq!(rest_ns(u64::MAX, BUSY), REST_NS_MAX);
    }

    #[test]
    fn nobody_rests_while_nobody_works() {
        let idle = Load {
            is_busy: false,
            ..BUSY
        };
        assert_eq!(rest_ns(100_000, idle), 0);
    }

    #[test]
    fn the_rest_becomes_shorter_as_space_runs_low() {
        let rest = |free| rest_ns(100_000, Load { free, ..BUSY });
        assert_eq!(rest(200), 19_900_000);
        assert_eq!(rest(150), 9_950_000);
        assert_eq!(rest(100), 0);
        assert_eq!(rest(99), 0);
        assert_eq!(rest(0), 0);
        let rests: Vec<u64> = (0..300).map(rest).collect();
        assert!(rests.is_sorted());
    }

    #[test]
    fn a_pool_too_small_for_tenths_has_a_pace() {
        let small = Load {
            is_busy: true,
            free: 5,
            blocks: 9,
        };
        assert_eq!(rest_ns(100_000, small), 19_900_000);
    }

    #[test]
    fn a_pool_is_idle_a_while_after_its_last_request() {
        let watch = Watch::of_requests();
        assert!(!watch.has_changed(0, 5));
        assert!(watch.has_changed(1, 10));
        assert!(watch.has_changed(1, 9 + QUIET_NS));
        assert!(!watch.has_changed(1, 10 + QUIET_NS));
        assert!(watch.has_changed(3, 11 + QUIET_NS));
        // Fewer: somebody who had made some is gone.
        assert!(watch.has_changed(2, 11 + 2 * QUIET_NS));
    }
}
