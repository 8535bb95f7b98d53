//! The pool's file is deleted under a mounted file system: what the daemon says to do saves it, and the mount goes on.

use blockfork_tests::guest::{Background, Mount, Pool, eventually, shell};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_pool_whose_file_was_deleted_goes_on_from_the_copy() {
    let below = Mount::tmpfs("misplaced", "512M");
    let pool = Pool::in_folder("misplaced", &below.path, "128M");
    let device = pool.volume("v", "64M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("defaults");
    shell(&format!(
        "head -c 16777216 /dev/urandom > {0}/a && sync && sha256sum < {0}/a > {1}/sum",
        mount.path, below.path
    ));
    let watch = pool.watch();
    shell(&format!("rm {}/pool", below.path));
    eventually("the watch tells", || watch.read().contains("was deleted"));
    let status = pool.ctl(&["pool", "status", pool.name()]);
    let warning = status.lines().find(|line| line.contains("was deleted"));
    let line = warning.and_then(|line| line.split('`').nth(1));
    let line = line.expect("a shell line");
    // Somebody writes all the time, and what was written is not on the device yet.
    let writer = Background::start(&format!(
        "sh -c 'for i in $(seq 200); do head -c 65536 /dev/urandom > {0}/w$i; sync {0}/w$i; done'",
        mount.path
    ));
    shell(&format!(
        "head -c 8388608 /dev/zero | tr '\\0' x > {}/b",
        mount.path
    ));
    pool.shell(line);
    writer.succeeds();
    shell(&format!(
        "[ \"$(sha256sum < {0}/a)\" = \"$(cat {1}/sum)\" ]",
        mount.path, below.path
    ));
    shell(&format!(
        "[ $(tr -d x < {0}/b | wc -c) = 0 ] && [ $(wc -c < {0}/b) = 8388608 ]",
        mount.path
    ));
    shell(&format!("ls {}/pool", below.path));
    let status = pool.ctl(&["pool", "status", pool.name()]);
    assert!(!status.contains("was deleted"), "{status}");
    drop(mount);
    shell(&format!("e2fsck -fn {}", device.path));
    pool.check();
}
