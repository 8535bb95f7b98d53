//! One request of the kernel: taken apart, handed to the volume, its result as the kernel wants it.

use crate::device::{Destination, Device, Source};
use crate::error::{Error, ErrorKind};
use crate::pool::{Attached, Transfer};
use crate::units::SECTOR_BYTES;
use libublk::sys;
use std::sync::atomic::{AtomicU64, Ordering};

/// Requests that this process has refused for other reasons than a full pool.
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// What a client asks of the device; offsets and lengths in bytes, in whole logical sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        offset: u64,
        bytes: u64,
    },
    Write {
        offset: u64,
        bytes: u64,
    },
    Flush,
    Discard {
        offset: u64,
        bytes: u64,
    },
    WriteZeroes {
        offset: u64,
        bytes: u64,
        keep_space: bool,
    },
    Unknown {
        operation: u32,
    },
}

impl Request {
    /// Takes the kernel's descriptor apart. Its flags are not shifted, and a flush has no meaningful range.
    pub(super) fn decode(descriptor: &sys::ublksrv_io_desc) -> Self {
        let bytes = u64::from(descriptor.nr_sectors) * SECTOR_BYTES;
        let operation = descriptor.op_flags & 0xff;
        if operation == sys::UBLK_IO_OP_FLUSH {
            return Self::Flush;
        }
        let Some(offset) = descriptor.start_sector.checked_mul(SECTOR_BYTES) else {
            return Self::Unknown { operation };
        };
        match operation {
            sys::UBLK_IO_OP_READ => Self::Read { offset, bytes },
            sys::UBLK_IO_OP_WRITE => Self::Write { offset, bytes },
            sys::UBLK_IO_OP_DISCARD => Self::Discard { offset, bytes },
            sys::UBLK_IO_OP_WRITE_ZEROES => Self::WriteZeroes {
                offset,
                bytes,
                keep_space: descriptor.op_flags & sys::UBLK_IO_F_NOUNMAP != 0,
            },
            _ => Self::Unknown { operation },
        }
    }

    /// The offset and the length of a read or a write.
    pub(super) fn transfer(self) -> Option<(Transfer, u64, u32)> {
        let (transfer, offset, bytes) = match self {
            Self::Read { offset, bytes } => (Transfer::Read, offset, bytes),
            Self::Write { offset, bytes } => (Transfer::Write, offset, bytes),
            Self::Flush
            | Self::Discard { .. }
            | Self::WriteZeroes { .. }
            | Self::Unknown { .. } => return None,
        };
        Some((transfer, offset, u32::try_from(bytes).ok()?))
    }

    /// Carries it out: bytes moved for a read or a write, 0 for the others, or a negative errno. `room` gives the place of
    /// so many bytes, if there is one.
    pub(super) async fn serve<D, P>(
        self,
        attached: &Attached,
        device: &D,
        room: impl FnOnce(usize) -> Option<P>,
    ) -> i32
    where
        D: Device,
        P: Source<D> + Destination<D>,
    {
        let (done, moved) = match self {
            Self::Read { offset, bytes } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                let Some(mut place) = room(bytes) else {
                    return -libc::EINVAL;
                };
                (attached.read(device, offset, &mut place).await, bytes)
            }
            Self::Write { offset, bytes } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                let Some(place) = room(bytes) else {
                    return -libc::EINVAL;
                };
                (attached.write(device, offset, &place).await, bytes)
            }
            Self::Flush => (attached.flush(device).await, 0),
            Self::Discard { offset, bytes } => (attached.discard(device, offset, bytes).await, 0),
            Self::WriteZeroes {
                offset,
                bytes,
                keep_space,
            } => (
                attached
                    .write_zeroes(device, offset, bytes, keep_space)
                    .await,
                0,
            ),
            Self::Unknown { .. } => return -libc::EOPNOTSUPP,
        };
        match done {
            Ok(()) => i32::try_from(moved).unwrap_or(i32::MAX),
            Err(error) => self.refuse(&error),
        }
    }

    /// The errno for the client. A full pool is the client's business alone; the rest is worth a line, but a broken
    /// pool fails every request, so the lines get rarer.
    #[cold]
    fn refuse(self, error: &Error) -> i32 {
        if error.kind() != ErrorKind::OutOfSpace {
            let count = REFUSED.fetch_add(1, Ordering::Relaxed) + 1;
            if count.is_power_of_two() {
                tracing::warn!(request = ?self, count, "a request failed: {}", Causes(error));
            }
        }
        -error.errno()
    }
}

/// An error followed by what caused it.
struct Causes<'a>(&'a Error);

impl std::fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = std::error::Error::source(self.0);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(op_flags: u32, start_sector: u64, nr_sectors: u32) -> Request {
        Request::decode(&sys::ublksrv_io_desc {
            op_flags,
            nr_sectors,
            start_sector,
            addr: 0,
        })
    }

    #[test]
    fn ranges_beyond_4_gib_keep_their_length() {
        let whole = Request::Discard {
            offset: 1 << 40,
            bytes: u64::from(u32::MAX) * 512,
        };
        assert_eq!(decode(sys::UBLK_IO_OP_DISCARD, 1 << 31, u32::MAX), whole);
    }

    #[test]
    fn a_flush_ignores_its_sector() {
        assert_eq!(decode(sys::UBLK_IO_OP_FLUSH, u64::MAX, 0), Request::Flush);
    }

    #[test]
    fn flags_are_read_where_they_stand() {
        let zeroes = |flags| decode(sys::UBLK_IO_OP_WRITE_ZEROES | flags, 8, 8);
        let expected = |keep_space| Request::WriteZeroes {
            offset: 4096,
            bytes: 4096,
            keep_space,
        };
        assert_eq!(zeroes(sys::UBLK_IO_F_NOUNMAP), expected(true));
        assert_eq!(zeroes(sys::UBLK_IO_F_META), expected(false));
    }

    #[test]
    fn what_is_unknown_or_impossible_stays_unknown() {
        assert_eq!(decode(13, 0, 8), Request::Unknown { operation: 13 });
        let far = decode(sys::UBLK_IO_OP_READ, u64::MAX, 8);
        assert_eq!(
            far,
            Request::Unknown {
                operation: sys::UBLK_IO_OP_READ
            }
        );
    }
}
