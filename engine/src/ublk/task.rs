//! What a thread that stands between the kernel and its block devices needs from the kernel.

#![expect(
    unsafe_code,
    reason = "std has no wrapper for signal masks, prctl and processor affinity"
)]

use super::command::Affinity;
use crate::error::{Error, Result};
use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Starts a named thread.
pub(super) fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let thread = Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(|e| Error::io(e, format!("the thread {name} cannot be started")))
}

/// Leaves signals to the other threads: here they would only interrupt waiting.
pub(super) fn block_signals() {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set that the pointer leads to.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set was initialised above, and the old mask is not asked for.
    let refused =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut()) };
    debug_assert_eq!(refused, 0, "SIG_BLOCK is a valid request");
}

/// Keeps the kernel from waiting, for this thread's memory, until dirty pages are written to the device that this thread
/// serves. Without the right to ask for it (`CAP_SYS_RESOURCE`) the device works, but can deadlock when memory is short.
pub(super) fn become_io_flusher() {
    // SAFETY: this prctl takes integers only.
    let refused = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if refused != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!("PR_SET_IO_FLUSHER: {error}; the device can deadlock when memory is short");
    }
}

/// Binds this thread to the processors that its requests come from.
pub(super) fn run_on(affinity: &Affinity) {
    // SAFETY: the mask is as long as said, and 0 means this thread.
    let refused = unsafe { libc::sched_setaffinity(0, affinity.len(), affinity.as_ptr().cast()) };
    if refused != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("a queue thread keeps all processors: {error}");
    }
}
