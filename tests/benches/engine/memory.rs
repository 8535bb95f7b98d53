//! What the map of a GiB takes in memory: the column of the most that was allocated at once.

use blockfork::device::BlockBuf;
use divan::Bencher;

use crate::fixture::{Fixture, VOLUME_BLOCKS};

/// A GiB written from its beginning to its end.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn a_gib_in_order(bencher: Bencher<'_, '_>) {
    bencher.bench(|| Fixture::new().filled());
}

/// A GiB written block by block, none beside the one before.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn a_gib_at_random(bencher: Bencher<'_, '_>) {
    bencher.bench(|| {
        let fixture = Fixture::new();
        let block = BlockBuf::zeroed(1);
        (0..VOLUME_BLOCKS).for_each(|_| fixture.write(&block));
        fixture
    });
}

/// An empty pool, for comparison.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn an_empty_pool(bencher: Bencher<'_, '_>) {
    bencher.bench(Fixture::new);
}
