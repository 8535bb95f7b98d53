//! Whole pools: what removing costs, and that everything comes back of it, to the pool, to the file below and to memory.

mod backlog;

use super::*;
use crate::clock::{Clock, ManualClock, SystemClock};
use crate::device::memory::{Call, Memory, now};
use crate::device::{Access, BlockBuf, FileDevice, PoolFile};
use crate::limits::METADATA_CACHE_BYTES_MIN;
use crate::name::VolumePath;
use std::future::poll_fn;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

const LEAF: u64 = 512;

/// A device that answers each read at the second poll, so that others can do something before it.
struct Hesitant<'a>(&'a Memory);

/// Gives way once.
async fn yield_now() {
    let mut has_yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut has_yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Device for Hesitant<'_> {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        yield_now().await;
        self.0.read(offset, buffer).await
    }

    async fn read_blocks(&self, blocks: &mut [(u64, BlockBuf)]) -> Vec<bool> {
        yield_now().await;
        self.0.read_blocks(blocks).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.0.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.0.discard(offset, bytes).await
    }

    async fn pause(&self, duration: Duration) {
        self.0.pause(duration).await;
    }
}

/// A device on which every read takes a millisecond, of one block or of many together.
struct Slow {
    memory: Memory,
    clock: Arc<ManualClock>,
}

impl Device for Slow {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.clock.advance_ns(1_000_000);
        self.memory.read(offset, buffer).await
    }

    async fn read_blocks(&self, blocks: &mut [(u64, BlockBuf)]) -> Vec<bool> {
        self.clock.advance_ns(1_000_000);
        self.memory.read_blocks(blocks).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.memory.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        self.memory.flush().await
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.memory.discard(offset, bytes).await
    }

    async fn pause(&self, duration: Duration) {
        self.memory.pause(duration).await;
    }
}

fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

fn make<D: Device>(device: &D, blocks: u64) {
    let options = CreateOptions {
        name: "p".parse().unwrap(),
        id: PoolId([1; 16]),
        blocks,
        created: Timestamp(1),
    };
    now(Pool::create(device, options)).unwrap();
}

fn open<D: Device>(device: &D, blocks: u64, clock: Arc<dyn Clock>) -> Arc<Pool> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: blocks,
        ring: RingPlace::Nowhere,
        clock,
    };
    Arc::new(now(Pool::open(device, options)).unwrap())
}

fn volume<D: Device>(device: &D, pool: &Arc<Pool>, name: &str, blocks: u64) -> Arc<Attached> {
    let options = VolumeOptions {
        bytes: blocks * 4096,
        sector_bytes: 4096,
        redirect: Redirect::Shared,
    };
    now(pool.create_volume(device, &name.parse().unwrap(), options)).unwrap();
    pool.attach(&path(name), false).unwrap()
}

fn put<D: Device>(device: &D, attached: &Attached, lba: u64, count: usize) {
    let mut buffer = BlockBuf::zeroed(count);
    buffer.fill(7);
    now(attached.write(device, lba * 4096, &buffer)).unwrap();
}

fn used(pool: &Pool) -> u64 {
    pool.status().used_bytes
}

/// A pool in memory, reopened so that nothing of it is cached: `v` with one block in each of 200 leaves, and 30 snapshots.
fn slow() -> (Slow, Arc<Pool>) {
    let clock = Arc::new(ManualClock::default());
    let device = Slow {
        memory: Memory::default(),
        clock: Arc::clone(&clock),
    };
    let blocks = 16384;
    make(&device, blocks);
    let pool = open(&device, blocks, Arc::clone(&clock) as Arc<dyn Clock>);
    let v = volume(&device, &pool, "v", 200 * LEAF);
    for leaf in 0..200 {
        put(&device, &v, leaf * LEAF, 1);
    }
    for number in 0..30 {
        let snapshot = path(&format!("v@{number}"));
        now(pool.snapshot(&device, &[snapshot])).unwrap();
        put(&device, &v, number * LEAF, 1);
    }
    v.detach();
    now(pool.close(&device)).unwrap();
    let pool = open(&device, blocks, clock);
    device.memory.take_calls();
    (device, pool)
}

fn reads(device: &Slow) -> usize {
    let calls = device.memory.take_calls();
    let reads = calls.iter().filter(|call| matches!(call, Call::Read(..)));
    reads.count()
}

#[test]
fn what_replay_changes_is_read_together() {
    let (device, pool) = slow();
    let v = pool.attach(&path("v"), false).unwrap();
    for leaf in 0..200 {
        now(v.discard(&device, leaf * LEAF * 4096, 4096)).unwrap();
    }
    now(pool.flush(&device)).unwrap();
    drop((v, pool));
    let clock = Arc::clone(&device.clock);
    let before = clock.monotonic_ns();
    let pool = open(&device, 16384, Arc::clone(&clock) as Arc<dyn Clock>);
    let ms = (clock.monotonic_ns() - before) / 1_000_000;
    // 200 leaves, their counts, and the journal.
    assert!((5..50).contains(&ms), "{ms}");
    assert_eq!(
        now(pool.check(&device, &mut |_, _| {}))
            .unwrap()
            .exit_code(),
        0
    );
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_removal_reads_nothing_and_a_dry_run_says_what_it_frees() {
    let (device, pool) = slow();
    let all = [path("v")];
    let before = used(&pool);
    let dry = now(pool.remove(&device, &all, true, true)).unwrap();
    assert!(reads(&device) > 200);
    drop(pool);
    let pool = open(&device, 16384, Arc::new(ManualClock::default()));
    device.memory.take_calls();
    let removal = now(pool.remove(&device, &all, true, false)).unwrap();
    assert_eq!(reads(&device), 0);
    assert_eq!(removal.freed_bytes, None);
    assert_eq!((removal.targets.len(), removal.ids.len()), (31, 31));
    assert_eq!(removal.targets, dry.targets);
    while now(pool.maintain(&device)).unwrap() {}
    // The catalog's own pages go too.
    let freed = before - used(&pool);
    let said = dry.freed_bytes.unwrap();
    assert!(freed >= said && freed <= said + 8 * 4096, "{freed}, {said}");
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn many_snapshots_go_in_one_command_and_each_once() {
    let device = Memory::default();
    make(&device, 16384);
    let pool = open(&device, 16384, Arc::new(ManualClock::default()));
    volume(&device, &pool, "v", 8).detach();
    let names: Vec<VolumePath> = (0..1000)
        .map(|number| path(&format!("v@{number}")))
        .collect();
    for group in names.chunks(250) {
        for snapshot in group {
            now(pool.snapshot(&device, std::slice::from_ref(snapshot))).unwrap();
        }
    }
    // A refusal names some of what is in the way, and says how much more there is.
    let refused = now(pool.remove(&device, &[path("v")], false, false)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    let said = refused.to_string();
    assert!(said.contains("992 more") && said.len() < 1000, "{said}");
    let twice = [names.clone(), names.clone()].concat();
    let removal = now(pool.remove(&device, &twice, false, false)).unwrap();
    assert_eq!(removal.targets, names);
    assert_eq!(pool.status().snapshots, 0);
    while now(pool.maintain(&device)).unwrap() {}
    assert_eq!(pool.status().reclaiming, 0);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn the_backlog_is_an_upper_bound_and_ends_at_nothing() {
    let (device, pool) = slow();
    assert_eq!(pool.status().backlog_bytes, 0);
    let removal = now(pool.remove(&device, &[path("v")], true, false)).unwrap();
    let ids = &removal.ids;
    let mut last = u64::MAX;
    let mut looks = 0;
    loop {
        let backlog = pool.backlog(ids).unwrap();
        assert_eq!(backlog.bytes, pool.status().backlog_bytes);
        assert!(backlog.bytes <= last, "the backlog never grows");
        if looks == 0 {
            // As if nothing were shared.
            assert_eq!((backlog.trees, backlog.bytes), (31, 31 * 200 * 4096));
        }
        last = backlog.bytes;
        looks += 1;
        if !now(pool.maintain(&device)).unwrap() {
            break;
        }
        let backlog = pool.backlog(ids).unwrap();
        assert!(backlog.trees == 0 || !backlog.is_settled);
    }
    assert!(looks > 3);
    let end = pool.backlog(ids).unwrap();
    assert_eq!((end.trees, end.bytes, end.unreadable), (0, 0, 0));
    assert!(end.is_settled, "a checkpoint has followed");
    // What was never removed has none.
    assert_eq!(pool.backlog(&[VolumeId(999)]).unwrap().trees, 0);
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn the_return_of_space_rests_while_somebody_works_and_not_otherwise() {
    for is_busy in [false, true] {
        let (device, pool) = slow();
        let w = volume(&device, &pool, "w", 8);
        while now(pool.maintain(&device)).unwrap() {}
        now(pool.remove(&device, &[path("v")], true, false)).unwrap();
        device.clock.advance_ns(60_000_000);
        device.memory.take_calls();
        loop {
            if is_busy {
                put(&device, &w, 0, 1);
            }
            if !now(pool.maintain(&device)).unwrap() {
                break;
            }
        }
        let calls = device.memory.take_calls();
        let rested = calls.iter().any(|call| matches!(call, Call::Pause(_)));
        assert_eq!(rested, is_busy);
        assert_eq!(pool.status().reclaiming, 0);
    }
}

/// A new pool of 16,384 blocks, whose time a test moves.
fn fresh() -> (Arc<ManualClock>, Memory, Arc<Pool>) {
    let clock = Arc::new(ManualClock::default());
    let device = Memory::default();
    make(&device, 16384);
    let pool = open(&device, 16384, Arc::clone(&clock) as Arc<dyn Clock>);
    (clock, device, pool)
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn scattered_blocks_are_given_back_when_nobody_works() {
    let (clock, device, pool) = fresh();
    let v = volume(&device, &pool, "v", 4096);
    put(&device, &v, 0, 64);
    now(pool.checkpoint(&device)).unwrap();
    for lba in (0..64).step_by(2) {
        now(v.discard(&device, lba * 4096, 4096)).unwrap();
    }
    let discarded = |device: &Memory| -> u64 {
        let calls = device.take_calls();
        let counts = calls.iter().map(|call| match call {
            Call::Discard(_, count) => *count,
            Call::Read(..) | Call::Write(..) | Call::Flush | Call::Pause(_) => 0,
        });
        counts.sum()
    };
    now(pool.checkpoint(&device)).unwrap();
    assert_eq!(discarded(&device), 0);
    // Somebody was there just now.
    while now(pool.maintain(&device)).unwrap() {}
    assert_eq!(discarded(&device), 0);
    clock.advance_ns(60_000_000);
    let before = used(&pool);
    let free = pool.status().free_bytes;
    while now(pool.maintain(&device)).unwrap() {}
    assert!(discarded(&device) >= 32);
    assert_eq!((used(&pool), pool.status().free_bytes), (before, free));
    // Once is enough.
    while now(pool.maintain(&device)).unwrap() {}
    assert_eq!(discarded(&device), 0);
    // What a discard is refused for is free all the same, and not tried for ever.
    now(v.discard(&device, 4096, 4096)).unwrap();
    now(pool.checkpoint(&device)).unwrap();
    device.take_calls();
    while now(pool.maintain(&device)).unwrap() {}
    clock.advance_ns(60_000_000);
    while now(pool.maintain(&device)).unwrap() {}
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_checkpoint_rests_while_somebody_works_unless_space_is_low() {
    // Somebody works, space is low; it rests, it gives freed blocks back.
    for (is_busy, is_low, rests, gives_back) in [
        (false, false, false, true),
        (false, true, false, true),
        (true, false, true, false),
        (true, true, false, false),
    ] {
        let (clock, device, pool) = fresh();
        let v = volume(&device, &pool, "v", 16384);
        put(&device, &v, 0, 64);
        let low = pool.status().size_bytes / 10;
        for lba in (64..16384).step_by(64) {
            if !is_low || pool.status().free_bytes < low {
                break;
            }
            put(&device, &v, lba, 64);
        }
        now(pool.checkpoint(&device)).unwrap();
        now(v.discard(&device, 0, 32 * 4096)).unwrap();
        if !is_busy {
            now(pool.maintain(&device)).unwrap();
        }
        clock.advance_ns(31_000_000_000);
        device.take_calls();
        let before = pool.stats().checkpoints;
        now(pool.maintain(&device)).unwrap();
        assert_eq!(pool.stats().checkpoints, before + 1);
        let calls = device.take_calls();
        let has = |is: fn(&Call) -> bool| calls.iter().any(is);
        assert_eq!(has(|call| matches!(call, Call::Pause(_))), rests);
        assert_eq!(has(|call| matches!(call, Call::Discard(..))), gives_back);
    }
}

/// A sparse file, gone when dropped.
struct Sparse(PathBuf);

impl Sparse {
    fn new(name: &str, bytes: u64) -> Self {
        let name = format!("blockfork-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        Self(path)
    }

    fn open(&self) -> FileDevice {
        let access = Access {
            write: true,
            lock_wait_ms: 0,
        };
        FileDevice::new(Arc::new(PoolFile::open(&self.0, access).unwrap()))
    }

    /// What `du` says.
    fn allocated(&self) -> u64 {
        std::fs::metadata(&self.0).unwrap().blocks() * 512
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// Blocks are written and overwritten at random between snapshots, so that what is freed is scattered; then all goes.
#[test]
#[cfg_attr(miri, ignore = "needs files")]
fn a_pool_file_is_as_small_as_at_the_start_when_everything_is_deleted() {
    let blocks = 32 * 1024;
    let file = Sparse::new("deleted", blocks * 4096);
    let device = file.open();
    make(&device, blocks);
    let pool = open(&device, blocks, Arc::new(SystemClock::new()));
    let (at_start, used_at_start) = (file.allocated(), used(&pool));
    let v = volume(&device, &pool, "v", 16_000);
    let mut rng = fastrand::Rng::with_seed(5);
    for lba in (0..16_000).step_by(64) {
        put(&device, &v, lba, 64);
    }
    for number in 0..4 {
        now(pool.snapshot(&device, &[path(&format!("v@{number}"))])).unwrap();
        for _ in 0..1000 {
            put(&device, &v, rng.u64(..16_000), 1);
        }
        now(pool.checkpoint(&device)).unwrap();
    }
    let peak = file.allocated() - at_start;
    assert!(peak > 19_000 * 4096, "{peak}");
    v.detach();
    // One after the other, so that no removal frees a long run.
    for target in ["v@2", "v@0", "v@3"] {
        now(pool.remove(&device, &[path(target)], false, false)).unwrap();
        while now(pool.maintain(&device)).unwrap() {}
    }
    now(pool.remove(&device, &[path("v")], true, false)).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    while now(pool.maintain(&device)).unwrap() {}
    while now(pool.maintain(&device)).unwrap() {}
    let left = file.allocated().saturating_sub(at_start);
    assert!(left * 100 <= peak, "{left} bytes of {peak} are left");
    assert_eq!(used(&pool), used_at_start);
    let report = now(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
    now(pool.close(&device)).unwrap();
    let left = file.allocated().saturating_sub(at_start);
    assert!(left * 100 <= peak, "{left} bytes of {peak} are left");
    let pool = open(&device, blocks, Arc::new(SystemClock::new()));
    assert_eq!(used(&pool), used_at_start);
}

#[test]
#[cfg_attr(miri, ignore = "needs files")]
fn what_a_killed_process_had_not_given_back_is_given_back_by_the_next() {
    let blocks = 16 * 1024;
    let file = Sparse::new("killed", blocks * 4096);
    let device = file.open();
    make(&device, blocks);
    let pool = open(&device, blocks, Arc::new(ManualClock::default()));
    let v = volume(&device, &pool, "v", 4096);
    for lba in (0..4096).step_by(64) {
        put(&device, &v, lba, 64);
    }
    now(pool.checkpoint(&device)).unwrap();
    let full = file.allocated();
    for lba in (0..4096).step_by(2) {
        now(v.discard(&device, lba * 4096, 4096)).unwrap();
    }
    now(pool.checkpoint(&device)).unwrap();
    assert!(
        file.allocated() + 64 * 4096 >= full,
        "nothing is given back yet"
    );
    v.detach();
    drop((v, pool));
    let pool = open(&device, blocks, Arc::new(ManualClock::default()));
    while now(pool.maintain(&device)).unwrap() {}
    let given = full.saturating_sub(file.allocated());
    assert!(given >= 2000 * 4096, "{given} bytes came back");
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn memory_for_metadata_is_bounded_while_all_of_a_pool_is_read_and_written() {
    let device = Memory::default();
    let blocks = 64 * 1024;
    make(&device, blocks);
    let clock = Arc::new(ManualClock::default());
    let pool = open(&device, blocks, Arc::clone(&clock) as Arc<dyn Clock>);
    pool.limit_metadata(0);
    let leaves = 6000;
    let v = volume(&device, &pool, "v", leaves * LEAF);
    for leaf in 0..leaves {
        put(&device, &v, leaf * LEAF, 1);
        if leaf % 500 == 0 {
            now(pool.maintain(&device)).unwrap();
        }
    }
    // More is dirty than may be kept: a checkpoint comes, and what it wrote goes.
    for _ in 0..3 {
        now(pool.maintain(&device)).unwrap();
    }
    let cached = || pool.stats().metadata_bytes;
    assert!(cached() <= METADATA_CACHE_BYTES_MIN, "{}", cached());
    let mut rng = fastrand::Rng::with_seed(3);
    let mut most = 0;
    let mut buffer = BlockBuf::zeroed(1);
    for _ in 0..20_000 {
        let lba = rng.u64(..leaves) * LEAF;
        buffer.fill(0);
        now(v.read(&device, lba * 4096, &mut buffer)).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 7));
        most = cached().max(most);
    }
    assert!(
        most <= METADATA_CACHE_BYTES_MIN,
        "{most} without any background work"
    );
    v.detach();
    let report = now(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
}

/// A command that takes many reads, one a step.
struct Slowly<'a, T>(std::pin::Pin<Box<dyn Future<Output = Result<T>> + 'a>>);

impl<'a, T> Slowly<'a, T> {
    /// Takes the first step, which must not be the last.
    #[track_caller]
    fn begin(command: impl Future<Output = Result<T>> + 'a) -> Self {
        let mut slowly = Self(Box::pin(command));
        slowly.step();
        slowly
    }

    #[track_caller]
    fn step(&mut self) {
        assert!(waits(self.0.as_mut()), "it has ended");
    }

    /// Carries out another command while this one goes on, which must not end meanwhile.
    #[track_caller]
    fn beside<U>(&mut self, other: impl Future<Output = Result<U>>) {
        let mut other = pin!(other);
        let mut context = Context::from_waker(Waker::noop());
        while other
            .as_mut()
            .poll(&mut context)
            .map(Result::unwrap)
            .is_pending()
        {
            self.step();
        }
    }
}

/// Whether a future still waits.
fn waits<T>(future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    matches!(future.poll(&mut context), Poll::Pending)
}

#[test]
fn a_shrink_keeps_only_its_own_volume_from_others() {
    let (device, pool) = slow();
    volume(&device, &pool, "w", LEAF).detach();
    let (v, w) = (path("v").volume, path("w").volume);
    let c = path("c").volume;
    let hesitant = Hesitant(&device.memory);
    let mut shrink = Slowly::begin(pool.resize(&hesitant, &v, 4096, true));

    shrink.beside(pool.snapshot(&device, &[path("w@s")]));
    shrink.beside(pool.clone_snapshot(&device, &path("w@s"), &c));
    shrink.beside(pool.resize(&device, &w, 2 * LEAF * 4096, false));
    shrink.beside(pool.rollback(&device, &path("w@s")));
    shrink.beside(pool.remove(&device, &[path("c")], false, false));

    assert!(pool.attach(&path("v"), false).is_err());
    let (snapshots, all) = ([path("w@t"), path("v@t")], [path("v")]);
    let mut snapshot = Box::pin(pool.snapshot(&device, &snapshots));
    let mut removal = Box::pin(pool.remove(&device, &all, true, false));
    let mut close = Box::pin(pool.close(&device));
    for _ in 0..10 {
        assert!(waits(snapshot.as_mut()), "v is in the middle of a shrink");
        assert!(waits(removal.as_mut()), "v is in the middle of a shrink");
        assert!(waits(close.as_mut()), "v is in the middle of a shrink");
        shrink.step();
    }
    drop((removal, close));
    while waits(shrink.0.as_mut()) {}
    now(snapshot).unwrap();
    let v = pool.attach(&path("v"), false).unwrap();
    assert_eq!(v.bytes(), 4096);
}

#[test]
fn a_dry_run_of_a_removal_keeps_nobody_from_anything() {
    let (device, pool) = slow();
    let (hesitant, targets) = (Hesitant(&device.memory), [path("v")]);
    let mut dry_run = Slowly::begin(pool.remove(&hesitant, &targets, true, true));
    dry_run.beside(pool.snapshot(&device, &[path("v@t")]));
    pool.attach(&path("v"), false).unwrap();
}

#[test]
fn the_largest_pool_opens_as_fast_as_a_small_one_until_it_is_used() {
    let calls = |blocks: u64| {
        let (device, clock) = (Memory::default(), Arc::new(ManualClock::default()));
        make(&device, blocks);
        let pool = open(&device, blocks, Arc::clone(&clock) as Arc<dyn Clock>);
        // Far apart, so that they are in groups of their own.
        let v = volume(&device, &pool, "v", 8 * LEAF);
        for leaf in 0..8 {
            put(&device, &v, leaf * LEAF, 3);
        }
        v.detach();
        now(pool.close(&device)).unwrap();
        device.take_calls();
        let pool = open(&device, blocks, clock);
        assert_eq!(pool.status().size_bytes, blocks * 4096);
        let opening = device.take_calls().len();
        let report = now(pool.check(&device, &mut |_, _| {})).unwrap();
        assert_eq!(report.exit_code(), 0, "{report:?}");
        (opening, device.take_calls().len())
    };
    let (small, small_check) = calls(1 << 20);
    let (large, large_check) = calls(crate::limits::POOL_BLOCKS_MAX / 499_968 * 499_968);
    assert!(large < small + 10, "{small}, {large}");
    assert!(
        large_check < small_check + 20,
        "{small_check}, {large_check}"
    );
}
