//! A snapshot contains what was written before the command, also what is still in the page cache.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use blockfork_tests::guest::{
    Background, Device, MIB, Mount, Pool, eventually, shell, shell_fails, try_shell,
};
use blockfork_tests::held_back::{At, HeldBack};

/// While this lives, the kernel does not write dirty pages back by itself.
struct NoWriteback(String, String);

impl NoWriteback {
    fn begin() -> Self {
        let read = |name: &str| shell(&format!("cat /proc/sys/vm/{name}"));
        let before = Self(
            read("dirty_writeback_centisecs"),
            read("dirty_expire_centisecs"),
        );
        // An hour. With 0 some kernels write a new device's first pages back at once.
        shell("echo 360000 > /proc/sys/vm/dirty_writeback_centisecs");
        shell("echo 360000 > /proc/sys/vm/dirty_expire_centisecs");
        before
    }
}

impl Drop for NoWriteback {
    fn drop(&mut self) {
        shell(&format!(
            "echo {} > /proc/sys/vm/dirty_writeback_centisecs",
            self.0
        ));
        shell(&format!(
            "echo {} > /proc/sys/vm/dirty_expire_centisecs",
            self.1
        ));
    }
}

/// Writes through the page cache and keeps the device open, as a virtual machine monitor does.
fn write_buffered(device: &Device, byte: u8) -> File {
    write_path(Path::new(&device.path), byte)
}

fn write_path(path: &Path, byte: u8) -> File {
    let mut file = File::options().write(true).open(path).unwrap();
    file.write_all(&vec![byte; usize::try_from(MIB).unwrap()])
        .unwrap();
    file
}

/// How many of the first MiB's bytes have this value.
#[track_caller]
fn bytes_of(pool: &Pool, snapshot: &str, byte: u8) -> usize {
    let bytes = pool.attach(snapshot).bytes(0, MIB);
    bytes.iter().filter(|found| **found == byte).count()
}

/// Writes a file without a flush; its checksum.
fn write_file(mount: &Mount) -> String {
    shell(&format!(
        "dd if=/dev/urandom of={0}/file bs=1M count=8 status=none && sha256sum < {0}/file",
        mount.path
    ))
}

/// The checksum of that file in a clone of a snapshot, whose file system is on `device` of that clone.
#[track_caller]
fn file_in_clone(pool: &Pool, snapshot: &str) -> String {
    let clone = attach_clone(pool, snapshot);
    let copy = clone.mount("noatime");
    let sum = shell(&format!("sha256sum < {}/file", copy.path));
    copy.unmount();
    sum
}

fn attach_clone(pool: &Pool, snapshot: &str) -> Device {
    pool.ctl(&["clone", &pool.target(snapshot), &pool.target("copy")]);
    pool.attach("copy")
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_buffered_write_to_the_device_is_in_the_snapshot() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("buffered");
    let device = pool.volume("v", "64M");
    let writer = write_buffered(&device, 7);
    pool.snapshot("v@s");
    assert_eq!(bytes_of(&pool, "v@s", 7), 1 << 20);
    drop(writer);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn no_sync_leaves_the_page_cache_alone() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("nosync");
    let device = pool.volume("v", "64M");
    let writer = write_buffered(&device, 7);
    pool.ctl(&["snapshot", "--no-sync", &pool.target("v@s")]);
    assert_eq!(bytes_of(&pool, "v@s", 7), 0);
    drop(writer);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_group_of_snapshots_has_the_buffered_writes_of_all_its_volumes() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("group");
    let writers = ["v", "w"].map(|name| write_buffered(&pool.volume(name, "32M"), 9));
    pool.ctl(&["snapshot", &pool.target("v@s"), &pool.target("w@s")]);
    assert_eq!(bytes_of(&pool, "v@s", 9), 1 << 20);
    assert_eq!(bytes_of(&pool, "w@s", 9), 1 << 20);
    drop(writers);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_diff_with_the_volume_sees_its_buffered_writes() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("diff");
    let device = pool.volume("v", "64M");
    pool.snapshot("v@s");
    let writer = write_buffered(&device, 7);
    let words = ["diff", "-H", &pool.target("v@s"), &pool.target("v")];
    assert_eq!(pool.ctl(&[&words[..], &["--no-sync"]].concat()), "");
    assert_eq!(pool.ctl(&words), "0\t1048576\tdata");
    drop(writer);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn what_a_mounted_file_system_has_in_memory_is_in_the_snapshot() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("dirty");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    let written = write_file(&mount);
    pool.snapshot("v@s");
    assert_eq!(file_in_clone(&pool, "v@s"), written);
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn file_systems_on_a_partition_and_on_a_mapped_device_are_flushed() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("layers");
    let device = pool.volume("v", "128M");
    // One partition from 1 MiB on, of 64 MiB: a table of the old kind counts in the device's sectors of 4 KiB.
    let mut table = vec![0; 4096];
    table[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 1, 0, 0, 0, 64, 0, 0]);
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut whole = File::options().write(true).open(&device.path).unwrap();
    whole.write_all(&table).unwrap();
    whole.sync_all().unwrap();
    drop(whole);
    shell(&format!("blockdev --rereadpt {}", device.path));
    let partition = Device {
        path: format!("{}p1", device.path),
    };
    eventually("the partition's node is there", || {
        Path::new(&partition.path).exists()
    });
    // The mapped device is the second half of the partition, with ext4. The first half is written to as it is.
    shell("modprobe -a dm-mod || true");
    shell(&format!(
        "DM_DISABLE_UDEV=1 dmsetup create snapped --table '0 65536 linear {} 65536'",
        partition.path
    ));
    let mapped = Device {
        path: String::from("/dev/mapper/snapped"),
    };
    shell(&format!("mkfs.ext4 -q {}", mapped.path));
    shell("mkdir -p /mnt/snapped && mount -o noatime /dev/mapper/snapped /mnt/snapped");
    let mount = Mount {
        path: String::from("/mnt/snapped"),
    };
    let written = write_file(&mount);
    let writer = write_buffered(&partition, 5);
    pool.snapshot("v@s");

    let clone = attach_clone(&pool, "v@s");
    let half = shell(&format!(
        "dd if={} bs=1M skip=1 count=1 iflag=direct status=none | tr -d '\\000' | wc -c",
        clone.path
    ));
    assert_eq!(half, "1048576", "the buffered write to the partition");
    shell(&format!(
        "mkdir -p /mnt/copy && mount -o noatime,offset={} {} /mnt/copy",
        33 * MIB,
        clone.path
    ));
    let copy = Mount {
        path: String::from("/mnt/copy"),
    };
    assert_eq!(
        shell(&format!("sha256sum < {}/file", copy.path)),
        written,
        "the file on the mapped device"
    );
    copy.unmount();
    drop(writer);
    mount.unmount();
    shell("DM_DISABLE_UDEV=1 dmsetup remove --retry snapped");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_in_a_loop_device_over_a_file_is_flushed() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("nested");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let lower = device.mount("noatime");
    let image = format!("{}/image", lower.path);
    shell(&format!("truncate -s 64M {image} && mkfs.ext4 -q {image}"));
    let upper = mount_image(&image, "/mnt/upper");
    let written = write_file(&upper);
    pool.snapshot("v@s");

    let clone = attach_clone(&pool, "v@s");
    let copy = clone.mount("noatime");
    let inner = mount_image(&format!("{}/image", copy.path), "/mnt/inner");
    assert_eq!(shell(&format!("sha256sum < {}/file", inner.path)), written);
    for mount in [inner, copy, upper, lower] {
        mount.unmount();
    }
    pool.check();
}

fn mount_image(image: &str, at: &str) -> Mount {
    shell(&format!(
        "modprobe loop || true; mkdir -p {at} && mount -o loop,noatime {image} {at}"
    ));
    Mount {
        path: at.to_owned(),
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_that_no_process_shows_is_flushed_and_mentioned() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("lazy");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    let written = write_file(&mount);
    let open = File::open(format!("{}/file", mount.path)).unwrap();
    shell(&format!("umount -l {}", mount.path));
    let snapshot = pool.target("v@s");
    let output = pool.try_ctl(&["snapshot", &snapshot]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("in sight"),
        "{said}"
    );
    assert_eq!(file_in_clone(&pool, "v@s"), written);
    let said = pool.refused(1, &["snapshot", "--freeze", &pool.target("v@t")]);
    assert!(said.contains("cannot be frozen"), "{said}");
    drop(open);
    drop(mount);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_in_another_mount_namespace_is_flushed() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("elsewhere");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    shell("mkdir -p /mnt/private; rm -f /run/private.sum");
    let other = Background::start(&format!(
        "unshare -m sh -c 'mount --make-rprivate / && mount -o noatime {} /mnt/private \
         && dd if=/dev/urandom of=/mnt/private/file bs=1M count=8 status=none \
         && sha256sum < /mnt/private/file > /run/private.new && mv /run/private.new /run/private.sum; exec sleep 600'",
        device.path
    ));
    eventually("the file is written there", || {
        Path::new("/run/private.sum").exists()
    });
    let written = shell("cat /run/private.sum");
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains("/mnt/private"),
        "the mount is meant to be out of sight"
    );
    let output = pool.try_ctl(&["snapshot", &pool.target("v@s")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}");
    assert_eq!(file_in_clone(&pool, "v@s"), written);
    drop(other);
    shell("rm /run/private.sum");
    eventually("the mount is gone with its namespace", || {
        pool.try_ctl(&["detach", &pool.target("v")])
            .status
            .success()
    });
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn no_snapshot_is_taken_if_the_flush_fails() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("failing");
    let size = ["--size", "64M", "--quota", "512K"];
    pool.ctl(&[&["create", &pool.target("v")], &size[..]].concat());
    pool.create("w", "64M");
    let device = pool.attach("v");
    pool.attach("w");
    // The page cache takes more than the volume may have.
    let writer = write_buffered(&device, 7);
    let said = pool.refused(1, &["snapshot", &pool.target("w@s"), &pool.target("v@s")]);
    assert!(
        said.contains(&device.path) && said.contains("--no-sync"),
        "{said}"
    );
    assert_eq!(
        pool.ctl(&["list", "-H", "-o", "name", pool.name()])
            .lines()
            .count(),
        2
    );
    pool.ctl(&["snapshot", "--no-sync", &pool.target("v@s")]);
    drop(writer);
    drop(try_shell(&format!("blockdev --flushbufs {}", device.path)));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_device_that_waits_for_its_daemon_is_not_waited_for() {
    let pool = Pool::on_ram_disk("waiting");
    let device = pool.volume("v", "64M");
    let writer = write_buffered(&device, 7);
    pool.kill_daemon();
    let plain = pool.try_ctl(&["snapshot", &pool.target("v@s")]);
    let frozen = pool.try_ctl(&["snapshot", "--freeze", &pool.target("v@s")]);
    // What the daemon had is there without a flush.
    let without = pool.try_ctl(&["snapshot", "--no-sync", &pool.target("v@u")]);
    // First of all: without a daemon, closing the device would wait.
    pool.recover();
    for output in [plain, frozen] {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("ublkctl recover waiting"), "{said}");
    }
    assert!(without.status.success());
    pool.snapshot("v@t");
    assert_eq!(bytes_of(&pool, "v@t", 7), 1 << 20);
    drop(writer);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_daemon_that_dies_during_the_flush_ends_the_command() {
    let _quiet = NoWriteback::begin();
    let pool = Pool::on_ram_disk("dying");
    let device = pool.volume("v", "64M");
    let writer = write_buffered(&device, 7);
    let held = HeldBack::new(&pool, At::AnswerTo("devices"));
    let command = held.start_ctl(&pool, &["snapshot", &pool.target("v@s")]);
    held.await_command();
    pool.kill_daemon();
    held.let_go();
    let (code, said) = command.ends();
    pool.recover();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("ublkctl recover dying"), "{said}");
    // The flush that hung ends too, and its process with it.
    eventually("no process has the device but this test", || {
        let holders = try_shell(&format!(
            "for p in /proc/[0-9]*; do ls -l $p/fd 2>/dev/null | grep -q '{}$' && echo $p; done",
            device.path
        ));
        String::from_utf8_lossy(&holders.stdout).lines().count() == 1
    });
    pool.snapshot("v@t");
    assert_eq!(bytes_of(&pool, "v@t", 7), 1 << 20);
    drop(writer);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_that_somebody_has_frozen_is_no_obstacle_and_stays_frozen() {
    let pool = Pool::on_ram_disk("already");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    let written = write_file(&mount);
    shell(&format!("fsfreeze -f {}", mount.path));
    pool.snapshot("v@s");
    let said = pool.refused(1, &["snapshot", "--freeze", &pool.target("v@t")]);
    assert!(said.contains("frozen already"), "{said}");
    shell_fails(&format!("fsfreeze -f {}", mount.path));
    shell(&format!("fsfreeze -u {}", mount.path));
    assert_eq!(file_in_clone(&pool, "v@s"), written);
    mount.unmount();
    pool.check();
}
