//! A full pool refuses new blocks with ENOSPC; everything else goes on, and removal makes room.

use blockfork_tests::guest::{MIB, Pool, eventually, shell, shell_fails, try_shell};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_full_pool_says_no_space_and_removal_makes_room() {
    let pool = Pool::in_file("full", "128M");
    let device = pool.volume("v", "512M");
    device.fill(0, 16 * MIB, 1);
    pool.snapshot("v@s");
    let said = shell_fails(&format!(
        "dd if=/dev/urandom of={} bs=1M seek=16 oflag=direct conv=notrunc",
        device.path
    ));
    assert!(said.contains("No space left"), "the kernel said: {said}");
    // What is there can be read, and a removal and a discard still work.
    assert!(device.holds(0, 16 * MIB, 1), "the old content is gone");
    let snapshot = pool.attach("v@s");
    assert!(snapshot.holds(0, 16 * MIB, 1));
    pool.detach("v@s");
    pool.ctl(&["rm", &pool.target("v@s")]);
    shell(&format!(
        "blkdiscard -o {} -l {} {}",
        16 * MIB,
        496 * MIB,
        device.path
    ));
    eventually("there is room again", || {
        try_shell(&format!(
            "dd if=/dev/zero of={} bs=1M count=16 seek=32 oflag=direct conv=notrunc,fsync",
            device.path
        ))
        .status
        .success()
    });
    assert!(device.holds(0, 16 * MIB, 1));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn exclusive_blocks_of_a_full_pool_can_be_overwritten() {
    let pool = Pool::in_file("overwrite", "96M");
    let device = pool.volume("v", "256M");
    device.fill(0, 16 * MIB, 1);
    shell_fails(&format!(
        "dd if=/dev/urandom of={} bs=1M seek=16 oflag=direct conv=notrunc",
        device.path
    ));
    device.fill(0, 16 * MIB, 2);
    assert!(device.holds(0, 16 * MIB, 2));
    pool.check();
}
