//! The mark that the driver keeps with each of our devices: 64 bits, of which the upper 16 say that the device is ours,
//! the next 32 what it serves, and the last 16 are random, to tell two devices of the same volume apart.

use super::steps;
use crate::error::Result;
use crate::units::{PoolId, VolumeId};

/// The upper 16 bits: "bk". Versions before this layout had "bkfk" in the upper 32.
const OURS: u64 = 0x626b << 48;
const OURS_MASK: u64 = 0xffff << 48;
const SERVED_MASK: u64 = 0xffff_ffff << 16;

/// The mark of a new device.
pub(super) fn draw(pool: PoolId, volume: VolumeId) -> Result<u64> {
    let random = u64::from(steps::random()?) & 0xffff;
    Ok(OURS | served(pool, volume) | random)
}

/// Whether a mark is one of this program's.
pub(super) fn is_ours(mark: u64) -> bool {
    mark & OURS_MASK == OURS
}

/// Whether the device of this mark serves this volume or snapshot. Another one is taken for it once in four billion times.
pub(super) fn is_of(mark: u64, pool: PoolId, volume: VolumeId) -> bool {
    is_ours(mark) && mark & SERVED_MASK == served(pool, volume)
}

fn served(pool: PoolId, volume: VolumeId) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&pool.0);
    hasher.update(&volume.0.to_le_bytes());
    u64::from(hasher.finalize()) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_tells_our_devices_and_what_they_serve() {
        let (pool, volume) = (PoolId([7; 16]), VolumeId(3));
        let mark = draw(pool, volume).unwrap();
        assert!(is_ours(mark) && is_of(mark, pool, volume));
        assert!(!is_of(mark, pool, VolumeId(4)));
        assert!(!is_of(mark, PoolId([8; 16]), volume));
        assert!(!is_ours(0));
        let of_an_older_version = 0x626b_666b_0000_0007;
        assert!(is_ours(of_an_older_version));
        assert!(!is_of(of_an_older_version, pool, volume));
    }
}
