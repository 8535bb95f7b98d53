//! What a request finds out before it goes to the device, and what a redirected write costs.

use blockfork::device::BlockBuf;
use blockfork::pool::Transfer;
use blockfork::units::BLOCK_BYTES;
use divan::Bencher;

use crate::fixture::Fixture;

/// Where a random block is to be read.
#[divan::bench(threads = [1, 2])]
fn lookup_for_read(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| {
        let direct = fixture
            .volume
            .direct(Transfer::Read, fixture.random_offset(), 4096);
        assert!(direct.unwrap().done());
    });
}

/// Where a random block is to be written in place.
#[divan::bench(threads = [1, 2])]
fn lookup_for_write(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    bencher.bench(|| {
        let direct = fixture
            .volume
            .direct(Transfer::Write, fixture.random_offset(), 4096);
        assert!(direct.unwrap().done());
    });
}

/// Where 256 KiB are to be written in place.
#[divan::bench]
fn lookup_for_write_of_64_blocks(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    let bytes = 64 * BLOCK_BYTES;
    bencher.bench(|| {
        let offset = fixture.random_offset() / bytes * bytes;
        let direct = fixture.volume.direct(Transfer::Write, offset, 64 << 12);
        assert!(direct.unwrap().done());
    });
}

/// Where a random block that a snapshot shares is to be written, and its remap, without the data; each leaf copied at its
/// first.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 1000)]
fn remap_after_snapshot(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    fixture.snapshot();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| {
        let direct = fixture
            .volume
            .direct(Transfer::Write, fixture.random_offset(), 4096);
        match direct {
            Some(direct) => assert!(direct.done()),
            // The first of a region, whose counts are not in memory.
            None => fixture.write(&block),
        }
    });
}

/// A write of a block that nothing is mapped to.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 500)]
fn first_write(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| fixture.write(&block));
}

/// A write of a block that a snapshot shares, each leaf copied at its first.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 500)]
fn first_write_after_snapshot(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    fixture.snapshot();
    let block = BlockBuf::zeroed(1);
    bencher.bench(|| fixture.write(&block));
}
