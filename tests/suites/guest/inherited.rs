//! A daemon that a command starts inherits nothing from that command's shell which harms the device it serves.

use blockfork_tests::guest::{Device, MIB, Mount, Pool, shell, shell_fails};
use std::fs;

/// The last field but some of `/proc/PID/stat` that a test looks at: the nice value.
fn nice(pid: &str) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("/proc");
    let (_, fields) = stat.rsplit_once(") ").expect("a command's name");
    fields.split(' ').nth(16).expect("a nice value").to_owned()
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn the_shell_of_an_attach_limits_neither_daemon_nor_device() {
    let below = Mount::tmpfs("limits", "256M");
    let pool = Pool::in_folder("limits", &below.path, "128M");
    pool.create("v", "32M");
    let lock = format!("{}/lock", below.path);
    let setup = format!(
        "ulimit -f 1; ulimit -t 5; ulimit -v 8000000; trap '' HUP TERM; exec 9>{lock}; renice -n 10 $$ >/dev/null"
    );
    let path = pool.ctl_after(&setup, &["attach", &pool.target("v")]);
    let device = Device { path };
    device.fill(0, 32 * MIB, 1);
    assert!(device.holds(0, 32 * MIB, 1));
    let pid = pool.daemon().expect("a daemon");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("/proc");
    for limit in ["Max cpu time", "Max file size", "Max address space"] {
        let line = limits.lines().find(|line| line.starts_with(limit));
        let line = line.expect("a limit");
        assert_eq!(line.matches("unlimited").count(), 2, "{line}");
    }
    assert_eq!(nice(&pid), "0");
    let open = shell(&format!("ls -l /proc/{pid}/fd"));
    assert!(!open.contains(&lock), "{open}");
    // It ends by SIGTERM, and leaves the device to the next one.
    shell(&format!("kill {pid}"));
    pool.await_end(&pid);
    pool.recover();
    assert!(device.holds(0, 32 * MIB, 1));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_write_beyond_a_limit_is_an_error_of_that_write_alone() {
    let below = Mount::tmpfs("limit", "256M");
    let pool = Pool::in_folder("limit", &below.path, "128M");
    let device = pool.volume("v", "32M");
    device.fill(0, 31 * MIB, 1);
    device.fill(31 * MIB, MIB, 2);
    // Attached anew, so that the volume is overwritten in place and nothing waits for a checkpoint.
    pool.detach("v");
    let device = {
        drop(device);
        pool.attach("v")
    };
    let pid = pool.daemon().expect("a daemon");
    let journal_ends = 8 * MIB;
    shell(&format!("prlimit --pid {pid} --fsize={journal_ends}:"));
    let write = format!(
        "dd if=/dev/urandom of={} bs=64k seek=496 count=1 oflag=direct conv=notrunc status=none",
        device.path
    );
    let said = shell_fails(&write);
    assert!(said.contains("Input/output error"), "{said}");
    assert!(device.holds(31 * MIB, MIB, 2), "the old data is gone");
    shell(&format!("prlimit --pid {pid} --fsize=unlimited:"));
    shell(&write);
    assert_eq!(pool.daemon().as_deref(), Some(pid.as_str()));
    pool.check();
}
