//! A device that hangs in the kernel: the others of its pool go on.

use blockfork_tests::guest::{MIB, Pool, StoppedThreads, eventually, shell};
use std::fs;

/// Whether a task waits in the kernel where no signal reaches it.
fn is_stuck(task: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{task}/stat"));
    stat.is_ok_and(|stat| stat.contains(") D "))
}

/// Whether any thread of a process waits so.
fn has_stuck_thread(pid: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    let ids = threads.flatten().map(|thread| thread.file_name());
    ids.into_iter()
        .any(|id| is_stuck(&format!("{pid}/task/{}", id.to_string_lossy())))
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn the_other_volumes_of_a_pool_go_on_beside_a_device_that_hangs() {
    let pool = Pool::on_ram_disk("hung");
    let v = pool.volume("v", "32M");
    let w = pool.volume("w", "32M");
    pool.create("x", "32M");
    let daemon = pool.daemon().expect("the daemon has a pid file");

    // Who closes the device last waits, with its locks held and without a descriptor, for the page that it had asked for.
    let queues = StoppedThreads::of(
        &daemon,
        &format!("{}-", v.path.replace("/dev/ublkb", "ublk")),
    );
    let reader = shell(&format!(
        "dd if={} of=/dev/null bs=4k skip=1000 count=1 2>/dev/null >/dev/null & echo $!",
        v.path
    ));
    eventually("the reader waits for its page", || is_stuck(&reader));
    shell(&format!("kill -9 {reader}"));
    eventually("the reader closes the device", || {
        fs::read_dir(format!("/proc/{reader}/fd")).is_ok_and(|mut open| open.next().is_none())
            && is_stuck(&reader)
    });
    let mut detach = pool.start_ctl(&["detach", &pool.target("v")]);
    eventually("the kernel keeps the detach waiting", || {
        has_stuck_thread(&daemon)
    });

    pool.ctl(&["list", pool.name()]);
    pool.ctl(&["pool", "status", pool.name()]);
    pool.snapshot("w@s");
    w.fill(0, MIB, 1);
    assert!(w.holds(0, MIB, 1));
    let x = pool.attach("x");
    x.fill(0, MIB, 2);
    pool.detach("x");
    pool.ctl(&["rename", &pool.target("x"), &pool.target("y")]);
    pool.ctl(&["resize", &pool.target("w"), "64M"]);
    pool.ctl(&["rm", &pool.target("w@s")]);
    assert!(
        detach.is_running(),
        "the device did not hang while all of that was done"
    );

    drop(queues);
    detach.succeeds();
    pool.check();
}
