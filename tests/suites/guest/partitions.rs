//! The partitions of a device are those of its table, whenever a command has returned.

use std::os::unix::fs::FileExt;
use std::path::Path;

use blockfork_tests::guest::{Device, MIB, Pool, shell};

/// Writes a partition table with partitions of so many MiB, one after the other; none of them leaves the table empty.
fn partition(device: &Device, sizes: &[u32]) {
    let sector: u32 = device
        .attribute("queue/logical_block_size")
        .parse()
        .unwrap();
    let per_mib = (1 << 20) / sector;
    let mut table = [0_u8; 4096];
    let mut start = per_mib;
    for (entry, size) in table[446..510].chunks_exact_mut(16).zip(sizes) {
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&(size * per_mib).to_le_bytes());
        start += size * per_mib;
    }
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    let file = std::fs::File::options()
        .write(true)
        .open(&device.path)
        .unwrap();
    file.write_all_at(&table, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    shell(&format!("blockdev --rereadpt {}", device.path));
}

/// The sizes in MiB of the partitions that the kernel shows; each has its node.
#[track_caller]
fn partitions(device: &Device) -> Vec<u64> {
    let mut sizes = Vec::new();
    for number in 1.. {
        let name = format!("{}p{number}", device.path);
        let folder = name.replace("/dev/", "/sys/class/block/");
        let Ok(sectors) = std::fs::read_to_string(format!("{folder}/size")) else {
            break;
        };
        assert!(Path::new(&name).exists(), "{name}: no node");
        sizes.push(sectors.trim().parse::<u64>().unwrap() * 512 / MIB);
    }
    sizes
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn attach_returns_when_the_partitions_are_there() {
    let pool = Pool::on_ram_disk("parts");
    let device = pool.volume("v", "64M");
    partition(&device, &[16, 8, 4]);
    assert_eq!(partitions(&device), [16, 8, 4]);
    for _ in 0..30 {
        pool.detach("v");
        let device = pool.attach("v");
        assert_eq!(partitions(&device), [16, 8, 4]);
    }
    pool.kill_daemon();
    pool.recover();
    assert_eq!(partitions(&device), [16, 8, 4]);
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_rollback_brings_the_partitions_back() {
    let pool = Pool::on_ram_disk("repart");
    let device = pool.volume("v", "64M");
    pool.snapshot("v@empty");
    partition(&device, &[16, 8]);
    pool.snapshot("v@two");
    partition(&device, &[32, 8, 4]);
    assert_eq!(partitions(&device), [32, 8, 4]);
    pool.ctl(&["rollback", &pool.target("v@two")]);
    assert_eq!(partitions(&device), [16, 8]);
    pool.ctl(&["rollback", &pool.target("v@empty")]);
    assert!(partitions(&device).is_empty());
    // A partition that is in use keeps the device as the device itself does.
    pool.ctl(&["rollback", &pool.target("v@two")]);
    let part = std::fs::File::open(format!("{}p2", device.path)).unwrap();
    let said = pool.refused(1, &["rollback", &pool.target("v@empty")]);
    assert!(said.contains("opened by process"), "{said}");
    pool.refused(1, &["detach", &pool.target("v")]);
    assert_eq!(partitions(&device), [16, 8]);
    drop(part);
    pool.check();
}
