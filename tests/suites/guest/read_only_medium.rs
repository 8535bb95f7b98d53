//! A pool on a device that takes no writes: its snapshots and volumes are attached for reading.

use blockfork_tests::guest::{MIB, Pool, RAM_DISK, shell, shell_fails};

/// Makes the RAM disk read-only until it is dropped.
struct ReadOnly;

impl ReadOnly {
    fn new() -> Self {
        shell(&format!("blockdev --setro {RAM_DISK}"));
        Self
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        shell(&format!("blockdev --setrw {RAM_DISK}"));
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_read_only_device_is_attached_for_reading() {
    let pool = Pool::on_ram_disk("medium");
    let device = pool.volume("v", "64M");
    device.fill(0, 16 * MIB, 1);
    pool.snapshot("v@s");
    device.fill(0, 8 * MIB, 2);
    pool.detach("v");
    let medium = ReadOnly::new();
    let snapshot = pool.attach("v@s");
    assert!(snapshot.holds(0, 16 * MIB, 1));
    let volume = pool.attach_with("v", &["--read-only"]);
    assert!(volume.holds(0, 8 * MIB, 2));
    assert_eq!(shell(&format!("blockdev --getro {}", volume.path)), "1");
    shell_fails(&format!(
        "dd if=/dev/zero of={} bs=4k count=1 status=none",
        volume.path
    ));
    pool.detach("v");
    let said = pool.refused(1, &["attach", &pool.target("v")]);
    assert!(
        said.contains("read-only medium") && said.contains("--read-only"),
        "{said}"
    );
    // The daemon dies, and the next one serves the snapshot again.
    pool.kill_daemon();
    pool.recover();
    assert!(snapshot.holds(0, 16 * MIB, 1));
    pool.detach("v@s");
    pool.ctl(&["pool", "check", pool.name()]);
    drop(medium);
    let device = pool.attach("v");
    assert!(device.holds(0, 8 * MIB, 2));
    device.fill(0, MIB, 3);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn writes_to_a_device_wait_until_its_medium_is_writable_again() {
    let pool = Pool::on_ram_disk("medium-rw");
    let device = pool.volume("v", "32M");
    device.fill(0, 8 * MIB, 1);
    pool.kill_daemon();
    let medium = ReadOnly::new();
    let said = pool.try_ctl(&["recover", pool.name()]);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.status.code(), Some(1), "{text}");
    assert!(
        text.contains("is on a read-only medium") && text.contains("kill "),
        "{text}"
    );
    // What is there can be read all the same.
    assert!(pool.ctl(&["list", pool.name()]).contains("medium-rw/v"));
    drop(medium);
    let daemon = pool.daemon().expect("a daemon");
    shell(&format!("kill {daemon}"));
    pool.await_end(&daemon);
    pool.recover();
    assert!(device.holds(0, 8 * MIB, 1));
    device.fill(0, MIB, 2);
    assert!(device.holds(0, MIB, 2));
    pool.check();
}
