//! How many extents a volume of a GiB lies in: a line on standard error beside the time that it takes to count them.

use blockfork::device::BlockBuf;
use blockfork::pool::Transfer;
use blockfork::units::BLOCK_BYTES;
use divan::Bencher;

use crate::fixture::{Fixture, VOLUME_BLOCKS};

/// Written from its beginning to its end.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn extents_of_a_gib_in_order(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    tell("in order", extents(&fixture));
    bencher.bench(|| extents(&fixture));
}

/// Then each block once more, at random, below a snapshot.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn extents_of_a_gib_redirected_at_random(bencher: Bencher<'_, '_>) {
    let fixture = Fixture::new().filled();
    fixture.snapshot();
    let block = BlockBuf::zeroed(1);
    (0..VOLUME_BLOCKS).for_each(|_| fixture.write(&block));
    tell("redirected at random", extents(&fixture));
    bencher.bench(|| extents(&fixture));
}

fn tell(how: &str, extents: u64) {
    eprintln!("a GiB, {how}: {extents} extents");
}

fn extents(fixture: &Fixture) -> u64 {
    let mut extents = 0;
    let mut next = None;
    for lba in 0..VOLUME_BLOCKS {
        let direct = fixture
            .volume
            .direct(Transfer::Read, lba * BLOCK_BYTES, 4096);
        let direct = direct.expect("a block that was written");
        let at = direct.offset();
        extents += u64::from(next != Some(at));
        next = Some(at + BLOCK_BYTES);
        assert!(direct.done());
    }
    extents
}
