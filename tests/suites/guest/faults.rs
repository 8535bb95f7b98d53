//! Faults below the pool: the file system under it is full, or its device answers with errors for a while.

use blockfork_tests::guest::{MIB, Mapped, Mount, Pool, shell, shell_fails};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_full_file_system_below_the_pool_refuses_new_blocks_and_loses_nothing() {
    let below = Mount::tmpfs("below", "96M");
    let pool = Pool::in_folder("sparse", &below.path, "512M");
    let device = pool.volume("v", "256M");
    let other = pool.volume("w", "32M");
    device.fill(0, 16 * MIB, 1);
    other.fill(0, 8 * MIB, 1);
    pool.snapshot("v@s");
    device.fill(0, 4 * MIB, 2);
    // Somebody else takes what the file system has left.
    let ballast = format!("{}/ballast", below.path);
    shell_fails(&format!("dd if=/dev/zero of={ballast} bs=64k status=none"));
    let said = shell_fails(&format!(
        "dd if=/dev/urandom of={} bs=1M seek=32 oflag=direct conv=notrunc",
        device.path
    ));
    assert!(said.contains("No space left"), "the kernel said: {said}");
    assert!(device.holds(0, 4 * MIB, 2));
    assert!(pool.attach("v@s").holds(0, 16 * MIB, 1));
    other.fill(0, 8 * MIB, 3);
    assert!(
        other.holds(0, 8 * MIB, 3),
        "an exclusive block was not overwritten"
    );
    pool.snapshot("w@t");
    shell(&format!(
        "blkdiscard -o {} -l {MIB} {}",
        7 * MIB,
        other.path
    ));
    pool.detach("v@s");
    pool.ctl(&["rollback", &pool.target("v@s")]);
    assert!(device.holds(0, 16 * MIB, 1));
    pool.kill_daemon();
    pool.recover();
    assert!(device.holds(0, 16 * MIB, 1));
    assert!(other.holds(0, 7 * MIB, 3));
    // What the pool itself gives up is room again.
    pool.detach("v");
    pool.ctl(&["rm", "--recursive", "--wait", &pool.target("v")]);
    other.fill(8 * MIB, 8 * MIB, 5);
    assert!(other.holds(8 * MIB, 8 * MIB, 5));
    shell(&format!("rm {ballast}"));
    other.fill(16 * MIB, 8 * MIB, 6);
    assert!(other.holds(16 * MIB, 8 * MIB, 6));
    assert!(pool.attach("w@t").holds(0, 8 * MIB, 3));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_device_that_fails_for_a_while_gives_errors_and_loses_nothing_that_was_flushed() {
    for fault in ["error_reads", "error_writes"] {
        let Some(below) = Mapped::whole("flaky", "dm-flakey", 128 * MIB) else {
            return;
        };
        let pool = Pool::on_device("flaky", &below.path());
        let device = pool.volume("v", "64M");
        device.fill(MIB, 15 * MIB, 1);
        device.fill(0, MIB, 9);
        // Up for no second, down for an hour.
        below.load(&format!("flakey {} 0 0 3600 1 {fault}", below.lower()));
        if fault == "error_reads" {
            shell_fails(&format!(
                "dd if={} of=/dev/null bs=64k count=1 iflag=direct status=none",
                device.path
            ));
        } else {
            shell_fails(&format!(
                "dd if=/dev/urandom of={} bs=64k count=1 oflag=direct conv=notrunc,fsync status=none",
                device.path
            ));
        }
        below.load(&format!("linear {} 0", below.lower()));
        // Where a flush failed, the pool takes no more writes until it is opened again.
        pool.kill_daemon();
        pool.recover();
        assert!(
            device.holds(MIB, 15 * MIB, 1),
            "{fault}: what was flushed before is lost"
        );
        device.fill(0, 16 * MIB, 2);
        assert!(
            device.holds(0, 16 * MIB, 2),
            "{fault}: not usable afterwards"
        );
        pool.check();
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_bad_spot_below_the_data_is_an_error_there_and_nowhere_else() {
    let Some(below) = Mapped::whole("spot", "dm-mod", 128 * MIB) else {
        return;
    };
    let pool = Pool::on_device("spot", &below.path());
    let device = pool.volume("v", "96M");
    device.fill(0, 80 * MIB, 1);
    // 1 MiB in the middle of the pool's device, far behind superblock and journal.
    let (start, end, all) = (64 * MIB / 512, 65 * MIB / 512, 128 * MIB / 512);
    let lower = below.lower();
    below.load_table(&format!(
        "0 {start} linear {lower} 0\n{start} {} error\n{end} {} linear {lower} {end}",
        end - start,
        all - end
    ));
    let unreadable = device.unreadable_blocks(0, 80 * MIB, 1);
    assert!(
        (1..=256).contains(&unreadable),
        "a bad MiB below made {unreadable} blocks unreadable"
    );
    below.load(&format!("linear {lower} 0"));
    assert!(
        device.holds(0, 80 * MIB, 1),
        "healed, and yet not what was written"
    );
    pool.check();
}
