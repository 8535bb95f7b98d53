//! A device that hangs in the kernel: the others of its pool go on.

use blockfork_tests::guest::{MIB, Pool, StoppedThreads, eventually, shell};
use std::fs;
use std::path::{Path, PathBuf};

/// Whether a task waits in the kernel where no signal reaches it.
fn is_stuck(stat: &Path) -> bool {
    fs::read_to_string(stat).is_ok_and(|stat| stat.contains(") D "))
}

/// Whether a thread of the daemon, or of a process that the daemon started, waits so.
fn is_daemon_stuck() -> bool {
    let processes = fs::read_dir("/proc").expect("/proc is there").flatten();
    let ours = processes.map(|process| process.path()).filter(|process| {
        fs::read(process.join("cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).next().is_some_and(is_ublkctl))
    });
    let threads = ours.flat_map(|process| fs::read_dir(process.join("task")).into_iter().flatten());
    threads
        .flatten()
        .any(|thread| is_stuck(&thread.path().join("stat")))
}

/// Whether a process of this command line is the program: it starts itself anew by another path.
fn is_ublkctl(word: &[u8]) -> bool {
    word.ends_with(b"ublkctl") || word == b"/proc/self/exe"
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
    let stat = PathBuf::from(format!("/proc/{reader}/stat"));
    eventually("the reader waits for its page", || is_stuck(&stat));
    shell(&format!("kill -9 {reader}"));
    eventually("the reader closes the device", || {
        fs::read_dir(format!("/proc/{reader}/fd")).is_ok_and(|mut open| open.next().is_none())
            && is_stuck(&stat)
    });
    let mut detach = pool.start_ctl(&["detach", &pool.target("v")]);
    eventually("the kernel keeps the detach waiting", is_daemon_stuck);

    pool.ctl(&["list", pool.name()]);
    pool.ctl(&["pool", "status", pool.name()]);
    pool.snapshot("w@s");
    assert!(
        detach.is_running(),
        "the others waited for the device that hangs"
    );
    w.fill(0, MIB, 1);
    assert!(w.holds(0, MIB, 1));
    let x = pool.attach("x");
    x.fill(0, MIB, 2);
    pool.detach("x");
    pool.ctl(&["rename", &pool.target("x"), &pool.target("y")]);
    pool.ctl(&["resize", &pool.target("w"), "64M"]);
    pool.ctl(&["rm", &pool.target("w@s")]);

    drop(queues);
    // It may have been refused by now, because nobody can tell who has the device.
    if !detach.ends() {
        eventually("the device is detached", || {
            pool.try_ctl(&["detach", &pool.target("v")])
                .status
                .success()
        });
    }
    pool.check();
}
