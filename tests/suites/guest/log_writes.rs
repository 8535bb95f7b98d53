//! What the pool's device was told, replayed up to each flush: whatever a power cut there leaves is a whole pool that
//! holds every file that was fsynced by then.

use blockfork_tests::guest::{MIB, Mapped, Pool, shell};
use blockfork_tests::log_writes::Log;
use std::fs::File;
use std::path::Path;

/// The device that takes the log.
const LOG: &str = "/dev/ram1";
const FILES: usize = 24;
/// Flushes and FUA writes after which the pool is checked, evenly spread.
const CHECKED: usize = 40;
/// Marks after which the file system is mounted and read.
const MOUNTED: usize = 6;

/// What file `number` holds.
fn content(number: usize) -> String {
    format!("file {number} ").repeat(3000 + 100 * number)
}

/// Which of `all` are looked at: `most` of them, evenly spread, the last one always.
fn spread(all: &[usize], most: usize) -> Vec<usize> {
    let step = all.len().div_ceil(most).max(1);
    all.iter().rev().step_by(step).rev().copied().collect()
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn at_every_flush_the_pool_is_whole_and_holds_what_was_fsynced() {
    let Some(below) = Mapped::whole("logged", "dm-log-writes", 128 * MIB) else {
        return;
    };
    // The log tells all that differs from zeros.
    shell(&format!(
        "blkdiscard -z {0} 2>/dev/null || dd if=/dev/zero of={0} bs=1M count=128 conv=fsync status=none",
        below.path()
    ));
    shell(&format!(
        "dd if=/dev/zero of={LOG} bs=1M count=1 conv=fsync status=none"
    ));
    below.load(&format!("log-writes {} {LOG}", below.lower()));
    let mark = |text: &str| shell(&format!("dmsetup message {} 0 mark {text}", "logged"));
    let pool = Pool::on_device("logged", &below.path());
    let device = pool.volume("v", "64M");
    mark("begin");
    shell(&format!(
        "mkfs.ext4 -q -E nodiscard {} && sync {0}",
        device.path
    ));
    let mount = device.mount("rw");
    for number in 0..FILES {
        let path = format!("{}/{number}", mount.path);
        let file = File::create_new(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, content(number).as_bytes(), 0).unwrap();
        file.sync_all().unwrap();
        File::open(&mount.path).unwrap().sync_all().unwrap();
        mark(&format!("fsynced-{number}"));
        // What nobody waits for goes on beside it.
        shell(&format!(
            "dd if=/dev/urandom of={}/noise bs=64k count=4 seek={} conv=notrunc status=none",
            mount.path,
            number % 7 * 4
        ));
        match number % 4 {
            1 => pool.snapshot(&format!("v@{number}")),
            3 if number > 4 => {
                pool.ctl(&["rm", &pool.target(&format!("v@{}", number - 6))]);
            }
            _ => {}
        }
    }
    mount.unmount();
    pool.check();
    drop(pool);
    drop(below);
    replay();
}

fn replay() {
    let mut log = Log::read(File::open(LOG).unwrap()).unwrap();
    let numbers = 0..log.entries.len();
    let is_flush = |number: &usize| log.entries[*number].is_flush();
    let fsynced = |number: usize| -> Option<usize> {
        let mark = log.entries[number].mark.as_deref()?;
        mark.strip_prefix("fsynced-")?.parse().ok()
    };
    let begin = (log.entries.iter()).position(|entry| entry.mark.as_deref() == Some("begin"));
    let begin = begin.expect("the first mark");
    let flushes: Vec<usize> = numbers
        .clone()
        .filter(is_flush)
        .filter(|at| *at > begin)
        .collect();
    let marks: Vec<usize> = numbers
        .clone()
        .filter(|at| fsynced(*at).is_some())
        .collect();
    assert_eq!(marks.len(), FILES, "a mark is missing");
    assert!(flushes.len() >= FILES, "{} flushes", flushes.len());
    let (checked, mounted) = (spread(&flushes, CHECKED), spread(&marks, MOUNTED));
    let files: Vec<Option<usize>> = numbers.clone().map(fsynced).collect();
    println!(
        "{} entries, {} flushes, {} checked, {} mounted",
        log.entries.len(),
        flushes.len(),
        checked.len(),
        mounted.len()
    );
    let folder = Path::new("/run/replayed");
    std::fs::create_dir_all(folder).unwrap();
    let path = folder.join("whole");
    let onto = File::create(&path).unwrap();
    onto.set_len(128 * MIB).unwrap();
    for number in numbers {
        log.replay(number, &onto).unwrap();
        if checked.contains(&number) {
            shell(&format!("ublkctl pool check {}", path.display()));
        }
        if let (Some(last), true) = (files[number], mounted.contains(&number)) {
            holds(&path, &folder.join("copy"), last);
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// A pool that was cut off there, brought up again: every file up to `last` is there.
fn holds(whole: &Path, copy: &Path, last: usize) {
    shell(&format!(
        "dd if={} of={} bs=64k conv=sparse status=none",
        whole.display(),
        copy.display()
    ));
    let pool = Pool::imported("logged", copy.to_str().unwrap());
    let device = pool.attach("v");
    let mount = device.mount("rw");
    for number in 0..=last {
        let found = std::fs::read_to_string(format!("{}/{number}", mount.path));
        let found = found.unwrap_or_else(|e| panic!("file {number} of {last}: {e}"));
        assert!(
            found == content(number),
            "file {number} of {last} is not what was fsynced"
        );
    }
    mount.unmount();
    shell(&format!("e2fsck -fn {} >/dev/null", device.path));
    pool.check();
}
