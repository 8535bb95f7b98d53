//! A sequence of operations on a small pool, each from a few bytes of input, held against a model: a stamp for each
//! block of each volume and snapshot.

use super::image::{Image, open};
use crate::fixture::path;
use blockfork::device::BlockBuf;
use blockfork::pool::{Pool, Redirect, VolumeOptions};
use futures_lite::future::block_on;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Blocks that the operations touch: the first ones of each of several leaves.
const LBAS: u64 = 24;
const LEAF: u64 = 512;
const VOLUME_BLOCKS: u64 = 4 * LEAF;
const OPERATIONS_MAX: usize = 100;

fn lba(choice: u64) -> u64 {
    choice / 8 % 3 * LEAF + choice % 8
}

/// What each block of a volume or snapshot holds; 0 for nothing.
type Stamps = [u8; LBAS as usize];

struct Pair<'a> {
    image: &'a Image,
    pool: Arc<Pool>,
    model: BTreeMap<String, Stamps>,
}

/// Runs the operations, and compares everything at the end.
pub(super) fn run(input: &[u8]) {
    let image = Image::empty();
    let mut pair = Pair {
        pool: open(&image, false).unwrap(),
        image: &image,
        model: BTreeMap::new(),
    };
    for operation in input.chunks(4).take(OPERATIONS_MAX) {
        let at = |index: usize| operation.get(index).copied().unwrap_or(0);
        pair.step(at(0), at(1), at(2), at(3));
    }
    pair.compare();
    pair.reopen(true);
    pair.compare();
    let report = block_on(pair.pool.check(&image, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{:?}", report.damage);
}

impl Pair<'_> {
    fn step(&mut self, kind: u8, which: u8, a: u8, b: u8) {
        let (volume, snapshot) = (
            format!("v{}", which % 3),
            format!("v{}@s{}", which % 3, which / 3 % 3),
        );
        match kind % 14 {
            0..=2 => self.write(&volume, a, b),
            3 => self.discard(&volume, a, b),
            4 => self.create(&volume, a.is_multiple_of(2)),
            5 | 6 => self.fork(&volume, &snapshot),
            7 => self.clone(&snapshot, &format!("v{}", a % 3)),
            8 => self.rollback(&volume, &snapshot),
            9 => self.remove(&snapshot),
            10 => self.remove_all(&volume),
            11 => self.reopen(a.is_multiple_of(2)),
            12 => block_on(self.pool.checkpoint(self.image)).unwrap(),
            _ => drop(block_on(self.pool.maintain(self.image)).unwrap()),
        }
    }

    fn write(&mut self, volume: &str, first: u8, stamp: u8) {
        let stamp = stamp | 1;
        let (first, count) = (u64::from(first) % LBAS, 1 + u64::from(stamp) % 4);
        let Some(stamps) = self.model.get_mut(volume) else {
            return;
        };
        let attached = self.pool.attach(&path(volume), false).unwrap();
        for choice in first..(first + count).min(LBAS) {
            let mut buffer = BlockBuf::zeroed(1);
            buffer.fill(stamp);
            block_on(attached.write(self.image, lba(choice) * 4096, &buffer)).unwrap();
            stamps[usize::try_from(choice).unwrap()] = stamp;
        }
        attached.detach();
    }

    fn discard(&mut self, volume: &str, first: u8, count: u8) {
        let Some(stamps) = self.model.get_mut(volume) else {
            return;
        };
        let (first, count) = (u64::from(first) % LBAS, u64::from(count) % 600);
        let (start, end) = (lba(first), lba(first) + count);
        let attached = self.pool.attach(&path(volume), false).unwrap();
        block_on(attached.discard(self.image, start * 4096, count * 4096)).unwrap();
        attached.detach();
        for choice in 0..LBAS {
            if (start..end).contains(&lba(choice)) {
                stamps[usize::try_from(choice).unwrap()] = 0;
            }
        }
    }

    fn create(&mut self, volume: &str, shared: bool) {
        let options = VolumeOptions {
            bytes: VOLUME_BLOCKS * 4096,
            sector_bytes: 4096,
            redirect: if shared {
                Redirect::Shared
            } else {
                Redirect::Always
            },
        };
        let name = volume.parse().unwrap();
        let made = block_on(self.pool.create_volume(self.image, &name, options)).is_ok();
        assert_eq!(made, !self.model.contains_key(volume), "create {volume}");
        if made {
            self.model.insert(volume.to_owned(), Stamps::default());
        }
    }

    fn fork(&mut self, volume: &str, snapshot: &str) {
        let taken = block_on(self.pool.snapshot(self.image, &[path(snapshot)])).is_ok();
        let stamps = self.model.get(volume).copied();
        let may = stamps.is_some() && !self.model.contains_key(snapshot);
        assert_eq!(taken, may, "snapshot {snapshot}");
        if let (true, Some(stamps)) = (taken, stamps) {
            self.model.insert(snapshot.to_owned(), stamps);
        }
    }

    fn clone(&mut self, snapshot: &str, volume: &str) {
        let name = volume.parse().unwrap();
        let made = block_on(self.pool.clone_snapshot(self.image, &path(snapshot), &name)).is_ok();
        let stamps = self.model.get(snapshot).copied();
        let may = stamps.is_some() && !self.model.contains_key(volume);
        assert_eq!(made, may, "clone {snapshot} as {volume}");
        if let (true, Some(stamps)) = (made, stamps) {
            self.model.insert(volume.to_owned(), stamps);
        }
    }

    fn rollback(&mut self, volume: &str, snapshot: &str) {
        let done = block_on(self.pool.rollback(self.image, &path(snapshot))).is_ok();
        let stamps = self.model.get(snapshot).copied();
        assert_eq!(done, stamps.is_some(), "rollback {snapshot}");
        if let Some(stamps) = stamps {
            self.model.insert(volume.to_owned(), stamps);
        }
    }

    fn remove(&mut self, snapshot: &str) {
        let targets = [path(snapshot)];
        let gone = block_on(self.pool.remove(self.image, &targets, false, false)).is_ok();
        assert_eq!(gone, self.model.remove(snapshot).is_some());
    }

    fn remove_all(&mut self, volume: &str) {
        let targets = [path(volume)];
        let gone = block_on(self.pool.remove(self.image, &targets, true, false)).is_ok();
        assert_eq!(gone, self.model.contains_key(volume));
        let of_it = format!("{volume}@");
        self.model
            .retain(|name, _| name != volume && !name.starts_with(&of_it));
    }

    /// `closed`: in order; otherwise as after a kill, with everything flushed.
    fn reopen(&mut self, closed: bool) {
        if closed {
            block_on(self.pool.close(self.image)).unwrap();
        } else {
            block_on(self.pool.flush(self.image)).unwrap();
        }
        self.pool = open(self.image, false).unwrap();
    }

    fn compare(&self) {
        let listed = block_on(self.pool.list(self.image)).unwrap();
        let mut names: Vec<String> = listed.iter().map(|entry| entry.path.to_string()).collect();
        names.sort();
        assert_eq!(names, self.model.keys().cloned().collect::<Vec<_>>());
        let mut buffer = BlockBuf::zeroed(1);
        for (name, stamps) in &self.model {
            let attached = self.pool.attach(&path(name), true).unwrap();
            for choice in 0..LBAS {
                block_on(attached.read(self.image, lba(choice) * 4096, &mut buffer)).unwrap();
                let stamp = stamps[usize::try_from(choice).unwrap()];
                assert!(
                    buffer.iter().all(|byte| *byte == stamp),
                    "{name}, block {}: not {stamp}",
                    lba(choice)
                );
            }
            attached.detach();
        }
    }
}
