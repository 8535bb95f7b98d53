//! ext4, xfs and btrfs: make, mount, write, sync, unmount, check, mount again, compare.

use blockfork_tests::guest::{Device, Pool, shell};

fn round_trip(pool: &'static str, make: &str, check: &str) {
    let pool = Pool::on_ram_disk(pool);
    let device = pool.volume("files", "320M");
    shell(&format!("{make} {}", device.path));
    let mount = device.mount("noatime");
    let folder = mount.path.clone();
    write_files(&folder);
    let before = sums(&folder);
    mount.unmount();
    fsck(check, &device);

    pool.detach("files");
    let device = pool.attach("files");
    let mount = device.mount("noatime");
    assert_eq!(
        sums(&folder),
        before,
        "the files differ after detach and attach"
    );
    shell(&format!(
        "rm -r {folder}/a && dd if=/dev/zero of={folder}/zeros bs=64k count=64 conv=fsync status=none"
    ));
    mount.unmount();
    fsck(check, &device);
    pool.check();
}

fn write_files(folder: &str) {
    shell(&format!(
        "cd {folder} && mkdir -p a/b c && for i in $(seq 60); do dd if=/dev/urandom of=a/b/$i bs=3k count=$i status=none; done \
         && dd if=/dev/urandom of=c/big bs=1M count=24 conv=fsync status=none && truncate -s 8M c/sparse && ln c/big c/link && sync"
    ));
}

fn sums(folder: &str) -> String {
    shell(&format!(
        "cd {folder} && find . -type f -exec sha256sum {{}} + | LC_ALL=C sort -k 2"
    ))
}

fn fsck(check: &str, device: &Device) {
    shell(&format!("{check} {}", device.path));
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn ext4_keeps_its_files() {
    round_trip("ext4", "mkfs.ext4 -q", "e2fsck -fn");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn xfs_keeps_its_files() {
    round_trip("xfs", "mkfs.xfs -q", "xfs_repair -n");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn btrfs_keeps_its_files() {
    round_trip("btrfs", "mkfs.btrfs -q", "btrfs check");
}
