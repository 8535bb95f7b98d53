//! The heap of rows that recover a pool by the hundred thousand. glibc maps each large buffer anew and gives it back at
//! once, and the page faults of that took half of their time. With what is set here, large buffers come from a heap that is
//! kept (`mallopt(3)`). Rows that measure time or memory stay as a user's process is.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

const VARIABLE: &str = "GLIBC_TUNABLES";
const KEPT: &str = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824";

/// Starts this program again with such a heap, unless it has been told how its heap is to be. Comes back where that cannot
/// be done; then it is only slower.
pub(crate) fn keep() {
    let Ok(program) = env::current_exe() else {
        return;
    };
    if env::var_os(VARIABLE).is_none() {
        let mut again = Command::new(program);
        again.args(env::args_os().skip(1)).env(VARIABLE, KEPT);
        let error = again.exec();
        eprintln!("prove: goes on with the heap as it is: {error}");
    }
}
