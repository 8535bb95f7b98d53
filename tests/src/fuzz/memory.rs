//! How much memory a piece of work takes: an allocator that counts for each thread.

#![expect(unsafe_code, reason = "an allocator is unsafe by its trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes allocated and not freed since the count began, and the most of them; they may go below zero where a
    /// piece of work frees what was there before.
    static LIVE: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // Where the thread is ending, nobody asks for its count.
    let _ended = LIVE.try_with(|live| {
        let (now, peak) = live.get();
        let now = now.wrapping_add(bytes);
        live.set((now, peak.max(now)));
    });
}

fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

/// The system's allocator, with a count. A binary that measures names it as its `#[global_allocator]`.
#[derive(Debug)]
pub struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // For a moment both may be there.
        count(signed(bytes));
        count(-signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// The most bytes that `work` had allocated at a time on this thread; 0 where [`Counting`] is not the allocator.
pub fn peak_of(work: impl FnOnce()) -> usize {
    LIVE.set((0, 0));
    work();
    usize::try_from(LIVE.get().1).unwrap_or(0)
}
