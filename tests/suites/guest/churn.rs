//! Devices come and go many times: no command hangs, and nothing is left of them. `cargo x churn` runs this longer.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use blockfork_tests::guest::{MIB, Pool, eventually, from_environment, shell};

/// The daemon's threads, open files and memory have their lasting size after so many.
const WARM_UP: u64 = 20;

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn devices_that_come_and_go_leave_nothing_behind() {
    let cycles = from_environment("BLOCKFORK_CYCLES", 60);
    let pool = Pool::on_ram_disk("churn");
    pool.create("v", "64M");
    // As long as another device is there, one daemon lives through all cycles.
    let other = pool.volume("other", "16M");
    other.fill(0, MIB, 1);
    pool.snapshot("other@s");
    let mut settled = None;
    for cycle in 0..cycles {
        let name = if cycle % 8 == 7 { "other@s" } else { "v" };
        // Whatever hangs is a failure after a minute.
        let path = pool.ctl_within(60, &["attach", &pool.target(name)]);
        shell(&format!(
            "timeout 60 dd if={path} of=/dev/null bs=64k count=1 iflag=direct status=none"
        ));
        pool.ctl_within(60, &["detach", &pool.target(name)]);
        assert!(!Path::new(&path).exists(), "{path} is still there");
        if cycle % 50 == WARM_UP.min(cycles / 2) {
            let now = Footprint::of(&pool);
            println!("cycle {cycle}: {now:?}");
            settled.get_or_insert(now);
        }
    }
    let (before, after) = (settled.expect("some cycles"), Footprint::of(&pool));
    println!("@ cycles {cycles}");
    println!(
        "@ files_gained {}",
        after.files.saturating_sub(before.files)
    );
    println!(
        "@ threads_gained {}",
        after.threads.saturating_sub(before.threads)
    );
    println!("@ kib_gained {}", after.kib.saturating_sub(before.kib));
    assert!(after.files <= before.files, "the daemon keeps files open");
    assert!(after.threads <= before.threads, "the daemon keeps threads");
    assert!(
        after.kib < before.kib + 2048,
        "the daemon grew from {} to {} KiB",
        before.kib,
        after.kib
    );
    assert!(other.holds(0, MIB, 1));
    let pid = pool.daemon().expect("the daemon has a pid file");
    pool.ctl_within(60, &["detach", &pool.target("other")]);
    eventually("the daemon ends with its last device", || {
        !Path::new("/proc").join(&pid).exists()
    });
    let left = shell("find /dev -name 'ublk[bc]*'; find /dev/blockfork -type l 2>/dev/null; true");
    println!("@ nodes_left {}", left.lines().count());
    assert_eq!(left, "", "nodes or links are left");
    pool.check();
}

/// What a daemon takes of the machine.
#[derive(Clone, Copy, Debug)]
struct Footprint {
    files: usize,
    threads: usize,
    kib: u64,
}

impl Footprint {
    /// The least of a second: the last command's connection is not closed at once.
    fn of(pool: &Pool) -> Self {
        let looks = (0..20).map(|_| {
            sleep(Duration::from_millis(50));
            Self::now(pool)
        });
        let least = looks.reduce(|one, other| Self {
            files: one.files.min(other.files),
            threads: one.threads.min(other.threads),
            kib: one.kib.min(other.kib),
        });
        least.expect("one look at least")
    }

    fn now(pool: &Pool) -> Self {
        let pid = pool.daemon().expect("the daemon has a pid file");
        let entries = |folder: &str| -> Vec<PathBuf> {
            let entries = fs::read_dir(format!("/proc/{pid}/{folder}"));
            let entries = entries.expect("the daemon is there").flatten();
            entries.map(|entry| entry.path()).collect()
        };
        let name_of = |task: &Path| fs::read_to_string(task.join("comm")).unwrap_or_default();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kib| kib.parse().ok());
        Self {
            files: entries("fd").len(),
            // The kernel's own workers for io_uring come and go.
            threads: entries("task")
                .iter()
                .filter(|task| !name_of(task).starts_with("iou-"))
                .count(),
            kib: resident.expect("a size in KiB"),
        }
    }
}
