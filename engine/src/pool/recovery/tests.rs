//! Opening after a crash, again and again: what was replayed stays in the journal until a checkpoint is due.

use crate::clock::ManualClock;
use crate::device::BlockBuf;
use crate::device::memory::{Call, Memory, now};
use crate::name::VolumePath;
use crate::pool::{Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions};
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Pba, PoolId, Timestamp};
use std::path::PathBuf;
use std::sync::Arc;

const BLOCKS: u64 = 8192;

fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

fn open(device: &Memory, ring: RingPlace) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: BLOCKS,
        ring,
        clock: Arc::new(ManualClock::default()),
    };
    Arc::new(now(Pool::open(device, options)).unwrap())
}

/// A pool with volumes of 64 blocks, closed.
fn make(device: &Memory, volumes: &[&str]) {
    let options = CreateOptions {
        name: "p".parse().unwrap(),
        id: PoolId([3; 16]),
        blocks: BLOCKS,
        created: Timestamp(1),
    };
    now(Pool::create(device, options)).unwrap();
    let pool = open(device, RingPlace::Nowhere);
    for name in volumes {
        let options = VolumeOptions {
            bytes: 64 * BLOCK_BYTES,
            sector_bytes: 4096,
            redirect: Redirect::Shared,
        };
        now(pool.create_volume(device, &name.parse().unwrap(), options)).unwrap();
    }
    now(pool.close(device)).unwrap();
}

fn write(device: &Memory, volume: &Attached, lba: u64, byte: u8) {
    let mut buffer = BlockBuf::zeroed(1);
    buffer.fill(byte);
    now(volume.write(device, lba * BLOCK_BYTES, &buffer)).unwrap();
}

fn read(device: &Memory, volume: &Attached, lba: u64) -> u8 {
    let mut buffer = BlockBuf::zeroed(1);
    now(volume.read(device, lba * BLOCK_BYTES, &mut buffer)).unwrap();
    assert!(buffer.iter().all(|byte| *byte == buffer[0]));
    buffer[0]
}

fn assert_whole(device: &Memory, pool: &Pool) {
    let report = now(pool.check(device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
}

#[test]
fn the_journal_goes_on_over_any_number_of_crashes() {
    let device = Memory::default();
    make(&device, &["v"]);
    for session in 0..6_u8 {
        let pool = open(&device, RingPlace::Nowhere);
        assert_eq!(pool.stats().checkpoints, 0, "opening waits for none");
        let v = pool.attach(&path("v"), false).unwrap();
        for before in 0..session {
            assert_eq!(read(&device, &v, before.into()), before + 1);
        }
        assert_eq!(read(&device, &v, 60), session.saturating_sub(1));
        now(pool.snapshot(&device, &[path(&format!("v@{session}"))])).unwrap();
        write(&device, &v, session.into(), session + 1);
        // The same block each time: replay must release what the session before had put there.
        write(&device, &v, 60, session);
        now(v.flush(&device)).unwrap();
        // What no flush covers is gone.
        write(&device, &v, 50, 9);
        drop((v, pool));
        device.cut_power();
    }
    let pool = open(&device, RingPlace::Nowhere);
    let v = pool.attach(&path("v"), false).unwrap();
    assert_eq!(read(&device, &v, 50), 0);
    v.detach();
    assert_whole(&device, &pool);
    for session in 0..6_u8 {
        let snapshot = pool.attach(&path(&format!("v@{session}")), true).unwrap();
        assert_eq!(read(&device, &snapshot, session.into()), 0);
        assert_eq!(read(&device, &snapshot, 60), session.saturating_sub(1));
    }
}

/// A ring in a folder for files that come and go, removed at the end.
struct RingFile(PathBuf);

impl RingFile {
    fn new() -> Self {
        let name = format!("blockfork-recovery-{}.ring", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn of_boot(&self, boot: u8) -> RingPlace {
        RingPlace::File {
            path: self.0.clone(),
            boot_id: [boot; 16],
        }
    }
}

impl Drop for RingFile {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs a mapped file")]
fn a_pool_that_is_opened_for_reading_says_how_much_the_ring_alone_has() {
    let device = Memory::default();
    make(&device, &["v"]);
    let file = RingFile::new();
    let pool = open(&device, file.of_boot(1));
    let v = pool.attach(&path("v"), false).unwrap();
    let look = |boot| {
        let options = OpenOptions {
            read_only: true,
            device_blocks: BLOCKS,
            ring: file.of_boot(boot),
            clock: Arc::new(ManualClock::default()),
        };
        let pool = Arc::new(now(Pool::open(&device, options)).unwrap());
        let v = pool.attach(&path("v"), true).unwrap();
        (pool.records_only_in_ring(), read(&device, &v, 1))
    };
    write(&device, &v, 1, 1);
    now(v.flush(&device)).unwrap();
    assert_eq!(look(1), (0, 1));
    // The block is in use already; the discard is a record, which no flush covers.
    now(v.discard(&device, BLOCK_BYTES, BLOCK_BYTES)).unwrap();
    assert_eq!(look(1), (1, 0));
    // A ring of another boot is stale.
    assert_eq!(look(2), (0, 1));
}

#[test]
#[cfg_attr(miri, ignore = "needs a mapped file")]
fn what_only_the_ring_had_survives_a_power_cut_after_opening() {
    let device = Memory::default();
    make(&device, &["v"]);
    let file = RingFile::new();
    let pool = open(&device, file.of_boot(1));
    let v = pool.attach(&path("v"), false).unwrap();
    write(&device, &v, 1, 1);
    now(v.flush(&device)).unwrap();
    write(&device, &v, 2, 2);
    // A kill, and a second one before anything was flushed.
    drop((v, pool));
    let pool = open(&device, file.of_boot(1));
    assert_eq!(pool.stats().checkpoints, 0, "opening waits for none");
    let v = pool.attach(&path("v"), false).unwrap();
    write(&device, &v, 3, 3);
    drop((v, pool));
    drop(open(&device, file.of_boot(1)));
    device.cut_power();
    let pool = open(&device, file.of_boot(2));
    let v = pool.attach(&path("v"), false).unwrap();
    for lba in 1..4_u8 {
        assert_eq!(read(&device, &v, lba.into()), lba);
    }
    v.detach();
    assert_whole(&device, &pool);
}

/// The blocks of the longest write since the last time that the device was asked.
fn longest_write(device: &Memory) -> (u64, u64) {
    let calls = device.take_calls();
    let writes = calls.iter().filter_map(|call| match call {
        Call::Write(pba, count) => Some((*pba, *count)),
        Call::Read(..) | Call::Flush | Call::Discard(..) | Call::Pause(_) => None,
    });
    writes.max_by_key(|(_, count)| *count).unwrap()
}

#[test]
fn nothing_follows_a_change_that_was_cut() {
    let device = Memory::default();
    let names: Vec<String> = (0..150).map(|number| format!("v{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    make(&device, &names);
    let pool = open(&device, RingPlace::Nowhere);
    let v = pool.attach(&path("v0"), false).unwrap();
    write(&device, &v, 0, 1);
    now(v.flush(&device)).unwrap();
    device.take_calls();
    // A change whose records take more than one block of the journal, the last of which a power cut tears.
    let snapshots: Vec<_> = names
        .iter()
        .map(|name| path(&format!("{name}@s")))
        .collect();
    now(pool.snapshot(&device, &snapshots)).unwrap();
    let (pba, count) = longest_write(&device);
    assert!(count > 1, "{count}");
    device.set_block(Pba(pba + count - 1), &[0; BLOCK_LEN]);
    drop((v, pool));
    for byte in 2..5 {
        let pool = open(&device, RingPlace::Nowhere);
        assert_eq!(pool.stats().checkpoints, u64::from(byte == 2));
        let listed = now(pool.list(&device)).unwrap();
        assert_eq!(listed.len(), names.len(), "no snapshot is there");
        let v = pool.attach(&path("v0"), false).unwrap();
        assert_eq!(read(&device, &v, 0), byte - 1);
        write(&device, &v, 0, byte);
        now(v.flush(&device)).unwrap();
        drop((v, pool));
        device.cut_power();
    }
    let pool = open(&device, RingPlace::Nowhere);
    assert_whole(&device, &pool);
}
