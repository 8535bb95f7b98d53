//! `--on-full queue` on a real device: writes that find no space wait for it, whatever becomes of the daemon; and what
//! `watch` says meanwhile.

use std::thread::sleep;
use std::time::Duration;

use blockfork::clock::{Clock, SystemClock};
use blockfork_tests::guest::{Background, Device, MIB, Pool, eventually, shell, shell_fails};

/// A pool that a volume `ballast` fills to a third and more, and a volume that waits for space that long.
fn with_ballast(name: &'static str, on_full: &str) -> (Pool, Device) {
    let pool = Pool::in_file(name, "32M");
    let ballast = pool.volume("ballast", "12M");
    ballast.fill(0, 12 * MIB, 1);
    pool.detach("ballast");
    pool.create("v", "24M");
    let device = pool.attach_with("v", &["--on-full", on_full]);
    (pool, device)
}

/// Writes 20 MiB, more than there is room for, past the page cache.
fn writer(device: &Device) -> Background {
    shell("dd if=/dev/urandom of=/run/wanted bs=1M count=20 status=none");
    Background::start(&format!(
        "dd if=/run/wanted of={} bs=1M oflag=direct conv=notrunc,fsync status=none",
        device.path
    ))
}

/// Waits until nothing is left for new data, and a while longer.
#[track_caller]
fn waits(pool: &Pool, writer: &mut Background) {
    eventually("the pool is full", || {
        let status = pool.ctl(&["pool", "status", pool.name(), "-p"]);
        let free = status.lines().find_map(|line| line.strip_prefix("free "));
        let free: u64 = free.expect("what is free").trim().parse().expect("bytes");
        free < MIB
    });
    sleep(Duration::from_secs(1));
    assert!(writer.is_running(), "the write did not wait");
}

#[track_caller]
fn holds_what_was_wanted(device: &Device) {
    let wanted = std::fs::read("/run/wanted").expect("the file");
    assert!(
        device.bytes(0, 20 * MIB) == wanted,
        "an acknowledged write is lost"
    );
    std::fs::remove_file("/run/wanted").expect("it can be removed");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_write_waits_for_space_and_goes_on_when_there_is_some() {
    let (pool, device) = with_ballast("waits", "queue=600");
    let told = pool.watch();
    let mut writer = writer(&device);
    waits(&pool, &mut writer);
    // Nothing else waits: not reads, not what needs no new block, not commands.
    let other = pool.attach("ballast");
    assert!(other.holds(0, 12 * MIB, 1));
    other.fill(0, MIB, 2);
    pool.detach("ballast");
    pool.ctl(&["rm", &pool.target("ballast")]);
    writer.succeeds();
    holds_what_was_wanted(&device);
    pool.detach("v");
    for event in [
        r#""event":"watching""#,
        r#""event":"space-mark","mark":95,"passed":"up""#,
        r#""event":"device-added","name":"waits/ballast""#,
        r#""event":"device-gone","name":"waits/ballast""#,
        r#""event":"reclaim-done""#,
        r#""event":"device-gone","name":"waits/v""#,
    ] {
        eventually(event, || told.read().contains(event));
    }
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_wait_for_space_ends_by_the_clock() {
    let (pool, device) = with_ballast("clock", "queue=2");
    let clock = SystemClock::new();
    let said = shell_fails(&format!(
        "dd if=/dev/zero of={} bs=1M count=20 oflag=direct conv=notrunc",
        device.path
    ));
    assert!(said.contains("No space left"), "the kernel said: {said}");
    assert!(clock.monotonic_ns() >= 2_000_000_000);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_write_that_waits_for_space_outlives_its_daemons() {
    let (pool, device) = with_ballast("outwait", "queue=600");
    let mut writer = writer(&device);
    waits(&pool, &mut writer);
    // A planned end leaves it to the next daemon, as a kill does.
    let pid = pool.daemon().expect("the daemon has a pid file");
    shell(&format!("kill {pid}"));
    pool.await_end(&pid);
    assert!(writer.is_running(), "the write was answered");
    pool.recover();
    waits(&pool, &mut writer);
    pool.kill_daemon();
    pool.recover();
    waits(&pool, &mut writer);
    pool.ctl(&["rm", &pool.target("ballast")]);
    writer.succeeds();
    holds_what_was_wanted(&device);
    pool.check();
}
