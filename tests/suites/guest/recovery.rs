//! kill -9 of the daemon: the same device comes back, no I/O error, no acknowledged write lost.

use std::thread::sleep;
use std::time::Duration;

use blockfork_tests::guest::{Background, MIB, Pool, shell};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_load_survives_kills_of_the_daemon() {
    let pool = Pool::on_ram_disk("kill");
    let device = pool.volume("v", "128M");
    shell(&device.fio("--rw=write --bs=256k --iodepth=8 --size=64M"));
    pool.snapshot("v@s");
    let mut load =
        Background::start(&device.fio("--rw=randwrite --bs=4k --iodepth=16 --size=64M --rate=,6m"));
    for _ in 0..3 {
        sleep(Duration::from_millis(1500));
        assert!(load.is_running(), "the load ended before the kill");
        pool.kill_daemon();
        sleep(Duration::from_millis(300));
        pool.recover();
        assert!(std::path::Path::new(&device.path).exists());
    }
    load.succeeds();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn writes_that_were_never_flushed_survive_a_kill() {
    let pool = Pool::on_ram_disk("unflushed");
    let device = pool.volume("v", "64M");
    device.fill(0, 16 * MIB, 1);
    pool.snapshot("v@s");
    // Acknowledged, redirected, and not followed by any flush.
    shell(&format!(
        "dd if=/dev/urandom of=/run/new bs=1M count=8 status=none && dd if=/run/new of={} bs=64k seek=16 oflag=direct conv=notrunc status=none",
        device.path
    ));
    pool.kill_daemon();
    pool.recover();
    assert_eq!(
        device.bytes(MIB, 8 * MIB),
        std::fs::read("/run/new").unwrap(),
        "an acknowledged write is lost"
    );
    assert!(
        pool.attach("v@s").holds(0, 16 * MIB, 1),
        "the snapshot changed"
    );
    std::fs::remove_file("/run/new").unwrap();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_mounted_file_system_outlives_the_daemon() {
    let pool = Pool::on_ram_disk("outlive");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    let other = pool.volume("w", "32M");
    other.fill(0, 8 * MIB, 5);
    shell(&format!(
        "dd if=/dev/urandom of={}/before bs=1M count=16 conv=fsync status=none",
        mount.path
    ));
    let before = shell(&format!("sha256sum < {}/before", mount.path));
    pool.kill_daemon();
    let writer = Background::start(&format!(
        "dd if=/dev/zero of={}/during bs=1M count=16 conv=fsync status=none",
        mount.path
    ));
    sleep(Duration::from_millis(500));
    pool.recover();
    writer.succeeds();
    shell("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(shell(&format!("sha256sum < {}/before", mount.path)), before);
    mount.unmount();
    shell(&format!("e2fsck -fn {}", device.path));
    assert!(
        other.holds(0, 8 * MIB, 5),
        "another device of the pool lost its content"
    );
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn snapshots_and_clones_survive_a_kill_right_after_the_command() {
    let pool = Pool::on_ram_disk("atonce");
    let device = pool.volume("v", "64M");
    device.fill(0, 8 * MIB, 1);
    pool.snapshot("v@s");
    pool.kill_daemon();
    pool.recover();
    device.fill(0, 8 * MIB, 2);
    pool.ctl(&["clone", &pool.target("v@s"), &pool.target("c")]);
    pool.kill_daemon();
    pool.recover();
    assert!(pool.attach("c").holds(0, 8 * MIB, 1));
    assert!(device.holds(0, 8 * MIB, 2));
    pool.check();
}
