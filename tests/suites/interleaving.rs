//! Requests of several queues, snapshots, removals and checkpoints at once, in an order that a seed decides.
//!
//! Each writer has blocks of its own and writes one after the other, each value once. So a snapshot must hold a prefix
//! of each writer's history: at least what was acknowledged before the snapshot was asked for, and nothing that was
//! submitted after it was there. After a power cut each block holds what the last flush covered, or something later.

use blockfork::clock::ManualClock;
use blockfork::device::BlockBuf;
use blockfork::name::{Name, VolumePath};
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use blockfork_tests::scheduler::{self, Task};
use blockfork_tests::sim_device::{Loss, SimDevice};
use fastrand::Rng;
use futures_lite::future::{block_on, yield_now};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;

const WRITERS: u64 = 4;
const BLOCKS_EACH: u64 = 12;
const WRITES: u64 = 60;

/// One writer's history: the block of each write, and how many were submitted, acknowledged and flushed.
#[derive(Debug, Default)]
struct History {
    blocks: RefCell<Vec<u64>>,
    submitted: Cell<usize>,
    acknowledged: Cell<usize>,
    flushed: Cell<usize>,
}

impl History {
    /// What each block holds after so many writes; write number n, from 1, writes the value n, or zeros.
    fn after(&self, count: usize) -> BTreeMap<u64, u64> {
        let blocks = self.blocks.borrow();
        (1..)
            .zip(blocks[..count].iter().copied())
            .map(|(value, lba)| (lba, held(value)))
            .collect()
    }
}

/// Every seventh request is a discard.
fn held(value: u64) -> u64 {
    if value.is_multiple_of(7) { 0 } else { value }
}

struct Snapshot {
    name: String,
    at_least: Vec<usize>,
    at_most: Vec<usize>,
}

fn path(volume: &str, snapshot: Option<&str>) -> VolumePath {
    VolumePath {
        volume: volume.parse().unwrap(),
        snapshot: snapshot.map(|name| name.parse().unwrap()),
    }
}

fn open(device: &SimDevice) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: device.blocks(),
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    };
    Arc::new(block_on(Pool::open(device, options)).unwrap())
}

/// Blocks of different writers alternate, so that they share leaves, and cross a leaf's end.
fn lba(writer: u64, block: u64) -> u64 {
    500 + block * WRITERS + writer
}

async fn write(
    device: SimDevice,
    attached: Arc<Attached>,
    history: &History,
    writer: u64,
    mut rng: Rng,
) {
    let mut buffer = BlockBuf::zeroed(1);
    for value in 1..=WRITES {
        let block = rng.u64(..BLOCKS_EACH);
        history.blocks.borrow_mut().push(block);
        history.submitted.set(history.submitted.get() + 1);
        let offset = lba(writer, block) * 4096;
        let done = if held(value) == 0 {
            attached.discard(&device, offset, 4096).await
        } else {
            buffer
                .chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
            attached.write(&device, offset, &buffer).await
        };
        if done.is_err() {
            return;
        }
        history.acknowledged.set(history.acknowledged.get() + 1);
        if rng.u8(..10) == 0 {
            let covered = history.acknowledged.get();
            if attached.flush(&device).await.is_err() {
                return;
            }
            history.flushed.set(covered);
        }
        yield_now().await;
    }
}

async fn read_block(device: &SimDevice, attached: &Attached, lba: u64) -> u64 {
    let mut buffer = BlockBuf::zeroed(1);
    attached
        .read(device, lba * 4096, &mut buffer)
        .await
        .unwrap();
    let value = u64::from_le_bytes(buffer[..8].try_into().unwrap());
    assert!(
        buffer.chunks_exact(8).all(|word| word == &buffer[..8]),
        "block {lba} is a mix"
    );
    value
}

async fn snapshots(
    device: SimDevice,
    pool: Arc<Pool>,
    histories: &[History],
    taken: &RefCell<Vec<Snapshot>>,
    mut rng: Rng,
) {
    for number in 0..8 {
        for _ in 0..rng.u32(..60) {
            yield_now().await;
        }
        let name = format!("s{number}");
        let at_least = histories
            .iter()
            .map(|history| history.acknowledged.get())
            .collect();
        if pool
            .snapshot(&device, &[path("v", Some(&name))])
            .await
            .is_err()
        {
            return;
        }
        let at_most = histories
            .iter()
            .map(|history| history.submitted.get())
            .collect();
        taken.borrow_mut().push(Snapshot {
            name,
            at_least,
            at_most,
        });
        // Removing and cloning go on beside.
        if rng.u8(..3) == 0 {
            let gone = taken.borrow_mut().remove(0);
            if pool
                .remove(&device, &[path("v", Some(&gone.name))], false, false)
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

async fn maintain(device: SimDevice, pool: Arc<Pool>, mut rng: Rng) {
    for _ in 0..30 {
        for _ in 0..rng.u32(..30) {
            yield_now().await;
        }
        let done = match rng.u8(..3) {
            0 => pool.checkpoint(&device).await,
            _ => pool.maintain(&device).await.map(|_| ()),
        };
        if done.is_err() {
            return;
        }
    }
}

fn check_snapshot(
    device: &SimDevice,
    pool: &Arc<Pool>,
    histories: &[History],
    snapshot: &Snapshot,
) {
    let attached = pool.attach(&path("v", Some(&snapshot.name)), true).unwrap();
    for (writer, history) in (0..).zip(histories) {
        let index = usize::try_from(writer).unwrap();
        let found: BTreeMap<u64, u64> = (0..BLOCKS_EACH)
            .map(|block| {
                (
                    block,
                    block_on(read_block(device, &attached, lba(writer, block))),
                )
            })
            .filter(|(_, value)| *value != 0)
            .collect();
        let is_prefix = (snapshot.at_least[index]..=snapshot.at_most[index]).any(|count| {
            let mut expected = history.after(count);
            expected.retain(|_, value| *value != 0);
            expected == found
        });
        assert!(
            is_prefix,
            "{}: writer {writer}: {found:?} is no prefix between {} and {}",
            snapshot.name, snapshot.at_least[index], snapshot.at_most[index]
        );
    }
}

fn run(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let device = SimDevice::new(8192);
    let options = CreateOptions {
        name: "p".parse().unwrap(),
        id: PoolId([7; 16]),
        blocks: 8192,
        created: Timestamp(1),
    };
    block_on(Pool::create(&device, options)).unwrap();
    let pool = open(&device);
    let name: Name = "v".parse().unwrap();
    let options = VolumeOptions {
        bytes: 4096 * 2048,
        sector_bytes: 4096,
        redirect: Redirect::Shared,
    };
    block_on(pool.create_volume(&device, &name, options)).unwrap();
    let attached = pool.attach(&path("v", None), false).unwrap();
    let histories: Vec<History> = (0..WRITERS).map(|_| History::default()).collect();
    let taken = RefCell::new(Vec::new());

    let mut tasks: Vec<Task<'_>> = Vec::new();
    for (writer, history) in (0..).zip(&histories) {
        tasks.push(Box::pin(write(
            device.clone(),
            Arc::clone(&attached),
            history,
            writer,
            rng.fork(),
        )));
    }
    tasks.push(Box::pin(snapshots(
        device.clone(),
        Arc::clone(&pool),
        &histories,
        &taken,
        rng.fork(),
    )));
    tasks.push(Box::pin(maintain(
        device.clone(),
        Arc::clone(&pool),
        rng.fork(),
    )));
    let crashes = rng.bool();
    let turns = Cell::new(if crashes {
        rng.u32(100..6000)
    } else {
        u32::MAX
    });
    scheduler::run(tasks, &mut rng, || {
        turns.set(turns.get() - 1);
        turns.get() == 0
    });
    for snapshot in taken.borrow().iter() {
        check_snapshot(&device, &pool, &histories, snapshot);
    }
    if !crashes {
        for (writer, history) in (0..).zip(&histories) {
            for (block, value) in history.after(history.submitted.get()) {
                assert_eq!(
                    block_on(read_block(&device, &attached, lba(writer, block))),
                    value
                );
            }
        }
    }
    drop(attached);
    drop(pool);

    device.restart(Loss::Some, &mut rng);
    let pool = open(&device);
    for snapshot in taken.borrow().iter() {
        check_snapshot(&device, &pool, &histories, snapshot);
    }
    let attached = pool.attach(&path("v", None), false).unwrap();
    for (writer, history) in (0..).zip(&histories) {
        for block in 0..BLOCKS_EACH {
            let value = block_on(read_block(&device, &attached, lba(writer, block)));
            let base = history
                .after(history.flushed.get())
                .get(&block)
                .copied()
                .unwrap_or(0);
            let later = (1..)
                .zip(history.blocks.borrow().iter().copied())
                .collect::<Vec<(u64, u64)>>();
            let is_later = later[history.flushed.get()..]
                .iter()
                .any(|(number, at)| *at == block && held(*number) == value);
            assert!(
                value == base || is_later,
                "writer {writer} block {block}: {value} is older than its flush"
            );
        }
    }
    let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!((report.damage, report.leaked_blocks), (Vec::new(), 0));
}

#[test]
fn snapshots_under_load_are_points_in_time_and_survive_power_cuts() {
    let seeds = match std::env::var("BLOCKFORK_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("BLOCKFORK_SEED is a number");
            seed..seed + 1
        }
        Err(_) => {
            0..std::env::var("BLOCKFORK_SEEDS").map_or(500, |text| text.parse().expect("a number"))
        }
    };
    for seed in seeds {
        eprintln!(
            "replay: BLOCKFORK_SEED={seed} cargo test -p blockfork-tests --test interleaving"
        );
        run(seed);
    }
}
