//! `snapshot --freeze`: file systems are frozen for the moment of the snapshot, and thawed whatever happens.

use std::path::Path;

use blockfork_tests::guest::{Background, Device, Mount, Pool, shell, shell_fails};
use blockfork_tests::held_back::{At, HeldBack};

fn ext4(pool: &Pool, name: &str) -> (Device, Mount) {
    let device = pool.volume(name, "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    (device, mount)
}

/// Writes a file without a flush; its checksum.
fn write_file(mount: &Mount) -> String {
    shell(&format!(
        "dd if=/dev/urandom of={0}/file bs=1M count=8 status=none && sha256sum < {0}/file",
        mount.path
    ))
}

/// Whether an ext4 has to replay its journal.
fn needs_recovery(device: &Device) -> bool {
    shell(&format!("dumpe2fs -h {} 2>&1", device.path)).contains("needs_recovery")
}

/// Writes to a file system; waits for as long as it is frozen.
#[track_caller]
fn await_thaw(mount: &Mount) {
    shell(&format!("echo thawed > {}/thawed", mount.path));
}

/// A file system that is frozen cannot be frozen a second time.
#[track_caller]
fn is_frozen(mount: &Mount) {
    let said = shell_fails(&format!("fsfreeze -f {}", mount.path));
    assert!(said.contains("busy"), "{said}");
}

#[track_caller]
fn is_not_frozen(mount: &Mount) {
    shell(&format!("fsfreeze -f {0} && fsfreeze -u {0}", mount.path));
}

fn snapshots(pool: &Pool) -> usize {
    let list = pool.ctl(&["list", "-H", "-o", "type", pool.name()]);
    list.lines().filter(|kind| *kind == "snapshot").count()
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_frozen_ext4_has_a_clean_journal_and_mounts_read_only() {
    let pool = Pool::on_ram_disk("frozen4");
    let (_, mount) = ext4(&pool, "v");
    let load = Background::start(&format!(
        "sh -c 'while :; do echo x >> {}/log; done'",
        mount.path
    ));
    let written = write_file(&mount);
    pool.snapshot("v@flushed");
    pool.ctl(&["snapshot", "--freeze", &pool.target("v@frozen")]);
    is_not_frozen(&mount);
    drop(load);
    assert!(
        needs_recovery(&pool.attach("v@flushed")),
        "without a freeze the journal of a mounted ext4 is in use"
    );
    let snapshot = pool.attach("v@frozen");
    assert!(!needs_recovery(&snapshot));
    let copy = snapshot.mount("ro");
    assert_eq!(shell(&format!("sha256sum < {}/file", copy.path)), written);
    copy.unmount();
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_frozen_xfs_is_complete_without_its_log() {
    let pool = Pool::on_ram_disk("frozenx");
    let device = pool.volume("v", "400M");
    shell(&format!("mkfs.xfs -q {}", device.path));
    let mount = device.mount("noatime");
    let written = write_file(&mount);
    shell(&format!("mkdir {0}/a && mv {0}/file {0}/a", mount.path));
    pool.ctl(&["snapshot", "--freeze=20", &pool.target("v@s")]);
    is_not_frozen(&mount);
    let snapshot = pool.attach("v@s");
    // The kernel keeps a record of the superblock in the log of a frozen XFS, so it asks for norecovery.
    let copy = snapshot.mount("ro,norecovery,nouuid");
    assert_eq!(shell(&format!("sha256sum < {}/a/file", copy.path)), written);
    copy.unmount();
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn file_systems_on_one_another_are_frozen_and_thawed() {
    let pool = Pool::on_ram_disk("tower");
    let (_, lower) = ext4(&pool, "v");
    let (_, second) = ext4(&pool, "w");
    let image = format!("{}/image", lower.path);
    shell(&format!("truncate -s 64M {image} && mkfs.ext4 -q {image}"));
    shell(&format!(
        "modprobe loop || true; mkdir -p /mnt/tower && mount -o loop,noatime {image} /mnt/tower"
    ));
    let upper = Mount {
        path: String::from("/mnt/tower"),
    };
    let written = write_file(&upper);
    pool.ctl(&[
        "snapshot",
        "--freeze",
        &pool.target("v@s"),
        &pool.target("w@s"),
    ]);
    for mount in [&upper, &lower, &second] {
        await_thaw(mount);
    }
    let snapshot = pool.attach("v@s");
    assert!(!needs_recovery(&snapshot));
    assert!(!needs_recovery(&pool.attach("w@s")));
    let copy = snapshot.mount("ro");
    shell(&format!(
        "mkdir -p /mnt/inner && mount -o loop,ro {}/image /mnt/inner",
        copy.path
    ));
    let inner = Mount {
        path: String::from("/mnt/inner"),
    };
    assert_eq!(shell(&format!("sha256sum < {}/file", inner.path)), written);
    for mount in [inner, copy, upper, lower, second] {
        mount.unmount();
    }
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_command_that_is_killed_thaws() {
    let pool = Pool::on_ram_disk("killed");
    let (_, mount) = ext4(&pool, "v");
    let held = HeldBack::new(&pool, At::Request("snapshot"));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze=600", &pool.target("v@s")]);
    held.await_command();
    is_frozen(&mount);
    command.kill();
    await_thaw(&mount);
    assert_eq!(snapshots(&pool), 0);
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_signal_to_the_command_and_its_guard_thaws() {
    let pool = Pool::on_ram_disk("signals");
    let (_, mount) = ext4(&pool, "v");
    let held = HeldBack::new(&pool, At::Request("snapshot"));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze=600", &pool.target("v@s")]);
    held.await_command();
    let guards = command.children();
    assert_eq!(guards.len(), 1, "{guards:?}");
    // As at a shutdown: every process gets the signal.
    shell(&format!("kill -TERM {} {}", guards[0], command.pid()));
    let (code, _) = command.ends();
    assert_eq!(code, None, "a signal ends the command");
    await_thaw(&mount);
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_guard_that_is_killed_thaws_and_fails_the_command() {
    let pool = Pool::on_ram_disk("guard");
    let (_, mount) = ext4(&pool, "v");
    let held = HeldBack::new(&pool, At::Request("snapshot"));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze=600", &pool.target("v@s")]);
    held.await_command();
    is_frozen(&mount);
    let guards = command.children();
    assert_eq!(guards.len(), 1, "{guards:?}");
    shell(&format!("kill -KILL {}", guards[0]));
    await_thaw(&mount);
    held.let_go();
    let (code, said) = command.ends();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("is not one of frozen file systems"), "{said}");
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_snapshot_that_comes_after_the_time_limit_is_not_called_frozen() {
    let pool = Pool::on_ram_disk("late");
    let (_, mount) = ext4(&pool, "v");
    let held = HeldBack::new(&pool, At::Request("snapshot"));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze=1", &pool.target("v@s")]);
    held.await_command();
    await_thaw(&mount);
    held.let_go();
    let (code, said) = command.ends();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("thawed after 1 s"), "{said}");
    assert!(said.contains("is not one of frozen file systems"), "{said}");
    assert_eq!(snapshots(&pool), 1);
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_thawed_by_somebody_else_is_not_called_frozen() {
    let pool = Pool::on_ram_disk("thawed");
    let (_, mount) = ext4(&pool, "v");
    let held = HeldBack::new(&pool, At::Request("snapshot"));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze=600", &pool.target("v@s")]);
    held.await_command();
    shell(&format!("fsfreeze -u {}", mount.path));
    held.let_go();
    let (code, said) = command.ends();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("somebody else thawed it"), "{said}");
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn nothing_is_frozen_if_one_file_system_cannot_be() {
    let pool = Pool::on_ram_disk("refused");
    let (_, first) = ext4(&pool, "v");
    let (_, second) = ext4(&pool, "w");
    shell(&format!("fsfreeze -f {}", second.path));
    let targets = [pool.target("v@s"), pool.target("w@s")];
    let said = pool.refused(1, &["snapshot", "--freeze", &targets[0], &targets[1]]);
    assert!(said.contains(&second.path), "{said}");
    await_thaw(&first);
    is_frozen(&second);
    assert_eq!(snapshots(&pool), 0);
    shell(&format!("fsfreeze -u {}", second.path));
    first.unmount();
    second.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_without_a_file_system_is_flushed_and_that_is_said() {
    let pool = Pool::on_ram_disk("bare");
    let (_, mount) = ext4(&pool, "v");
    pool.volume("w", "32M");
    let targets = [pool.target("v@s"), pool.target("w@s")];
    let output = pool.try_ctl(&["snapshot", "--freeze", &targets[0], &targets[1]]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("bare/w: no file system"), "{said}");
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_that_the_daemon_writes_to_is_not_frozen() {
    let pool = Pool::on_ram_disk("needed");
    let (_, mount) = ext4(&pool, "v");
    let folder = format!("{}/run", mount.path);
    let held = HeldBack::in_folder(&pool, At::Request("nothing"), Path::new(&folder));
    let command = held.start_ctl(&pool, &["snapshot", "--freeze", &pool.target("v@s")]);
    let (code, said) = command.ends();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("runtime directory"), "{said}");
    is_not_frozen(&mount);
    assert_eq!(snapshots(&pool), 0);
    drop(held);
    mount.unmount();
    pool.check();
}
