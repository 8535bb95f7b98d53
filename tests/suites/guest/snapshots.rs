//! A snapshot is a point in time, read-only and stable; a clone goes its own way.

use blockfork_tests::guest::{MIB, Pool, shell, shell_fails};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_snapshot_keeps_its_content_while_the_volume_changes() {
    let pool = Pool::on_ram_disk("snap");
    let device = pool.volume("v", "64M");
    device.fill(0, 32 * MIB, 1);
    pool.snapshot("v@one");
    device.fill(8 * MIB, 8 * MIB, 2);
    pool.snapshot("v@two");
    shell(&format!(
        "blkdiscard -o {} -l {} {}",
        16 * MIB,
        8 * MIB,
        device.path
    ));
    device.fill(40 * MIB, 8 * MIB, 3);

    let one = pool.attach("v@one");
    assert!(one.holds(0, 32 * MIB, 1), "the first snapshot changed");
    assert!(one.is_zero(32 * MIB, 32 * MIB));
    let two = pool.attach("v@two");
    assert!(
        two.holds(8 * MIB, 8 * MIB, 2),
        "the second snapshot changed"
    );
    assert!(two.is_zero(40 * MIB, 8 * MIB));
    assert_eq!(shell(&format!("blockdev --getro {}", one.path)), "1");
    shell_fails(&format!(
        "dd if=/dev/zero of={} bs=4k count=1 oflag=direct status=none",
        one.path
    ));
    assert!(
        one.holds(0, 32 * MIB, 1),
        "a refused write changed the snapshot"
    );
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_snapshot_under_load_is_stable_at_once() {
    let pool = Pool::on_ram_disk("stable");
    let device = pool.volume("v", "64M");
    device.fill(0, 48 * MIB, 1);
    let load = blockfork_tests::guest::Background::start(
        &device.fio("--rw=randwrite --bs=4k --iodepth=16 --size=48M --rate=,12m"),
    );
    let sum = |path: &str| {
        shell(&format!(
            "dd if={path} bs=1M iflag=direct status=none | sha256sum"
        ))
    };
    let mut taken = Vec::new();
    for name in ["v@a", "v@b", "v@c"] {
        pool.snapshot(name);
        let path = pool.attach(name).path;
        let first = sum(&path);
        taken.push((path, first));
    }
    load.succeeds();
    for (path, first) in taken {
        assert_eq!(sum(&path), first, "{path} changed under the load");
    }
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_clone_and_its_origin_go_their_own_ways() {
    let pool = Pool::on_ram_disk("clone");
    let origin = pool.volume("v", "64M");
    origin.fill(0, 16 * MIB, 1);
    pool.snapshot("v@s");
    pool.ctl(&["clone", &pool.target("v@s"), &pool.target("c")]);
    let clone = pool.attach("c");
    assert!(
        clone.holds(0, 16 * MIB, 1),
        "the clone does not begin as the snapshot"
    );
    clone.fill(0, 4 * MIB, 2);
    origin.fill(4 * MIB, 4 * MIB, 3);
    pool.snapshot("c@s");
    pool.ctl(&["clone", &pool.target("c@s"), &pool.target("cc")]);
    let second = pool.attach("cc");
    second.fill(8 * MIB, 4 * MIB, 4);
    let whole = origin.bytes(0, 16 * MIB);
    assert!(clone.holds(0, 4 * MIB, 2) && second.holds(0, 4 * MIB, 2));
    assert!(origin.holds(4 * MIB, 4 * MIB, 3));
    assert!(second.holds(8 * MIB, 4 * MIB, 4));
    // The origin goes, its clones stay.
    pool.detach("v");
    pool.ctl(&["rm", &pool.target("v"), "-r"]);
    assert_ne!(clone.bytes(0, 16 * MIB), whole);
    assert!(clone.holds(0, 4 * MIB, 2) && second.holds(8 * MIB, 4 * MIB, 4));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_mounted_file_system_can_be_snapshotted_and_cloned() {
    let pool = Pool::on_ram_disk("mounted");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    shell(&format!(
        "dd if=/dev/urandom of={}/file bs=1M count=16 status=none && sync",
        mount.path
    ));
    let before = shell(&format!("sha256sum < {}/file", mount.path));
    pool.snapshot("v@s");
    shell(&format!("echo changed > {}/file && sync", mount.path));
    // Crash-consistent: the clone replays the file system's own journal.
    pool.ctl(&["clone", &pool.target("v@s"), &pool.target("c")]);
    let clone = pool.attach("c");
    let copy = clone.mount("noatime");
    assert_eq!(shell(&format!("sha256sum < {}/file", copy.path)), before);
    copy.unmount();
    shell(&format!("e2fsck -fn {}", clone.path));
    mount.unmount();
    pool.check();
}
