//! Devices that the kernel no longer has, or that no daemon knows: nothing is said of the first, and the second are not
//! attached again.

use blockfork_tests::guest::{Device, MIB, Pool, eventually, shell};
use std::fs;
use std::path::Path;

/// Takes the device of a killed daemon away, as somebody does who knows nothing of its pool.
#[track_caller]
fn delete_behind_its_back(pool: &Pool, device: &Device) {
    pool.kill_daemon();
    let stranger = Pool::in_file("stranger", "64M");
    eventually("the kernel lets go of the daemon", || {
        stranger
            .try_ctl(&["detach", "--force", &device.path])
            .status
            .success()
    });
    assert!(!Path::new(&device.path).exists());
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_device_that_the_kernel_has_no_more_is_dropped() {
    let pool = Pool::on_ram_disk("gone");
    let v = pool.volume("v", "32M");
    delete_behind_its_back(&pool, &v);

    let other = Pool::in_file("other", "64M");
    let w = other.volume("w", "16M");
    assert_eq!(v.path, w.path, "the number was not given away again");

    let shown = pool.ctl(&["list", pool.name(), "-H", "-o", "name,device"]);
    assert!(!shown.contains("/dev/"), "{shown}");
    let said = pool.refused(1, &["detach", &pool.target("v")]);
    assert!(said.contains("not attached"), "{said}");
    pool.ctl(&["recover", pool.name()]);
    pool.ctl(&["resize", &pool.target("v"), "64M"]);
    let again = pool.attach("v");
    assert_ne!(again.path, w.path);
    let shown = pool.ctl(&["list", pool.name(), "-H", "-o", "device"]);
    assert_eq!(shown, again.path);
    w.fill(0, MIB, 1);
    again.fill(0, MIB, 2);
    assert!(w.holds(0, MIB, 1) && again.holds(0, MIB, 2));
    other.check();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_daemon_that_starts_drops_what_the_kernel_has_no_more() {
    let pool = Pool::on_ram_disk("dropped");
    let v = pool.volume("v", "32M");
    pool.create("x", "32M");
    delete_behind_its_back(&pool, &v);
    let link = format!("/dev/blockfork/{}/v", pool.name());
    assert!(fs::symlink_metadata(&link).is_ok());
    // It gets the number, and the link of v must not lead there.
    let x = pool.attach("x");
    assert_eq!(x.path, v.path);
    assert!(fs::symlink_metadata(&link).is_err(), "{link} leads to x");
    let shown = pool.ctl(&["list", pool.name(), "-H", "-o", "name,device"]);
    assert_eq!(shown.matches(&x.path).count(), 1, "{shown}");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_whose_device_no_daemon_knows_is_not_attached_again() {
    let pool = Pool::on_ram_disk("stray");
    let v = pool.volume("v", "32M");
    v.fill(0, MIB, 1);
    pool.snapshot("v@s");
    pool.kill_daemon();
    fs::remove_file(pool.runtime_file("devices.json")).expect("the daemon notes its devices");

    let said = pool.refused(1, &["attach", &pool.target("v")]);
    assert!(
        said.contains(&v.path) && said.contains("detach --force"),
        "{said}"
    );
    // Other volumes, and the volume's own snapshots, are no business of that device.
    pool.attach("v@s");
    pool.detach("v@s");
    pool.ctl(&["detach", "--force", &v.path]);
    let again = pool.attach("v");
    assert!(again.holds(0, MIB, 1));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_whose_device_waits_for_a_daemon_is_not_shrunk() {
    let pool = Pool::on_ram_disk("waiting");
    let v = pool.volume("v", "64M");
    v.fill(32 * MIB, MIB, 1);
    pool.snapshot("v@s");
    let target = pool.target("v");
    let shrink = ["resize", &target, "16M", "--allow-shrink"];
    let refused = |words: &[&str], advice: &str| {
        let said = pool.refused(1, words);
        assert!(said.contains(&v.path) && said.contains(advice), "{said}");
    };
    let renamed = pool.target("w");
    let snapshot = pool.target("v@s");
    let commands: [&[&str]; 7] = [
        &shrink,
        &["rm", "-r", &target],
        &["rm", "-r", "-n", &target],
        &["rename", &target, &renamed],
        &["pool", "destroy", "--force", pool.name()],
        &["pool", "export", pool.name()],
        &["attach", &target],
    ];
    for words in commands {
        let advice = if words[0] == "attach" {
            "already"
        } else {
            "detach"
        };
        let said = pool.refused(1, words);
        assert!(said.contains(advice), "{said}");
    }
    pool.kill_daemon();
    for words in commands.iter().filter(|words| words[0] != "attach") {
        refused(words, "recover");
    }
    refused(&["rollback", &snapshot], "recover");
    refused(
        &["pool", "check", "--repair", "--yes", pool.name()],
        "recover",
    );

    // It may grow. Its device hears of that when somebody serves it again.
    let output = pool.try_ctl(&["resize", &target, "96M"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("recover"),
        "{said}"
    );
    pool.recover();
    assert!(
        v.holds(32 * MIB, MIB, 1),
        "the shrink that was refused took something"
    );
    let recovered = v.size();
    pool.ctl(&["resize", &target, "112M"]);
    // A kernel without UPDATE_SIZE shows each new size at the next attach.
    if v.size() == 112 * MIB {
        assert_eq!(recovered, 96 * MIB);
    } else {
        assert_eq!(recovered, 64 * MIB);
    }
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_daemon_whose_files_are_removed_puts_them_back() {
    let pool = Pool::on_ram_disk("removed");
    let v = pool.volume("v", "32M");
    v.fill(0, 4 * MIB, 1);
    pool.snapshot("v@s");
    let watch = pool.watch();
    let is_there = |suffix: &str| pool.runtime_file(suffix).exists();
    for _ in 0..2 {
        let daemon = pool.daemon().expect("the daemon has a pid file");
        // The daemon may be putting back what is gone already.
        eventually("the daemon's files go", || {
            fs::remove_dir_all(pool.runtime_folder()).is_ok()
        });
        eventually("the daemon's files are back", || {
            ["ring", "devices.json", "pid", "sock"]
                .iter()
                .all(|suffix| is_there(suffix))
        });
        assert_eq!(pool.daemon(), Some(daemon));
        pool.ctl(&["list", pool.name()]);
    }
    eventually("it is told", || watch.read().contains("somebody removed"));
    // Redirected, acknowledged, and in the new ring only.
    shell(&format!(
        "dd if=/dev/urandom of=/run/new bs=1M count=4 status=none && dd if=/run/new of={} bs=64k oflag=direct conv=notrunc status=none",
        v.path
    ));
    pool.kill_daemon();
    pool.recover();
    assert_eq!(
        v.bytes(0, 4 * MIB),
        fs::read("/run/new").unwrap(),
        "an acknowledged write is lost"
    );
    fs::remove_file("/run/new").unwrap();
    pool.check();
}
