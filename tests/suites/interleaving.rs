//! Requests of several queues, reads, snapshots, removals, growth and checkpoints at once, in an order that a seed
//! decides.
//!
//! Each writer has blocks of its own, on two volumes, and writes one after the other, each value once. So a snapshot of
//! both volumes must hold a prefix of each writer's history: at least what was acknowledged before the snapshot was
//! asked for, and nothing that was submitted after it was there. It never reads differently afterwards. A read sees what
//! was acknowledged before it began, or something later. After a power cut each block holds what the last flush
//! covered, or something later. In half of the runs the pool is nearly full, so that what is freed is used at once.

use blockfork::device::BlockBuf;
use blockfork::error::{ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::pool::{Attached, Pool};
use blockfork_tests::fixture::{open, pool, put, volume};
use blockfork_tests::parallel;
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
/// Blocks that a nearly full pool has left, beyond those kept for metadata.
const LEFT: u64 = 150;
/// How often a writer tries again where the pool is full.
const TRIES: u32 = 200;
const VOLUMES: [&str; 2] = ["v", "w"];

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
    /// What it read as when it was there.
    first_seen: Vec<BTreeMap<u64, u64>>,
}

fn path(volume: &str, snapshot: Option<&str>) -> VolumePath {
    VolumePath {
        volume: volume.parse().unwrap(),
        snapshot: snapshot.map(|name| name.parse().unwrap()),
    }
}

/// The volumes by turns. Blocks of different writers alternate, so that they share leaves, and cross a leaf's end.
fn place(writer: u64, block: u64) -> (usize, u64) {
    let is_second = !block.is_multiple_of(2);
    (usize::from(is_second), 500 + block * WRITERS + writer)
}

async fn write(
    device: SimDevice,
    volumes: Vec<Arc<Attached>>,
    history: &History,
    writer: u64,
    mut rng: Rng,
) {
    let mut buffer = BlockBuf::zeroed(1);
    for value in 1..=WRITES {
        let block = rng.u64(..BLOCKS_EACH);
        history.blocks.borrow_mut().push(block);
        history.submitted.set(history.submitted.get() + 1);
        let (volume, lba) = place(writer, block);
        let (attached, offset) = (&volumes[volume], lba * 4096);
        buffer
            .chunks_exact_mut(8)
            .for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
        let mut tries = 0;
        loop {
            let done = if held(value) == 0 {
                attached.discard(&device, offset, 4096).await
            } else {
                attached.write(&device, offset, &buffer).await
            };
            match done {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::OutOfSpace && tries < TRIES => {
                    tries += 1;
                    yield_now().await;
                }
                Err(error) if error.kind() == ErrorKind::OutOfSpace => return,
                Err(error) => panic!("{error}"),
            }
        }
        history.acknowledged.set(history.acknowledged.get() + 1);
        if rng.u8(..10) == 0 {
            let covered = history.acknowledged.get();
            attached.flush(&device).await.unwrap();
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

/// Reads anybody's blocks while they change.
async fn read(device: SimDevice, volumes: Vec<Arc<Attached>>, histories: &[History], mut rng: Rng) {
    for _ in 0..100 {
        let (writer, block) = (rng.u64(..WRITERS), rng.u64(..BLOCKS_EACH));
        let history = &histories[usize::try_from(writer).unwrap()];
        let (volume, lba) = place(writer, block);
        let before = history.acknowledged.get();
        let value = read_block(&device, &volumes[volume], lba).await;
        let is_known = (before..=history.submitted.get())
            .any(|count| history.after(count).get(&block).copied().unwrap_or(0) == value);
        assert!(
            is_known,
            "writer {writer} block {block} reads {value}: older than what was acknowledged, or nobody wrote it"
        );
        for _ in 0..rng.u32(..10) {
            yield_now().await;
        }
    }
}

/// What a snapshot holds of each writer's blocks, without the zeros.
async fn read_snapshot(
    device: &SimDevice,
    pool: &Arc<Pool>,
    name: &str,
) -> Vec<BTreeMap<u64, u64>> {
    let volumes = VOLUMES.map(|volume| pool.attach(&path(volume, Some(name)), true).unwrap());
    let mut found = Vec::new();
    for writer in 0..WRITERS {
        let mut held = BTreeMap::new();
        for block in 0..BLOCKS_EACH {
            let (volume, lba) = place(writer, block);
            let value = read_block(device, &volumes[volume], lba).await;
            if value != 0 {
                held.insert(block, value);
            }
        }
        found.push(held);
    }
    found
}

fn of_both(name: &str) -> [VolumePath; 2] {
    VOLUMES.map(|volume| path(volume, Some(name)))
}

/// Whether it went well; a full pool may refuse it, and nothing else.
fn is_done<T>(result: Result<T>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::OutOfSpace => false,
        Err(error) => panic!("{error}"),
    }
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
        if !is_done(pool.snapshot(&device, &of_both(&name)).await) {
            return;
        }
        let at_most = histories
            .iter()
            .map(|history| history.submitted.get())
            .collect();
        let first_seen = read_snapshot(&device, &pool, &name).await;
        taken.borrow_mut().push(Snapshot {
            name,
            at_least,
            at_most,
            first_seen,
        });
        // Removing goes on beside.
        if rng.u8(..3) == 0 {
            let gone = taken.borrow_mut().remove(0);
            let removed = pool
                .remove(&device, &of_both(&gone.name), false, false)
                .await;
            if !is_done(removed) {
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
        let done = match rng.u8(..15) {
            0..5 => pool.checkpoint(&device).await,
            5 => {
                let blocks = device.blocks() + rng.u64(1..400);
                device.grow(blocks);
                pool.grow(&device, blocks).await
            }
            _ => pool.maintain(&device).await.map(|_| ()),
        };
        if !is_done(done) {
            return;
        }
    }
}

/// Takes runs of blocks and gives them back, over and over: what somebody else used must not shine through.
async fn churn(device: SimDevice, attached: Arc<Attached>, mut rng: Rng) {
    let mut buffer = BlockBuf::zeroed(32);
    for value in 0..12_u64 {
        buffer.fill(0x80 | u8::try_from(value).unwrap());
        let expected = u64::from_le_bytes(buffer[..8].try_into().unwrap());
        if is_done(attached.write(&device, 0, &buffer).await) {
            for _ in 0..rng.u32(..20) {
                yield_now().await;
            }
            let at = rng.u64(..32);
            assert_eq!(
                read_block(&device, &attached, at).await,
                expected,
                "block {at}"
            );
        }
        if !is_done(attached.discard(&device, 0, 32 * 4096).await) {
            continue;
        }
        for _ in 0..rng.u32(..20) {
            yield_now().await;
        }
    }
}

/// Writes until so few blocks are left.
fn fill(device: &SimDevice, pool: &Arc<Pool>, left: u64) {
    let filler = volume(device, pool, "filler", 8192);
    let mut at = 0;
    while pool.status().free_bytes > left * 4096 {
        let count = (pool.status().free_bytes / 4096 - left).min(64);
        put(device, &filler, at, count, 1).unwrap();
        at += count;
    }
    block_on(pool.checkpoint(device)).unwrap();
}

fn check_snapshot(
    device: &SimDevice,
    pool: &Arc<Pool>,
    histories: &[History],
    snapshot: &Snapshot,
) {
    let found = block_on(read_snapshot(device, pool, &snapshot.name));
    assert_eq!(found, snapshot.first_seen, "{} has changed", snapshot.name);
    for (index, (history, found)) in histories.iter().zip(&found).enumerate() {
        let is_prefix = (snapshot.at_least[index]..=snapshot.at_most[index]).any(|count| {
            let mut expected = history.after(count);
            expected.retain(|_, value| *value != 0);
            expected == *found
        });
        assert!(
            is_prefix,
            "{}: writer {index}: {found:?} is no prefix between {} and {}",
            snapshot.name, snapshot.at_least[index], snapshot.at_most[index]
        );
    }
}

fn run(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let is_full = rng.bool();
    let (device, pool) = pool(if is_full { 4096 } else { 8192 });
    let volumes: Vec<Arc<Attached>> = VOLUMES
        .iter()
        .map(|name| volume(&device, &pool, name, 2048))
        .collect();
    if is_full {
        fill(&device, &pool, LEFT);
    }
    let churned = volume(&device, &pool, "churned", 32);
    let histories: Vec<History> = (0..WRITERS).map(|_| History::default()).collect();
    let taken = RefCell::new(Vec::new());

    let mut tasks: Vec<Task<'_>> = Vec::new();
    for (writer, history) in (0..).zip(&histories) {
        tasks.push(Box::pin(write(
            device.clone(),
            volumes.clone(),
            history,
            writer,
            rng.fork(),
        )));
    }
    tasks.push(Box::pin(churn(
        device.clone(),
        Arc::clone(&churned),
        rng.fork(),
    )));
    tasks.push(Box::pin(read(
        device.clone(),
        volumes.clone(),
        &histories,
        rng.fork(),
    )));
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
            for (block, value) in history.after(history.acknowledged.get()) {
                let (volume, lba) = place(writer, block);
                assert_eq!(block_on(read_block(&device, &volumes[volume], lba)), value);
            }
        }
    }
    drop((volumes, churned, pool));

    let losses = [Loss::All, Loss::None, Loss::Some, Loss::Some];
    device.restart(losses[rng.usize(..4)], &mut rng);
    let pool = open(&device).unwrap();
    for snapshot in taken.borrow().iter() {
        check_snapshot(&device, &pool, &histories, snapshot);
    }
    let volumes = VOLUMES.map(|volume| pool.attach(&path(volume, None), false).unwrap());
    for (writer, history) in (0..).zip(&histories) {
        for block in 0..BLOCKS_EACH {
            let (volume, lba) = place(writer, block);
            let value = block_on(read_block(&device, &volumes[volume], lba));
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
    let (_, failures) = parallel::each_until(seeds, true, run);
    if let Some(failure) = failures.first() {
        panic!(
            "{}\nreplay: BLOCKFORK_SEED={} cargo test -p blockfork-tests --test interleaving",
            failure.message, failure.case
        );
    }
}
