//! A volume goes back to a snapshot in place; refused while somebody uses the device.

use std::fs::File;

use blockfork_tests::guest::{MIB, Pool, shell};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn rollback_is_refused_while_mounted_and_works_afterwards() {
    let pool = Pool::on_ram_disk("rollback");
    let device = pool.volume("v", "128M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    shell(&format!(
        "dd if=/dev/urandom of={}/file bs=1M count=8 status=none",
        mount.path
    ));
    let before = shell(&format!("sha256sum < {}/file", mount.path));
    mount.unmount();
    pool.snapshot("v@old");
    let mount = device.mount("noatime");
    shell(&format!("echo changed > {}/file && sync", mount.path));
    pool.snapshot("v@new");

    let said = pool.refused(1, &["rollback", &pool.target("v@old")]);
    assert!(
        said.contains(&mount.path),
        "it does not say where it is mounted: {said}"
    );
    assert_eq!(shell(&format!("cat {}/file", mount.path)), "changed");
    mount.unmount();

    pool.ctl(&["rollback", &pool.target("v@old")]);
    let mount = device.mount("noatime");
    assert_eq!(shell(&format!("sha256sum < {}/file", mount.path)), before);
    mount.unmount();
    shell(&format!("e2fsck -fn {}", device.path));
    // The newer snapshot is still there, and one can go forward again.
    pool.ctl(&["rollback", &pool.target("v@new")]);
    let mount = device.mount("noatime");
    assert_eq!(shell(&format!("cat {}/file", mount.path)), "changed");
    mount.unmount();
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn rollback_is_refused_while_a_process_holds_the_device_open() {
    let pool = Pool::on_ram_disk("held");
    let device = pool.volume("v", "32M");
    device.fill(0, MIB, 1);
    pool.snapshot("v@s");
    device.fill(0, MIB, 2);
    let holder = File::open(&device.path).unwrap();
    pool.refused(1, &["rollback", &pool.target("v@s")]);
    assert!(
        device.holds(0, MIB, 2),
        "a refused rollback changed the volume"
    );
    drop(holder);
    pool.ctl(&["rollback", &pool.target("v@s")]);
    assert!(device.holds(0, MIB, 1));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn no_reader_sees_cached_pages_of_before_a_rollback() {
    let pool = Pool::on_ram_disk("cached");
    let device = pool.volume("v", "32M");
    device.fill(0, 8 * MIB, 1);
    let before = shell(&format!("sha256sum < {}", device.path));
    pool.snapshot("v@s");
    device.fill(2 * MIB, 2 * MIB, 2);
    assert_ne!(shell(&format!("sha256sum < {}", device.path)), before);
    pool.ctl(&["rollback", &pool.target("v@s")]);
    assert_eq!(shell(&format!("sha256sum < {}", device.path)), before);
    pool.check();
}
