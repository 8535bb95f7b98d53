//! What a process inherits from the one that started it and must not keep: ignored and blocked signals, resource limits,
//! open descriptors, a low priority.
//!
//! A shell, a job runner or a service may have set any of these for reasons of its own. A storage daemon that keeps them
//! is killed by `ulimit -f`, cannot be stopped, or holds a lock file of the script that attached a volume.

#![expect(
    unsafe_code,
    reason = "no crate wraps signal dispositions, close_range and ioprio_set in safe functions"
)]

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signal::{sigaction, sigprocmask};
use std::io;
use std::mem::MaybeUninit;

/// What every process of ours puts right before it does anything else.
///
/// SIGXFSZ is ignored, so that a write beyond the limit on a file's size fails with EFBIG instead of killing the process
/// in the middle of a change. SIGCHLD gets its default, because a process that ignores it cannot wait for a child. No
/// signal stays blocked, because a process that blocks SIGTERM cannot be stopped.
pub(crate) fn put_right() {
    let dispositions = [
        (Signal::SIGXFSZ, SigHandler::SigIgn),
        (Signal::SIGCHLD, SigHandler::SigDfl),
    ];
    for (signal, handler) in dispositions {
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: neither handler is a function, so nothing runs when the signal comes.
        if let Err(e) = unsafe { sigaction(signal, &action) } {
            tracing::debug!("{signal} keeps what was inherited: {e}");
        }
    }
    if let Err(e) = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None) {
        tracing::debug!("signals stay blocked: {e}");
    }
    // A pool's file is as large as it is. If the limit stays, opening the pool for writing is refused with the reason.
    lift(Resource::RLIMIT_FSIZE, true);
}

/// Whether the process ignored a signal when it was started, as `nohup` makes it ignore SIGHUP, and a shell without job
/// control makes a command in the background ignore SIGINT. Whoever asked for that expects that the process goes on.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action, sigaction only writes the present one to where the pointer leads.
    let refused = unsafe { libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) };
    // SAFETY: it was zeroed, and every bit pattern is a valid value of this struct.
    let now = unsafe { now.assume_init() };
    refused == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Lifts the limits that would end a daemon, or make it fail, after some time. Up to the hard limits, which are what an
/// administrator set for this process, or beyond them where the limits are only those of the command that started it.
pub(crate) fn lift_limits(beyond_hard: bool) {
    for resource in [
        // Processor seconds of the whole process: it gets SIGXCPU, then SIGKILL.
        Resource::RLIMIT_CPU,
        // Memory: an allocation that fails ends the process.
        Resource::RLIMIT_AS,
        Resource::RLIMIT_DATA,
        // io_uring's memory.
        Resource::RLIMIT_MEMLOCK,
        // Threads of this user.
        Resource::RLIMIT_NPROC,
    ] {
        lift(resource, beyond_hard);
    }
    // Open files: each device takes several. There is no infinity of them.
    lift(Resource::RLIMIT_NOFILE, false);
}

/// Sets a limit to infinity where that is asked for and allowed, otherwise to the hard limit.
fn lift(resource: Resource, beyond_hard: bool) {
    let lifted = getrlimit(resource).and_then(|(soft, hard)| {
        if soft == RLIM_INFINITY {
            return Ok(());
        }
        if beyond_hard && setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
            return Ok(());
        }
        setrlimit(resource, hard, hard)
    });
    if let Err(e) = lifted {
        tracing::debug!("{resource:?} stays as it was inherited: {e}");
    }
}

/// Closes every descriptor but the standard ones. A command's shell may have opened others for itself: a lock file that
/// must be free when the script ends, a pipe whose reader waits for its end, a file on a file system to be unmounted.
pub(crate) fn close_descriptors() -> io::Result<()> {
    // SAFETY: called before anything of this process is opened, so no descriptor that is closed is anybody's.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `IOPRIO_WHO_PROCESS` of `linux/ioprio.h`.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Gives the process an ordinary priority if it has a lower one. A command may be run with `nice`, `ionice` or `chrt
/// --idle`, but whoever uses the device it attached is not a part of that job.
pub(crate) fn raise_priority() -> io::Result<()> {
    let checked = |refused: bool| {
        if refused {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: it takes integers only; 0 means this process.
    let policy = unsafe { libc::sched_getscheduler(0) };
    if matches!(policy, libc::SCHED_IDLE | libc::SCHED_BATCH) {
        let ordinary = libc::sched_param { sched_priority: 0 };
        // SAFETY: the pointer leads to a parameter that outlives the call; 0 means this process.
        let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const ordinary) };
        checked(set != 0)?;
    }
    // SAFETY: it takes integers only. It may return -1 as a value, which is no lower priority.
    if unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) } > 0 {
        // SAFETY: it takes integers only.
        checked(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) } != 0)?;
    }
    // SAFETY: it takes integers only. Class 0 stands for "by the nice value".
    checked(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0) } != 0)
}
