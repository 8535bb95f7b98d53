//! Discard and write-zeroes: what they cover reads as zeros, what lies beside it stays.

use blockfork_tests::guest::{Device, MIB, Pool, shell};

const START: u64 = 3 * MIB + (4 << 10);
const LENGTH: u64 = 2 * MIB + (12 << 10);

/// Fills, zeroes a range in the middle, and looks at it and at its surroundings.
fn zeroes_exactly(device: &Device, command: &str) {
    device.fill(0, 16 * MIB, 7);
    let before = device.bytes(0, 16 * MIB);
    shell(command);
    let (start, end) = (
        usize::try_from(START).unwrap(),
        usize::try_from(START + LENGTH).unwrap(),
    );
    let after = device.bytes(0, 16 * MIB);
    assert!(
        after[start..end].iter().all(|byte| *byte == 0),
        "{command}: the range is not zero"
    );
    assert_eq!(
        after[..start],
        before[..start],
        "{command}: bytes in front of the range changed"
    );
    assert_eq!(
        after[end..],
        before[end..],
        "{command}: bytes behind the range changed"
    );
}

fn all_ways(pool: &'static str, with_snapshot: bool) {
    let pool = Pool::on_ram_disk(pool);
    let device = pool.volume("v", "32M");
    let path = &device.path;
    for (number, command) in [
        format!("blkdiscard -o {START} -l {LENGTH} {path}"),
        format!("blkdiscard -z -o {START} -l {LENGTH} {path}"),
        format!("fallocate -p -o {START} -l {LENGTH} {path}"),
        format!("fallocate -z -o {START} -l {LENGTH} {path}"),
    ]
    .into_iter()
    .enumerate()
    {
        zeroes_exactly(&device, &command);
        if with_snapshot {
            device.fill(0, 16 * MIB, 8);
            let name = format!("v@s{number}");
            pool.snapshot(&name);
            zeroes_exactly(&device, &command);
            assert!(
                pool.attach(&name).holds(0, 16 * MIB, 8),
                "{command} changed the snapshot"
            );
            pool.detach(&name);
        }
    }
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    all_ways("ranges", false);
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_discard_of_shared_blocks_leaves_the_snapshot_alone() {
    all_ways("shared", true);
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_discarded_volume_gives_its_space_back() {
    let pool = Pool::on_ram_disk("give");
    let device = pool.volume("v", "64M");
    device.fill(0, 32 * MIB, 1);
    let used = || {
        pool.ctl(&["list", &pool.target("v"), "-H", "-p", "-o", "used"])
            .parse::<u64>()
            .unwrap()
    };
    assert!(used() >= 32 * MIB, "used is {}", used());
    shell(&format!("blkdiscard {}", device.path));
    assert!(used() < MIB, "used is {} after discarding all", used());
    assert!(device.is_zero(0, 64 * MIB));
    pool.check();
}
