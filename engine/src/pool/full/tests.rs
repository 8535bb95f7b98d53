//! Writes that wait for space, on a device whose pauses let somebody else do something.

use super::*;
use crate::clock::ManualClock;
use crate::device::BlockBuf;
use crate::device::memory::{Memory, now};
use crate::pool::Limit;
use crate::pool::limits::tests::{name, open_by, options, path, pool, quota, set, volume, write};
use crate::units::{BLOCK_BYTES, BLOCK_LEN};
use std::cell::Cell;
use std::sync::Arc;

/// A device in memory; `meanwhile` gets the number of each pause.
struct Paused<'a> {
    memory: &'a Memory,
    pauses: Cell<u64>,
    meanwhile: &'a dyn Fn(u64),
}

impl Device for Paused<'_> {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.memory.read(offset, buffer).await
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
        assert_eq!(duration, Duration::from_nanos(LOOK_NS));
        self.pauses.set(self.pauses.get() + 1);
        (self.meanwhile)(self.pauses.get());
    }
}

/// Writes a block, and says how often that paused.
fn wait(
    memory: &Memory,
    volume: &Attached,
    lba: u64,
    meanwhile: &dyn Fn(u64),
) -> (Result<()>, u64) {
    let device = Paused {
        memory,
        pauses: Cell::new(0),
        meanwhile,
    };
    let data = BlockBuf::zeroed(1);
    let done = now(volume.write(&device, lba * BLOCK_BYTES, &data[..]));
    (done, device.pauses.get())
}

/// Writes blocks of a volume from `lba` on until nothing is free.
fn fill(memory: &Memory, volume: &Attached, lba: u64, step: u64) {
    let mut from = (lba..).step_by(usize::try_from(step).unwrap());
    let error = from.find_map(|lba| write(memory, volume, lba, step).err());
    assert_eq!(error.unwrap().kind(), ErrorKind::OutOfSpace);
}

fn queue(volume: &Attached, seconds: u32) {
    volume.set_on_full(OnFull::Queue { seconds });
}

#[test]
fn a_write_fails_at_once_unless_it_is_told_to_wait() {
    let (memory, pool) = pool();
    let v = volume(&memory, &pool, quota(1));
    write(&memory, &v, 0, 1).unwrap();
    let (done, pauses) = wait(&memory, &v, 1, &|_| {});
    assert_eq!(
        (done.unwrap_err().kind(), pauses),
        (ErrorKind::OverQuota, 0)
    );
    queue(&v, 2);
    // Where a pause takes no time, so many of them are the time.
    let (done, pauses) = wait(&memory, &v, 1, &|_| {});
    assert_eq!(
        (done.unwrap_err().kind(), pauses),
        (ErrorKind::OverQuota, 20)
    );
    v.set_on_full(OnFull::Error);
    let (done, pauses) = wait(&memory, &v, 1, &|_| {});
    assert_eq!((done.unwrap_err().errno(), pauses), (libc::ENOSPC, 0));
    // Other failures are no reason to wait.
    queue(&v, 2);
    let (done, pauses) = wait(&memory, &v, 1 << 30, &|_| {});
    assert_eq!((done.unwrap_err().kind(), pauses), (ErrorKind::Invalid, 0));
}

#[test]
fn a_write_waits_until_the_time_is_up() {
    let (memory, first) = pool();
    drop(volume(&memory, &first, quota(1)));
    now(first.close(&memory)).unwrap();
    let clock = Arc::new(ManualClock::default());
    let pool = open_by(&memory, Arc::clone(&clock));
    let v = pool.attach(&path("v"), false).unwrap();
    write(&memory, &v, 0, 1).unwrap();
    queue(&v, 3);
    let slow = |_| clock.advance_ns(1_000_000_000);
    let (done, pauses) = wait(&memory, &v, 1, &slow);
    assert_eq!(
        (done.unwrap_err().kind(), pauses),
        (ErrorKind::OverQuota, 3)
    );
}

#[test]
#[cfg_attr(miri, ignore = "needs minutes")]
fn a_write_waits_until_there_is_space_however_that_comes() {
    let (memory, pool) = pool();
    let v = volume(&memory, &pool, quota(1));
    write(&memory, &v, 0, 1).unwrap();
    let more = set(Limit::Quota, None);
    now(pool.set_limits(&memory, &name("v"), &more)).unwrap();
    now(pool.create_volume(&memory, &name("w"), options(8192))).unwrap();
    let w = pool.attach(&path("w"), false).unwrap();
    fill(&memory, &w, 0, 64);
    fill(&memory, &w, 6000, 1);
    queue(&v, 60);
    let at_third = |pause: u64, step: &dyn Fn()| {
        if pause == 3 {
            step();
        }
    };
    // A discard of another volume.
    let discard = || now(w.discard(&memory, 0, 64 * BLOCK_BYTES)).unwrap();
    let (done, pauses) = wait(&memory, &v, 1, &|pause| at_third(pause, &discard));
    done.unwrap();
    assert_eq!(pauses, 3);
    // A volume that is removed.
    now(pool.create_volume(&memory, &name("x"), options(512))).unwrap();
    let x = pool.attach(&path("x"), false).unwrap();
    fill(&memory, &x, 0, 1);
    x.detach();
    let remove = || {
        now(pool.remove(&memory, &[path("x")], false, false)).unwrap();
        while now(pool.maintain(&memory)).unwrap() {}
    };
    let (done, pauses) = wait(&memory, &v, 2, &|pause| at_third(pause, &remove));
    done.unwrap();
    assert_eq!(pauses, 3);
    // A larger pool.
    fill(&memory, &w, 7000, 1);
    let grow = || now(pool.grow(&memory, 8192)).unwrap();
    let (done, pauses) = wait(&memory, &v, 3, &|pause| at_third(pause, &grow));
    done.unwrap();
    assert_eq!(pauses, 3);
    // A larger quota.
    now(pool.set_limits(&memory, &name("v"), &set(Limit::Quota, Some(4)))).unwrap();
    let raise = || now(pool.set_limits(&memory, &name("v"), &more)).unwrap();
    let (done, pauses) = wait(&memory, &v, 4, &|pause| at_third(pause, &raise));
    done.unwrap();
    assert_eq!(pauses, 3);
    // A write counts once, however often it looked.
    assert_eq!(v.stats().writes, 5);
}

#[test]
fn nobody_waits_for_who_goes() {
    let (memory, pool) = pool();
    let v = volume(&memory, &pool, quota(1));
    write(&memory, &v, 0, 1).unwrap();
    queue(&v, 60);
    let going = |pause| {
        if pause == 2 {
            v.stop_waiting();
        }
    };
    let (done, pauses) = wait(&memory, &v, 1, &going);
    assert_eq!(
        (done.unwrap_err().kind(), pauses),
        (ErrorKind::OverQuota, 2)
    );
    let (done, pauses) = wait(&memory, &v, 1, &going);
    assert_eq!((done.is_err(), pauses), (true, 0));
}

#[test]
fn a_waiting_write_keeps_no_other_of_its_blocks_away() {
    let (memory, pool) = pool();
    let small = crate::pool::VolumeOptions {
        sector_bytes: 512,
        ..options(64)
    };
    let limits = quota(1);
    now(pool.create_limited_volume(&memory, &name("s"), small, limits)).unwrap();
    let s = pool.attach(&path("s"), false).unwrap();
    write(&memory, &s, 0, 1).unwrap();
    queue(&s, 60);
    // A read and a discard of the very blocks that the write waits for.
    let meanwhile = |_| {
        let mut buffer = BlockBuf::zeroed(2);
        now(s.read(&memory, 0, &mut buffer[..2 * BLOCK_LEN])).unwrap();
        now(s.discard(&memory, 0, 2 * BLOCK_BYTES)).unwrap();
    };
    let (done, pauses) = wait(&memory, &s, 1, &meanwhile);
    done.unwrap();
    assert_eq!(pauses, 1);
}
