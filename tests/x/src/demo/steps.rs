//! The demo's steps, in the order in which a newcomer would try them.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::session::Session;

const FIO: &str = "fio --name=verify --filename=$DEVICE --rw=randwrite --bs=4k --size=48M --ioengine=libaio \
                   --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --eta=never --minimal";

/// Everything; the first thing that does not hold is the error.
pub(super) fn all(session: &mut Session) -> Result<()> {
    let device = create(session)?;
    snapshot(session)?;
    look_back(session)?;
    clone(session)?;
    roll_back(session, &device)?;
    survive_a_kill(session)?;
    remove(session)
}

/// Sums of all files below a folder, in an order that depends on their names only.
fn sums(folder: &str, file: &str) -> String {
    format!("(cd {folder} && find . -type f -exec sha256sum {{}} + | LC_ALL=C sort -k 2) > {file}")
}

fn create(session: &mut Session) -> Result<String> {
    session.chapter("A pool in a file, a volume in the pool, a file system on the volume");
    session.run("ublkctl pool create demo $PWD/demo.pool --size 512M")?;
    session.run("ublkctl create demo/files --size 192M")?;
    let device = session.run("ublkctl attach demo/files")?;
    session.check(
        "attach prints the device, and it is there",
        fs::metadata(&device).is_ok(),
    )?;
    session.run(&format!("mkfs.ext4 -q {device}"))?;
    session.run(&format!("mkdir mnt snap copy && mount {device} mnt"))?;
    session.run("tar -C mnt -xf files.tar")?;
    session.run(&sums("mnt", "before.sums"))?;
    session.run("wc -l < before.sums; du -sh mnt")?;
    Ok(device)
}

fn snapshot(session: &mut Session) -> Result<()> {
    session.chapter("A snapshot, while the file system is mounted; then change and delete files");
    session.run("fsfreeze --freeze mnt; ublkctl snapshot demo/files@before; status=$?; fsfreeze --unfreeze mnt; exit $status")?;
    session.run("find mnt -type f | LC_ALL=C sort | head -n 100 | while read -r file; do rm \"$file\"; done")?;
    session.run("find mnt -type f | LC_ALL=C sort | head -n 100 | while read -r file; do echo changed >> \"$file\"; done")?;
    session.run("dd if=/dev/urandom of=mnt/new bs=1M count=8 status=none && sync")?;
    session.run(&sums("mnt", "after.sums"))?;
    session.refused("cmp -s before.sums after.sums", "the volume has changed")?;
    session.run("ublkctl list demo").map(drop)
}

fn look_back(session: &mut Session) -> Result<()> {
    session.chapter("The snapshot, attached read-only, still holds every byte");
    let snapshot = session.run("ublkctl attach demo/files@before")?;
    session.run(&format!("mount -o ro,noload {snapshot} snap"))?;
    session.run(&sums("snap", "snap.sums"))?;
    session.shows(
        "cmp before.sums snap.sums",
        "the snapshot's files are those of before, bit for bit",
    )?;
    session.refused(
        &format!("dd if=/dev/zero of={snapshot} bs=4k count=1 oflag=direct status=none"),
        "a snapshot cannot be written",
    )
}

fn clone(session: &mut Session) -> Result<()> {
    session.chapter("A clone: a volume of its own that begins as the snapshot");
    session.run("ublkctl clone demo/files@before demo/copy")?;
    let device = session.run("ublkctl attach demo/copy")?;
    session.run(&format!("mount {device} copy"))?;
    session.run(&sums("copy", "copy.sums"))?;
    session.shows(
        "cmp before.sums copy.sums",
        "the clone begins with the snapshot's files",
    )?;
    session.run("rm -r copy/usr/include && dd if=/dev/urandom of=copy/own bs=1M count=4 status=none && umount copy")?;
    session.run("umount snap")?;
    let snapshot = session.run("ublkctl list demo/files@before -H -o device")?;
    session.run(&format!("mount -o ro,noload {snapshot} snap"))?;
    session.run(&sums("snap", "snap.sums"))?;
    session.shows(
        "cmp before.sums snap.sums",
        "changing the clone left the snapshot as it was",
    )?;
    session.run(&sums("mnt", "now.sums"))?;
    session.shows(
        "cmp after.sums now.sums",
        "changing the clone left the volume as it was",
    )?;
    session
        .run("umount snap && ublkctl detach demo/files@before && ublkctl detach demo/copy")
        .map(drop)
}

fn roll_back(session: &mut Session, device: &str) -> Result<()> {
    session.chapter("Back to the snapshot, in place");
    session.refused(
        "ublkctl rollback demo/files@before",
        "a rollback is refused while the volume is mounted",
    )?;
    session.run("umount mnt")?;
    session.run("ublkctl rollback demo/files@before")?;
    session.run(&format!("mount {device} mnt"))?;
    session.run(&sums("mnt", "back.sums"))?;
    session.shows(
        "cmp before.sums back.sums",
        "the volume is what it was before",
    )?;
    session.run("umount mnt")?;
    session.shows(
        &format!("e2fsck -fn {device} 2>&1"),
        "e2fsck finds nothing to repair",
    )?;
    session.run("ublkctl detach demo/files").map(drop)
}

fn survive_a_kill(session: &mut Session) -> Result<()> {
    session.chapter(
        "fio writes and verifies; then again, over a snapshot, while the daemon is killed",
    );
    session.run("ublkctl create demo/work --size 64M")?;
    let device = session.run("ublkctl attach demo/work")?;
    let fio = FIO.replace("$DEVICE", &device);
    session.shows(&format!("{fio} > fio.log"), "fio reads back what it wrote")?;
    session.run("ublkctl snapshot demo/work@first")?;
    let mut load = session.start(&format!("{fio} --rate=,6m > fio.log"))?;
    sleep(Duration::from_secs(3));
    session.run("kill -9 $(cat $UBLKCTL_RUNTIME_DIR/demo.pid)")?;
    sleep(Duration::from_secs(1));
    session.check("the load is still there, waiting", load.is_running())?;
    #[expect(clippy::disallowed_methods, reason = "shown to a person")]
    let begin = Instant::now();
    session.run("ublkctl recover demo")?;
    println!("  recovered in {:.1} s", begin.elapsed().as_secs_f32());
    session.check("the same device is back", fs::metadata(&device).is_ok())?;
    session.check(
        "the load was still running when it came back",
        load.is_running(),
    )?;
    let succeeded = load.succeeds().context("fio is lost")?;
    session.check("fio saw no I/O error and read back every write", succeeded)?;
    session.run("ublkctl list demo").map(drop)
}

fn remove(session: &mut Session) -> Result<()> {
    session.chapter("Remove everything, in any order, and check the pool");
    session.run("ublkctl detach demo/work")?;
    session.run("ublkctl rm demo/files@before")?;
    session.run("ublkctl rm demo/work@first demo/files demo/work")?;
    session.shows(
        "ublkctl pool check demo",
        "the pool is clean with a clone left in it",
    )?;
    session.run("ublkctl rm demo/copy")?;
    session.run("ublkctl pool status demo")?;
    session.run("ublkctl pool export demo")?;
    session.shows("ublkctl pool check $PWD/demo.pool", "the pool is clean")
}
