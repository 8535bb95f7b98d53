//! Pages and records whose checksums hold and whose content cannot be: an error or nothing, never a panic, never a
//! write outside the pool's data.

use blockfork::device::BlockBuf;
use blockfork::error::ErrorKind;
use blockfork_tests::fixture::{attach, open, pool, put, volume};
use blockfork_tests::sim_device::SimDevice;
use futures_lite::future::block_on;
use std::sync::mpsc::channel;
use std::time::Duration;

/// What reading one block may take at most, in calls to the device.
const CALLS_MAX: u64 = 1000;

fn seal(block: &mut [u8]) {
    block[4..8].fill(0);
    let crc = crc32fast::hash(block);
    block[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Changes every page of a kind and level, and seals it again.
fn change_pages(device: &SimDevice, kind: u8, level: u8, change: impl Fn(&mut [u8])) {
    let mut changed = 0;
    device.with_bytes(|bytes| {
        for block in bytes.chunks_exact_mut(4096) {
            if block.starts_with(b"BFpg") && block[40..42] == [kind, level] {
                change(block);
                seal(block);
                changed += 1;
            }
        }
    });
    assert!(changed > 0, "no page of kind {kind}");
}

/// Changes every journal block whose first record makes a volume, and seals it again.
fn change_create_record(device: &SimDevice, change: impl Fn(&mut [u8])) {
    let mut changed = 0;
    device.with_bytes(|bytes| {
        for block in bytes.chunks_exact_mut(4096) {
            if block.starts_with(b"BFjb") && block[67] == 3 {
                change(block);
                seal(block);
                changed += 1;
            }
        }
    });
    assert_eq!(changed, 1);
}

/// A closed pool with a volume that maps something.
fn closed() -> SimDevice {
    let (device, pool) = pool(8192);
    let attached = volume(&device, &pool, "a", 2048);
    put(&device, &attached, 0, 8, 1).unwrap();
    drop(attached);
    block_on(pool.close(&device)).unwrap();
    device
}

/// Does with the pool what a user would; nothing may panic.
fn use_it(device: &SimDevice) {
    let Ok(pool) = open(device) else { return };
    let _status = pool.status();
    let _listed = block_on(pool.list(device)).is_ok();
    let _maintained = block_on(pool.maintain(device)).is_ok();
    if let Ok(attached) = pool.attach(&"a".parse().unwrap(), false) {
        let _written = put(device, &attached, 0, 1, 0x77).is_ok();
        let _flushed = block_on(attached.flush(device)).is_ok();
    }
    let _closed = block_on(pool.close(device)).is_ok();
    if let Ok(pool) = open(device) {
        let _checked = block_on(pool.check(device, &mut |_, _| {})).is_ok();
    }
}

#[test]
fn a_catalog_slot_with_numbers_that_cannot_be() {
    for field in [8, 16, 24, 32, 40, 48] {
        let device = closed();
        change_pages(&device, 5, 0, |page| {
            page[64 + field..64 + field + 8].fill(0xff)
        });
        use_it(&device);
    }
}

#[test]
fn a_removed_tree_whose_cursor_is_beyond_its_end() {
    let device = closed();
    change_pages(&device, 5, 0, |page| {
        page[64] = 3;
        page[67] = 0;
        page[64 + 16..64 + 24].fill(0xff);
    });
    use_it(&device);
}

#[test]
fn a_count_index_with_more_free_blocks_than_there_are() {
    let device = closed();
    change_pages(&device, 4, 1, |page| {
        for entry in page[64..64 + 5 * 16].chunks_exact_mut(16) {
            entry[6] = entry[6].max(1);
            entry[8..16].copy_from_slice(&1984_u64.to_le_bytes());
        }
    });
    use_it(&device);
}

#[test]
fn a_map_that_names_a_superblock_does_not_get_it_written() {
    let device = closed();
    change_pages(&device, 1, 0, |page| {
        page[72..78].copy_from_slice(&[8, 0, 0, 0, 0, 0])
    });
    use_it(&device);
    device.with_bytes(|bytes| assert_ne!(bytes[8 * 4096], 0x77));
}

/// Reads block 0 of the volume; nothing may panic.
fn read_it(device: &SimDevice) -> Option<ErrorKind> {
    let pool = open(device).unwrap();
    let attached = attach(&pool, "a");
    let mut buffer = BlockBuf::zeroed(1);
    // Who goes round in circles comes to an end too, with another error.
    device.fail_after(CALLS_MAX);
    let error = block_on(attached.read(device, 0, &mut buffer)).err();
    device.heal();
    error.map(|error| error.kind())
}

#[test]
fn a_map_page_that_is_its_own_child_is_damage() {
    let device = closed();
    change_pages(&device, 1, 1, |page| {
        let own: [[u8; 6]; 2] = [24, 32].map(|at| page[at..at + 6].try_into().unwrap());
        page[72..84].copy_from_slice(own.as_flattened());
    });
    assert_eq!(read_it(&device), Some(ErrorKind::Corrupt));
    use_it(&device);
}

#[test]
fn a_map_page_of_an_earlier_generation_is_damage() {
    for level in [0, 1] {
        let device = closed();
        change_pages(&device, 1, level, |page| page[32] -= 1);
        assert_eq!(read_it(&device), Some(ErrorKind::Corrupt), "level {level}");
        use_it(&device);
    }
}

#[test]
fn a_journal_record_with_numbers_that_cannot_be() {
    for field in [68, 76, 84] {
        let (device, pool) = pool(8192);
        drop(volume(&device, &pool, "a", 2048));
        drop(pool);
        change_create_record(&device, |block| block[field..field + 8].fill(0xff));
        use_it(&device);
        // What could be opened once can be opened again.
        if open(&device).is_ok() {
            let pool = open(&device).unwrap();
            drop(attach(&pool, "a"));
        }
    }
}

/// A closed pool with the largest volume there is and a snapshot of it, which differ. Every inner page names its one
/// child in all of its entries: 256 to the power of four ways down.
fn maze(leaves: impl Fn(&mut [u8])) -> SimDevice {
    let (device, pool) = pool(8192);
    let attached = volume(&device, &pool, "a", 1 << 38);
    put(&device, &attached, 0, 1, 1).unwrap();
    block_on(pool.snapshot(&device, &["a@s".parse().unwrap()])).unwrap();
    put(&device, &attached, 0, 2, 2).unwrap();
    drop(attached);
    block_on(pool.close(&device)).unwrap();
    for level in 1..=4 {
        change_pages(&device, 1, level, |page| {
            let child: [u8; 12] = page[72..84].try_into().unwrap();
            for entry in page[72..72 + 256 * 12].chunks_exact_mut(12) {
                entry.copy_from_slice(&child);
            }
        });
    }
    change_pages(&device, 1, 0, leaves);
    device
}

#[test]
fn a_map_whose_pages_all_name_one_page_is_walked_in_bounded_time() {
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        // Leaves that can be read, and such that cannot.
        for damaged in [false, true] {
            let device = maze(|page| {
                if damaged {
                    page[40] = 2;
                }
            });
            let pool = open(&device).unwrap();
            let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
            assert_eq!(report.exit_code(), 4);
            assert_eq!(report.unreadable.len(), if damaged { 2 } else { 0 });
            let listed = block_on(pool.list(&device)).unwrap();
            assert!(listed.iter().all(|entry| entry.unique_bytes <= 8192 * 4096));
            let (older, newer) = ("a@s".parse().unwrap(), "a".parse().unwrap());
            let differs = block_on(pool.diff(&device, &older, &newer));
            assert_eq!(differs.unwrap_err().kind(), ErrorKind::Corrupt);
            let removal = block_on(pool.remove(&device, &[newer], true, true)).unwrap();
            assert!(removal.freed_bytes.unwrap() <= 8192 * 4096);
        }
        done.send(()).unwrap();
    });
    let ended = is_done.recv_timeout(Duration::from_secs(120));
    assert!(ended.is_ok(), "a walk has no end: {ended:?}");
}
