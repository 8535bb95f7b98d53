//! Devices come, serve a load, grow and go; what would hurt somebody is refused.

use blockfork_tests::guest::{MIB, Pool, shell, shell_fails};

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn fio_reads_back_what_it_wrote() {
    let pool = Pool::on_ram_disk("load");
    let device = pool.volume("v", "128M");
    shell(&device.fio("--rw=randrw --bsrange=4k-64k --iodepth=32 --size=96M"));
    pool.snapshot("v@s");
    shell(&device.fio("--rw=randwrite --bs=4k --iodepth=32 --size=48M --fdatasync=64"));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn memory_aligned_to_a_sector_serves_for_direct_io() {
    let pool = Pool::on_ram_disk("alignment");
    let device = pool.volume("v", "128M");
    let alignment: u64 = device.attribute("queue/dma_alignment").parse().unwrap();
    assert!(alignment < 4096, "{alignment}");
    let load =
        "--rw=randrw --bsrange=4k-256k --iodepth=16 --size=64M --iomem_align=512 --mem=malloc";
    shell(&device.fio(load));
    pool.snapshot("v@s");
    shell(&device.fio(load));
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_with_512_byte_sectors_takes_single_sectors() {
    let pool = Pool::on_ram_disk("sectors");
    pool.ctl(&[
        "create",
        &pool.target("v"),
        "--size",
        "64M",
        "--sector-size",
        "512",
    ]);
    let device = pool.attach("v");
    assert_eq!(device.attribute("queue/logical_block_size"), "512");
    device.fill(0, 64 << 10, 1);
    pool.snapshot("v@s");
    let mut expected = device.bytes(0, 64 << 10);
    shell(&format!(
        "head -c 512 /dev/urandom > /run/sector && dd if=/run/sector of={} bs=512 seek=9 oflag=direct conv=notrunc status=none",
        device.path
    ));
    expected[9 * 512..10 * 512].copy_from_slice(&std::fs::read("/run/sector").unwrap());
    assert_eq!(
        device.bytes(0, 64 << 10),
        expected,
        "one sector of a shared block was written"
    );
    shell(&device.fio("--rw=randwrite --bs=512 --iodepth=16 --size=2M"));
    shell(&device.fio("--rw=randrw --bsrange=512-16k --blockalign=512 --iodepth=16 --size=8M"));
    let snapshot = pool.attach("v@s");
    assert!(snapshot.holds(0, 64 << 10, 1), "the snapshot changed");
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn the_default_sector_is_4096_and_flushes_are_asked_for() {
    let pool = Pool::on_ram_disk("limits");
    let device = pool.volume("v", "64M");
    assert_eq!(device.attribute("queue/logical_block_size"), "4096");
    assert_eq!(device.attribute("queue/write_cache"), "write back");
    assert_eq!(device.size(), 64 * MIB);
    assert_ne!(device.attribute("queue/discard_max_bytes"), "0");
    assert_ne!(device.attribute("queue/write_zeroes_max_bytes"), "0");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_grows_and_keeps_its_content() {
    let pool = Pool::on_ram_disk("grow");
    let device = pool.volume("v", "64M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    shell(&format!(
        "dd if=/dev/urandom of={}/file bs=1M count=16 conv=fsync status=none",
        mount.path
    ));
    let before = shell(&format!("sha256sum {}/file", mount.path));
    pool.ctl(&["resize", &pool.target("v"), "160M"]);
    // A kernel without UPDATE_SIZE shows the new size at the next attach.
    let (device, mount) = if device.size() == 160 * MIB {
        (device, mount)
    } else {
        mount.unmount();
        pool.detach("v");
        let device = pool.attach("v");
        let mount = device.mount("noatime");
        (device, mount)
    };
    assert_eq!(device.size(), 160 * MIB);
    shell(&format!("resize2fs {} 2>&1", device.path));
    assert_eq!(shell(&format!("sha256sum {}/file", mount.path)), before);
    shell(&format!(
        "dd if=/dev/urandom of={}/more bs=1M count=80 conv=fsync status=none",
        mount.path
    ));
    mount.unmount();
    shell(&format!("e2fsck -fn {}", device.path));
    pool.refused(2, &["resize", &pool.target("v"), "32M"]);
    pool.refused(1, &["resize", &pool.target("v"), "32M", "--allow-shrink"]);
    assert_eq!(device.size(), 160 * MIB);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn detach_is_refused_while_mounted() {
    let pool = Pool::on_ram_disk("busy");
    let device = pool.volume("v", "64M");
    shell(&format!("mkfs.ext4 -q {}", device.path));
    let mount = device.mount("noatime");
    let said = pool.refused(1, &["detach", &pool.target("v")]);
    assert!(
        said.contains(&mount.path),
        "it does not say where it is mounted: {said}"
    );
    shell(&format!("echo still here > {}/file && sync", mount.path));
    mount.unmount();
    pool.detach("v");
    assert!(
        !std::path::Path::new(&device.path).exists(),
        "{} is still there",
        device.path
    );
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn attaching_twice_is_refused_and_names_the_device() {
    let pool = Pool::on_ram_disk("twice");
    let device = pool.volume("v", "64M");
    let said = pool.refused(1, &["attach", &pool.target("v")]);
    assert!(
        said.contains(&device.path),
        "it does not name the device: {said}"
    );
    device.fill(0, MIB, 1);
    assert!(device.holds(0, MIB, 1));
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn many_devices_of_one_pool_keep_to_themselves() {
    let pool = Pool::on_ram_disk("many");
    let names: Vec<_> = (0..12).map(|number| format!("v{number}")).collect();
    let devices: Vec<_> = names.iter().map(|name| pool.volume(name, "16M")).collect();
    for (device, seed) in devices.iter().zip(1..) {
        device.fill(0, 4 * MIB, seed);
    }
    for (device, seed) in devices.iter().zip(1..) {
        assert!(
            device.holds(0, 4 * MIB, seed),
            "{} holds somebody else's bytes",
            device.path
        );
    }
    let link = format!("/dev/blockfork/{}", pool.target("v3"));
    assert_eq!(shell(&format!("readlink -f {link}")), devices[3].path);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_read_only_device_refuses_writes() {
    let pool = Pool::on_ram_disk("readonly");
    pool.create("v", "16M");
    let path = pool.ctl(&["attach", &pool.target("v"), "--read-only"]);
    assert_eq!(shell(&format!("blockdev --getro {path}")), "1");
    shell_fails(&format!(
        "dd if=/dev/zero of={path} bs=4k count=1 oflag=direct status=none"
    ));
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_pool_in_a_file_serves_as_well() {
    let pool = Pool::in_file("infile", "256M");
    let device = pool.volume("v", "64M");
    shell(&device.fio("--rw=randrw --bs=4k --iodepth=16 --size=16M"));
    pool.check();
}
