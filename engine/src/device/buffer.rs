//! Memory that `O_DIRECT` accepts: whole blocks, aligned to a block, zeroed.

#![expect(
    unsafe_code,
    reason = "the standard library has no aligned byte buffer"
)]

use crate::units::BLOCK_LEN;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

/// A run of zeroed blocks in memory, aligned to [`BLOCK_LEN`].
pub struct BlockBuf {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned memory without interior mutability or thread affinity.
unsafe impl Send for BlockBuf {}
// SAFETY: a shared reference gives only shared access to the bytes.
unsafe impl Sync for BlockBuf {}

impl BlockBuf {
    /// A buffer of `blocks` zeroed blocks, at least one.
    pub fn zeroed(blocks: usize) -> Self {
        #[expect(
            clippy::expect_used,
            reason = "only a size beyond half the address space fails"
        )]
        let layout = Layout::from_size_align(blocks.max(1) * BLOCK_LEN, BLOCK_LEN)
            .expect("a buffer's size overflows");
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else {
            handle_alloc_error(layout)
        };
        Self { pointer, layout }
    }

    /// How many blocks the buffer holds.
    pub fn blocks(&self) -> usize {
        self.layout.size() / BLOCK_LEN
    }
}

impl Drop for BlockBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this same layout and freed once, here.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}

impl Deref for BlockBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation is `layout.size()` initialised bytes and lives as long as `self`.
        unsafe { slice::from_raw_parts(self.pointer.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for BlockBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only access.
        unsafe { slice::from_raw_parts_mut(self.pointer.as_ptr(), self.layout.size()) }
    }
}

impl AsRef<[u8]> for BlockBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for BlockBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for BlockBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockBuf({} blocks)", self.blocks())
    }
}
