//! A small pool on a simulated device, and single steps on it.

use crate::sim_device::SimDevice;
use blockfork::clock::ManualClock;
use blockfork::device::BlockBuf;
use blockfork::error::Result;
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::units::{PoolId, Timestamp};
use futures_lite::future::block_on;
use std::sync::Arc;

/// `VOLUME` or `VOLUME@SNAPSHOT`.
pub fn path(text: &str) -> VolumePath {
    text.parse().unwrap()
}

/// Opens the pool for writing, without a ring.
pub fn open(device: &SimDevice) -> Result<Arc<Pool>> {
    let options = OpenOptions {
        read_only: false,
        device_blocks: device.blocks(),
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    };
    block_on(Pool::open(device, options)).map(Arc::new)
}

/// A new, open pool of so many blocks.
pub fn pool(blocks: u64) -> (SimDevice, Arc<Pool>) {
    let device = SimDevice::new(blocks);
    let options = CreateOptions {
        name: "p".parse().unwrap(),
        id: PoolId([1; 16]),
        blocks,
        created: Timestamp(1),
    };
    block_on(Pool::create(&device, options)).unwrap();
    let pool = open(&device).unwrap();
    (device, pool)
}

/// Makes and attaches a volume of so many blocks.
pub fn volume(device: &SimDevice, pool: &Arc<Pool>, name: &str, blocks: u64) -> Arc<Attached> {
    let options = VolumeOptions {
        bytes: blocks * 4096,
        sector_bytes: 4096,
        redirect: Redirect::Shared,
    };
    block_on(pool.create_volume(device, &name.parse().unwrap(), options)).unwrap();
    attach(pool, name)
}

/// Attaches for reading and writing.
pub fn attach(pool: &Arc<Pool>, text: &str) -> Arc<Attached> {
    pool.attach(&path(text), false).unwrap()
}

/// Writes so many blocks full of `stamp`.
pub fn put(device: &SimDevice, attached: &Attached, lba: u64, count: u64, stamp: u8) -> Result<()> {
    let mut buffer = BlockBuf::zeroed(usize::try_from(count).unwrap());
    buffer.fill(stamp);
    block_on(attached.write(device, lba * 4096, &buffer))
}

/// The stamp of a block.
pub fn stamp(device: &SimDevice, attached: &Attached, lba: u64) -> u8 {
    let mut buffer = BlockBuf::zeroed(1);
    block_on(attached.read(device, lba * 4096, &mut buffer)).unwrap();
    assert!(buffer.iter().all(|byte| *byte == buffer[0]), "a mix");
    buffer[0]
}

/// Returns the space of everything removed.
pub fn reclaim(device: &SimDevice, pool: &Pool) {
    while block_on(pool.maintain(device)).unwrap() {}
}
