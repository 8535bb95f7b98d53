//! A queue's buffers, one per tag, in one mapping: aligned to pages, zero, and without memory behind it until used.

#![expect(
    unsafe_code,
    reason = "std has no anonymous mapping, and its allocator touches every page of an aligned one"
)]

use crate::error::{Error, Result};
use std::io;
use std::ptr::{self, NonNull};
use std::slice::{self, ChunksExactMut};

/// The mapping.
#[derive(Debug)]
pub(super) struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    buffer_bytes: usize,
}

// SAFETY: the arena is owned memory without thread affinity.
unsafe impl Send for Arena {}

impl Arena {
    /// Room for `count` buffers of `buffer_bytes`, a multiple of the page.
    pub(super) fn map(count: u16, buffer_bytes: u32) -> Result<Self> {
        let buffer_bytes = buffer_bytes as usize;
        let bytes = usize::from(count) * buffer_bytes;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping touches no memory that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::io(
                io::Error::last_os_error(),
                format!("no {bytes} bytes for a queue's buffers"),
            ));
        }
        let start: NonNull<u8> =
            NonNull::new(start.cast()).ok_or_else(|| Error::corrupt("a mapping at address 0"))?;
        // A huge page would be zeroed whole at the first request of a tag, and most buffers are used by small ones.
        // SAFETY: the range is the mapping made just now; the advice changes no byte of it.
        let refused = unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) };
        if refused != 0 {
            tracing::debug!("the kernel has no huge pages to refuse");
        }
        Ok(Self {
            start,
            bytes,
            buffer_bytes,
        })
    }

    /// The buffers in order.
    pub(super) fn buffers(&mut self) -> ChunksExactMut<'_, u8> {
        // SAFETY: the mapping is `bytes` long, initialised with zeros, and lives as long as `self`.
        let all = unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) };
        all.chunks_exact_mut(self.buffer_bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and unmapped once, here.
        let refused = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(refused, 0, "a mapping of our own can be unmapped");
    }
}
