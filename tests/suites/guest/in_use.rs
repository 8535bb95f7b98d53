//! A device that somebody has is never taken away or rolled back, whoever it is and however the device was opened.

#![expect(unsafe_code, reason = "a mapping of a device is unsafe by its nature")]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use blockfork_tests::guest::{Background, Device, MIB, Mount, Pool, eventually, shell, try_shell};

/// The volume's device is held: neither `detach` nor `rollback` to `v@s` takes it, and both say why.
#[track_caller]
fn is_refused(pool: &Pool, why: &str) {
    let target = pool.target("v");
    let snapshot = pool.target("v@s");
    for words in [
        &["detach", &target] as &[&str],
        &["detach", "--force", &target],
        &["rollback", &snapshot],
    ] {
        let said = pool.refused(1, words);
        assert!(said.contains(why), "{words:?} does not say {why}: {said}");
    }
}

/// This process, as a refusal names it.
fn this_process() -> String {
    format!("process {} (", std::process::id())
}

/// Whether a process claims a device.
fn is_claiming() -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.into_iter().any(|line| {
        let mut words = line.split(|byte| *byte == 0);
        words.nth(1) == Some(b"claim-device")
    })
}

/// How many lines the kernel's log has.
fn kernel_log() -> usize {
    shell("dmesg").lines().count()
}

/// Nobody lost a device since the kernel's log had so many lines.
#[track_caller]
fn no_io_errors_since(line: usize) {
    let log = shell("dmesg");
    let faults = [
        "I/O error",
        "Aborting journal",
        "EXT4-fs error",
        "shut down requested",
        "lost async page write",
    ];
    let is_fault = |line: &&str| faults.iter().any(|fault| line.contains(fault));
    let found: Vec<_> = log.lines().skip(line).filter(is_fault).collect();
    assert!(found.is_empty(), "{found:#?}");
}

/// A device with an ext4 and a snapshot of it.
fn formatted(pool: &Pool) -> Device {
    let device = pool.volume("v", "64M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    pool.snapshot("v@s");
    device
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_of_a_lazily_unmounted_file_system_keeps_the_device() {
    let pool = Pool::on_ram_disk("lazy");
    let device = formatted(&pool);
    let mount = device.mount("noatime");
    let mut file = File::create(format!("{}/file", mount.path)).unwrap();
    shell(&format!("umount -l {}", mount.path));
    is_refused(&pool, &this_process());
    file.write_all(b"still here").unwrap();
    file.sync_all().unwrap();
    drop(file);
    pool.detach("v");
    let device = pool.attach("v");
    shell(&format!("e2fsck -fp {}", device.path));
    let mount = device.mount("noatime");
    assert_eq!(shell(&format!("cat {}/file", mount.path)), "still here");
    mount.unmount();
    pool.check();
}

/// A mount namespace that only a file keeps.
struct Kept;

impl Kept {
    const FOLDER: &str = "/run/namespaces";

    /// Makes the namespace, and mounts the device in it.
    fn with_mount(device: &Device) -> Self {
        let folder = Self::FOLDER;
        shell(&format!(
            "mkdir -p {folder} /mnt/inside && mount --bind {folder} {folder} && mount --make-private {folder} \
             && touch {folder}/kept && unshare --mount={folder}/kept sh -c \
             'mount --make-rprivate / && mount {} /mnt/inside'",
            device.path
        ));
        Self
    }

    fn run(&self, line: &str) -> String {
        shell(&format!(
            "nsenter --mount={}/kept sh -c '{line}'",
            Self::FOLDER
        ))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(try_shell(&format!(
            "umount {0}/kept; umount {0}; rmdir /mnt/inside",
            Self::FOLDER
        )));
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_mount_namespace_without_a_process_keeps_the_device() {
    let pool = Pool::on_ram_disk("namespace");
    let device = formatted(&pool);
    let kept = Kept::with_mount(&device);
    is_refused(&pool, "in use by a mount that no process shows");
    assert_eq!(
        kept.run("echo hi > /mnt/inside/file && sync && cat /mnt/inside/file"),
        "hi"
    );
    drop(kept);
    pool.detach("v");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_node_made_elsewhere_and_opened_keeps_the_device() {
    let pool = Pool::on_ram_disk("node");
    let device = pool.volume("v", "64M");
    device.fill(0, MIB, 1);
    pool.snapshot("v@s");
    let jail = Mount::tmpfs("jail", "1M");
    let number = device.attribute("dev").replace(':', " ");
    let node = format!("{}/rootfs", jail.path);
    shell(&format!("mknod {node} b {number}"));
    let mut disk = File::options().read(true).write(true).open(&node).unwrap();
    // What a virtual machine monitor's jail does next: nothing outside leads to the node any more.
    fs::remove_file(&node).unwrap();
    is_refused(&pool, &this_process());
    disk.write_all(&[7; 4096]).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    pool.ctl(&["rollback", &pool.target("v@s")]);
    assert!(device.holds(0, MIB, 1));
    pool.detach("v");
    jail.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_mapping_without_a_descriptor_keeps_the_device() {
    let pool = Pool::on_ram_disk("mapping");
    let device = pool.volume("v", "64M");
    device.fill(0, MIB, 1);
    pool.snapshot("v@s");
    device.fill(0, MIB, 2);
    let file = File::open(&device.path).unwrap();
    // SAFETY: nobody but this test has the device, so nothing changes below the mapping.
    let mapping = unsafe { memmap2::MmapOptions::new().len(4096).map(&file) }.unwrap();
    drop(file);
    let before = mapping[0];
    is_refused(&pool, &format!("mapped by {}", this_process()));
    assert!(device.holds(0, MIB, 2), "a refused rollback was one");
    assert_eq!(mapping[0], before);
    drop(mapping);
    pool.ctl(&["rollback", &pool.target("v@s")]);
    assert!(device.holds(0, MIB, 1));
    pool.detach("v");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_loop_device_over_a_node_made_elsewhere_keeps_the_device() {
    let pool = Pool::on_ram_disk("looped");
    let device = pool.volume("v", "64M");
    pool.snapshot("v@s");
    let number = device.attribute("dev").replace(':', " ");
    shell(&format!("mknod /run/other b {number}"));
    let over = shell("losetup -f --show /run/other");
    shell("rm /run/other");
    is_refused(
        &pool,
        &format!("part of {}", over.trim_start_matches("/dev/")),
    );
    shell(&format!("losetup -d {over}"));
    pool.detach("v");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn mounts_beside_attach_and_detach_never_lose_their_device() {
    let pool = Pool::on_ram_disk("beside");
    formatted(&pool);
    pool.detach("v");
    // The daemon stays for this one, so each attach finds it at once.
    pool.volume("w", "16M");
    shell("mkdir -p /mnt/beside");
    let before = kernel_log();
    let link = format!("/dev/blockfork/{}", pool.target("v"));
    let loop_of_mounts = format!(
        "sh -c 'while :; do if mount -o noatime {link} /mnt/beside 2>/dev/null; then \
         echo x > /mnt/beside/x && sync /mnt/beside/x || touch /run/beside.lost; umount /mnt/beside; fi; done'"
    );
    let mut mounts = Background::start(&loop_of_mounts);
    for _ in 0..15 {
        drop(pool.attach("v"));
        eventually("the device was detached between two mounts", || {
            pool.try_ctl(&["detach", &pool.target("v")])
                .status
                .success()
        });
    }
    assert!(mounts.is_running());
    drop(mounts);
    // The loop may have been ended between its mount and its unmount.
    drop(try_shell("umount /mnt/beside"));
    assert!(
        fs::remove_file("/run/beside.lost").is_err(),
        "a file system lost its device"
    );
    no_io_errors_since(before);
    shell("rmdir /mnt/beside");
    let device = pool.attach("v");
    shell(&format!("e2fsck -fn {}", device.path));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_daemon_that_can_open_no_file_takes_no_device_away() {
    let pool = Pool::on_ram_disk("descriptors");
    let device = formatted(&pool);
    let mount = device.mount("noatime");
    let daemon = pool.daemon().unwrap();
    let limits = format!("/proc/{daemon}/limits");
    let limit = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("Max open files"));
        let line = line.unwrap();
        let mut words = line.split_whitespace().skip(3);
        (
            words.next().unwrap().to_owned(),
            words.next().unwrap().to_owned(),
        )
    };
    let (soft, hard) = limit(&fs::read_to_string(limits).unwrap());
    assert_eq!(soft, hard, "the daemon left itself few descriptors");
    let open = fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
    let highest = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok());
    let highest = highest.max().unwrap();
    // From no descriptor but the connection's to a few: each way stops at another place.
    for spare in 2..8 {
        let few = highest + spare;
        shell(&format!("prlimit --pid {daemon} --nofile={few}:{hard}"));
        let detached = pool.try_ctl(&["detach", &pool.target("v")]);
        assert!(!detached.status.success(), "{spare} descriptors: detached");
        shell(&format!(
            "echo {spare} > {0}/file && sync {0}/file",
            mount.path
        ));
    }
    shell(&format!("prlimit --pid {daemon} --nofile={hard}:{hard}"));
    mount.unmount();
    pool.detach("v");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_device_without_a_daemon_is_not_taken_from_a_mount() {
    let folder = Mount::tmpfs("away", "256M");
    let pool = Pool::in_folder("away", &folder.path, "128M");
    let device = formatted(&pool);
    let mount = device.mount("noatime");
    pool.kill_daemon();
    // No daemon can take the device back, so `--force` gives it up; but not from under a file system.
    let (file, elsewhere) = (
        format!("{}/pool", folder.path),
        format!("{}/away", folder.path),
    );
    fs::rename(&file, &elsewhere).unwrap();
    let said = pool.try_ctl(&["detach", "--force", &pool.target("v")]);
    assert_eq!(said.status.code(), Some(1));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains(&mount.path), "{said}");
    fs::rename(&elsewhere, &file).unwrap();
    pool.recover();
    shell(&format!("echo hi > {0}/file && sync {0}/file", mount.path));
    mount.unmount();
    pool.kill_daemon();
    fs::rename(&file, &elsewhere).unwrap();
    pool.ctl(&["detach", "--force", &pool.target("v")]);
    assert!(!Path::new(&device.path).exists());
    fs::rename(&elsewhere, &file).unwrap();
    pool.check();
    drop(pool);
    folder.unmount();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn programs_that_only_have_a_look_are_waited_for() {
    let pool = Pool::on_ram_disk("brief");
    pool.create("v", "16M");
    pool.snapshot("v@s");
    let link = format!("/dev/blockfork/{}", pool.target("v"));
    let before = kernel_log();
    let mut looks = Background::start(&format!(
        "sh -c 'while :; do dd if={link} of=/dev/null bs=64k count=16 2>/dev/null; done'"
    ));
    for _ in 0..15 {
        drop(pool.attach("v"));
        pool.ctl(&["rollback", &pool.target("v@s")]);
        pool.detach("v");
    }
    assert!(looks.is_running());
    drop(looks);
    no_io_errors_since(before);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_program_that_closes_the_device_in_time_is_waited_for_and_its_writes_are_rolled_back() {
    let pool = Pool::on_ram_disk("closes");
    let device = pool.volume("v", "32M");
    device.fill(0, MIB, 1);
    pool.snapshot("v@s");
    // Dirty pages, and a close while the rollback waits.
    let mut disk = File::options().write(true).open(&device.path).unwrap();
    disk.write_all(&[9; 1 << 20]).unwrap();
    let rollback = pool.start_ctl(&["rollback", &pool.target("v@s")]);
    eventually("the rollback looks who has the device", is_claiming);
    drop(disk);
    rollback.succeeds();
    assert!(device.holds(0, MIB, 1), "the rollback was overwritten");
    pool.check();
}
