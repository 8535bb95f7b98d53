//! What a device is to the kernel: its sizes, its limits, and the driver's features that it asks for.

use crate::units::{BLOCK_BYTES, SECTOR_BYTES};
use libublk::sys;
use std::mem::size_of;

/// Bytes in each tag's buffer, and so in the longest request.
pub(super) const IO_BUFFER_BYTES: u32 = 256 * 1024;
/// The most tags of one queue.
pub(super) const DEPTH_MAX: u16 = 4096;
/// The longest discard or write-zeroes, in sectors (1 GiB).
const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Log2 of a physical block, which is also what the device reports as its best I/O size.
const BLOCK_SHIFT: u8 = 12;

const _: () = assert!(1 << BLOCK_SHIFT == BLOCK_BYTES);
const _: () = assert!((IO_BUFFER_BYTES as u64).is_multiple_of(BLOCK_BYTES));

/// What the features that this program asks for are called, and their bits.
pub(super) const WANTED: [(u64, &str); 5] = [
    (sys::UBLK_F_USER_RECOVERY as u64, "USER_RECOVERY"),
    (
        sys::UBLK_F_USER_RECOVERY_REISSUE as u64,
        "USER_RECOVERY_REISSUE",
    ),
    (sys::UBLK_F_UPDATE_SIZE as u64, "UPDATE_SIZE"),
    (sys::UBLK_F_QUIESCE as u64, "QUIESCE"),
    (sys::UBLK_F_AUTO_BUF_REG as u64, "AUTO_BUF_REG"),
];

/// Both bits that a device needs to outlive its daemon without an I/O error.
pub(super) const RECOVERY: u64 =
    (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// The flags to ask for on a driver with `features`, `None` for one too old to say.
pub(super) fn flags(features: Option<u64>) -> u64 {
    let wanted = WANTED.iter().fold(0, |all, (bit, _)| all | bit);
    let flags = features.unwrap_or(0) & wanted;
    // QUIESCE and REISSUE are extensions of USER_RECOVERY: without it the driver refuses them.
    if flags & u64::from(sys::UBLK_F_USER_RECOVERY) == 0 {
        return flags & !(RECOVERY | u64::from(sys::UBLK_F_QUIESCE));
    }
    flags
}

/// `struct ublk_params` of `linux/ublk_cmd.h` as of 6.15, to which libublk's bindings do not reach.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Params {
    len: u32,
    types: u32,
    basic: sys::ublk_param_basic,
    discard: sys::ublk_param_discard,
    devt: sys::ublk_param_devt,
    zoned: sys::ublk_param_zoned,
    /// Alignment of clients' memory, less one.
    dma_alignment: u32,
    dma_padding: [u8; 4],
    /// Where the next part begins, which is not given.
    padding: [u8; 4],
}

/// Where the fields stand that older drivers know, and what these bytes are to older drivers.
const _: () = {
    assert!(std::mem::offset_of!(Params, zoned) == std::mem::offset_of!(sys::ublk_params, zoned));
    assert!(std::mem::offset_of!(Params, dma_alignment) == 108);
    assert!(size_of::<Params>() == 120);
};

/// The geometry of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) bytes: u64,
    pub(super) sector_bytes: u32,
    pub(super) read_only: bool,
    /// What the pool file asks of the memory that it is read into and written from.
    pub(super) memory_alignment: u32,
}

impl Geometry {
    /// As the driver takes it, for a device with these `UBLK_F_` bits. The FUA attribute is left off: the kernel then sends
    /// a write and a flush instead.
    pub(super) fn params(self, flags: u64) -> Params {
        let read_only = if self.read_only {
            sys::UBLK_ATTR_READ_ONLY
        } else {
            0
        };
        let mut params = Params {
            len: u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX),
            types: sys::UBLK_PARAM_TYPE_BASIC,
            basic: sys::ublk_param_basic {
                attrs: sys::UBLK_ATTR_VOLATILE_CACHE | read_only,
                logical_bs_shift: u8::try_from(self.sector_bytes.trailing_zeros())
                    .unwrap_or(BLOCK_SHIFT),
                physical_bs_shift: BLOCK_SHIFT,
                io_opt_shift: BLOCK_SHIFT,
                io_min_shift: BLOCK_SHIFT,
                max_sectors: IO_BUFFER_BYTES >> SECTOR_BYTES.trailing_zeros(),
                dev_sectors: self.bytes / SECTOR_BYTES,
                ..sys::ublk_param_basic::default()
            },
            ..Params::default()
        };
        if !self.read_only {
            // This also gates write-zeroes.
            params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
            params.discard = sys::ublk_param_discard {
                discard_granularity: 1 << BLOCK_SHIFT,
                max_discard_sectors: DISCARD_SECTORS_MAX,
                max_write_zeroes_sectors: DISCARD_SECTORS_MAX,
                max_discard_segments: 1,
                ..sys::ublk_param_discard::default()
            };
        }
        if flags & u64::from(sys::UBLK_F_AUTO_BUF_REG) != 0 {
            params.len = u32::try_from(size_of::<Params>()).unwrap_or(u32::MAX);
            params.types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma_alignment = self.memory_alignment.saturating_sub(1);
        }
        params
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_asked_only_for_what_it_has() {
        assert_eq!(flags(None), 0);
        assert_eq!(flags(Some(0)), 0);
        assert_eq!(
            flags(Some(u64::MAX)),
            WANTED.iter().map(|(bit, _)| bit).sum::<u64>()
        );
        assert_eq!(flags(Some(u64::from(sys::UBLK_F_QUIESCE))), 0);
    }

    #[test]
    fn memory_is_aligned_for_the_pool_file_where_clients_pages_are_registered() {
        let geometry = Geometry {
            bytes: 1 << 30,
            sector_bytes: 512,
            read_only: false,
            memory_alignment: 512,
        };
        let params = geometry.params(u64::from(sys::UBLK_F_AUTO_BUF_REG));
        assert_eq!(params.dma_alignment, 511);
        assert_ne!(params.types & sys::UBLK_PARAM_TYPE_DMA_ALIGN, 0);
        assert_eq!(params.len as usize, size_of::<Params>());
        assert_eq!(geometry.params(0).types & sys::UBLK_PARAM_TYPE_DMA_ALIGN, 0);
    }

    #[test]
    fn a_read_only_device_takes_no_discards() {
        let geometry = Geometry {
            bytes: 1 << 40,
            sector_bytes: 512,
            read_only: true,
            memory_alignment: 512,
        };
        let params = geometry.params(0);
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
        assert_eq!(params.basic.logical_bs_shift, 9);
        assert_eq!(params.basic.dev_sectors, 1 << 31);
        assert_eq!(
            params.basic.attrs,
            sys::UBLK_ATTR_READ_ONLY | sys::UBLK_ATTR_VOLATILE_CACHE
        );
    }
}
