//! A pool's name and id: what a superblock says, and how a pool that nobody has open gets others.
//!
//! Metadata pages and journal blocks carry the metadata id, which stays, so a new name or id takes two writes of a
//! block, whatever the pool holds.

use super::Pool;
use crate::checkpoint::{read_superblocks, write_superblocks};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::host::Host;
use crate::name::Name;
use crate::units::PoolId;

/// What a pool is to be known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub id: PoolId,
}

/// What to do with a pool that was not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclosed {
    /// Refuse it: the ring of its last opening may hold acknowledged writes, and is found by the id.
    Refuse,
    /// It is a copy, as of a moment, of a pool that was open then. The ring is the original's, and the copy is what a
    /// power cut at that moment would have left.
    IsCopy,
}

impl Pool {
    /// Gives a pool another identity. Nobody has the pool open, and the caller has its lock.
    pub async fn identify<D: Device>(
        device: &D,
        device_blocks: u64,
        identity: &Identity,
        unclosed: Unclosed,
    ) -> Result<()> {
        let mut superblock = read_superblocks(device, device_blocks).await?.superblock;
        if !superblock.is_clean {
            match unclosed {
                Unclosed::Refuse => {
                    return Err(Error::with(
                        ErrorKind::Busy,
                        format!(
                            "pool {} was not closed, so it keeps its name and its id",
                            superblock.name
                        ),
                    ));
                }
                Unclosed::IsCopy => {
                    superblock.boot_id = [0; 16];
                    superblock.host = Host::default();
                    superblock.ring = None;
                }
            }
        }
        superblock.name = identity.name.clone();
        superblock.id = identity.id;
        // Younger than what it replaces, so that the one whole copy of an interrupted change is never in doubt.
        superblock.generation = superblock.generation.next();
        write_superblocks(device, &superblock, async || device.flush().await).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::device::memory::{Call, Memory, now};
    use crate::limits::POOL_BLOCKS_MIN;
    use crate::pool::{CreateOptions, OpenOptions, Redirect, RingPlace, VolumeOptions};
    use crate::units::Timestamp;
    use std::sync::Arc;

    const BLOCKS: u64 = POOL_BLOCKS_MIN;

    fn identity(name: &str, id: u8) -> Identity {
        Identity {
            name: name.parse().unwrap(),
            id: PoolId([id; 16]),
        }
    }

    fn label(device: &Memory) -> Identity {
        let label = now(Pool::label(device, BLOCKS)).unwrap();
        Identity {
            name: label.name,
            id: label.id,
        }
    }

    fn open(device: &Memory) -> Pool {
        let options = OpenOptions {
            read_only: false,
            device_blocks: BLOCKS,
            ring: RingPlace::Nowhere,
            clock: Arc::new(SystemClock::new()),
        };
        now(Pool::open(device, options)).unwrap()
    }

    /// A device with the pool `p`, id 1, which has this volume.
    fn device(volume: &str) -> Memory {
        let device = Memory::default();
        let options = CreateOptions {
            name: "p".parse().unwrap(),
            id: PoolId([1; 16]),
            blocks: BLOCKS,
            created: Timestamp(1),
        };
        now(Pool::create(&device, options)).unwrap();
        let pool = open(&device);
        create(&device, &pool, volume);
        now(pool.close(&device)).unwrap();
        device
    }

    fn create(device: &Memory, pool: &Pool, volume: &str) {
        let options = VolumeOptions {
            bytes: 1 << 20,
            sector_bytes: 4096,
            redirect: Redirect::default(),
        };
        now(pool.create_volume(device, &volume.parse().unwrap(), options)).unwrap();
    }

    fn volumes(device: &Memory, pool: &Pool) -> Vec<String> {
        let report = now(pool.check(device, &mut |_, _| {})).unwrap();
        assert_eq!(report.exit_code(), 0, "{report:?}");
        let entries = pool.outline().into_iter();
        entries.map(|entry| entry.path.to_string()).collect()
    }

    #[test]
    fn a_pool_with_another_identity_holds_what_it_held() {
        let device = device("v");
        for (round, other) in [identity("q", 1), identity("q", 2), identity("p", 1)]
            .into_iter()
            .enumerate()
        {
            now(Pool::identify(&device, BLOCKS, &other, Unclosed::Refuse)).unwrap();
            assert_eq!(label(&device), other);
            // Written to, checkpointed and read again, under pages of before and pages of since then.
            let pool = open(&device);
            create(&device, &pool, &format!("w{round}"));
            now(pool.close(&device)).unwrap();
            let pool = open(&device);
            assert_eq!(volumes(&device, &pool).len(), round + 2);
            now(pool.close(&device)).unwrap();
        }
    }

    #[test]
    fn a_pool_that_was_not_closed_is_refused_and_a_copy_of_it_replays_its_journal() {
        let device = device("v");
        let pool = open(&device);
        create(&device, &pool, "w");
        drop(pool);
        let before = label(&device);
        let other = identity("q", 2);
        let refused = now(Pool::identify(&device, BLOCKS, &other, Unclosed::Refuse));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(label(&device), before);
        now(Pool::identify(&device, BLOCKS, &other, Unclosed::IsCopy)).unwrap();
        let pool = open(&device);
        assert_eq!(volumes(&device, &pool), ["v", "w"]);
        assert_eq!((pool.name(), pool.id()), (other.name, other.id));
    }

    #[test]
    fn an_interrupted_change_leaves_the_old_or_the_new_identity() {
        let other = identity("q", 2);
        let flushes = {
            let device = device("v");
            device.take_calls();
            now(Pool::identify(&device, BLOCKS, &other, Unclosed::Refuse)).unwrap();
            device.take_calls()
        };
        assert_eq!(
            flushes.iter().filter(|call| **call == Call::Flush).count(),
            2
        );
        for at in flushes {
            if matches!(at, Call::Read(..)) {
                continue;
            }
            let device = device("v");
            let before = label(&device);
            device.refuse(Some(at));
            now(Pool::identify(&device, BLOCKS, &other, Unclosed::Refuse)).unwrap_err();
            device.cut_power();
            device.refuse(None);
            let found = label(&device);
            assert!(found == before || found == other, "{at:?}: {found:?}");
            let pool = open(&device);
            assert_eq!(volumes(&device, &pool), ["v"]);
        }
    }
}
