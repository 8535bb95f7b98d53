//! Commands and commits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blockfork::device::BlockBuf;
use divan::Bencher;
use futures_lite::future::block_on;

use crate::fixture::{Fixture, Killed};

/// A snapshot that is durable when the call returns.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn snapshot_idle(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| fixture.snapshot());
}

/// The same with 100 redirected writes before it, which the figure contains.
#[divan::bench(sample_count = 50, sample_size = 10)]
fn snapshot_after_100_writes(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| {
        for _ in 0..100 {
            fixture.write(&block);
        }
        fixture.snapshot()
    });
}

/// The same while another thread redirects one write after the other.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn snapshot_under_load(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let block = BlockBuf::zeroed(1);
            while !is_over.load(Ordering::Relaxed) {
                fixture.write(&block);
            }
        });
        bencher.bench(|| fixture.snapshot());
        is_over.store(true, Ordering::Relaxed);
    });
}

/// A clone of a snapshot.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn clone(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let snapshot = fixture.snapshot();
    bencher.bench(|| {
        let number = fixture.number();
        let name = format!("c{number}").parse().unwrap();
        block_on(fixture.pool.clone_snapshot(&fixture.file, &snapshot, &name)).unwrap();
    });
}

/// A redirected write and a flush that makes it durable.
#[divan::bench(sample_count = 100, sample_size = 10)]
fn commit(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| {
        fixture.write(&block);
        block_on(fixture.volume.flush(&fixture.file)).unwrap();
    });
}

/// A checkpoint after 10,000 redirected writes, which the figure does not contain.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn checkpoint_after_10000_writes(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let block = BlockBuf::zeroed(1);
    bencher
        .with_inputs(|| {
            fixture.snapshot();
            (0..10_000).for_each(|_| fixture.write(&block));
        })
        .bench_values(|()| block_on(fixture.pool.checkpoint(&fixture.file)).unwrap());
}

/// Opening a pool whose process died after 100,000 writes of new blocks, 4 MiB of journal and ring.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn open_and_replay_100000_records(bencher: Bencher<'_, '_>) {
    bencher
        .with_inputs(|| {
            let fixture = Fixture::new();
            let block = BlockBuf::zeroed(1);
            (0..100_000).for_each(|_| fixture.write(&block));
            fixture.killed()
        })
        .bench_values(Killed::open);
}

/// Opening a pool with 1 GiB of blocks mapped one by one, which was closed.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn open_a_closed_pool(bencher: Bencher<'_, '_>) {
    bencher
        .with_inputs(|| {
            let fixture = Fixture::new().filled();
            fixture.volume.detach();
            block_on(fixture.pool.close(&fixture.file)).unwrap();
            fixture.killed()
        })
        .bench_values(Killed::open);
}
