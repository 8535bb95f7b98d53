//! A request of the transmission: taken apart, and held against the export.
//!
//! Invariant: no I/O, and nothing is refused before it is known how many bytes of payload follow the request.

use super::handshake::Agreed;
use super::wire::{Errno, Fields, REQUEST_MAGIC, command, flag};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::NBD_PAYLOAD_BYTES_MAX;

/// Bytes in a request, without its payload.
pub(super) const REQUEST_BYTES: usize = 28;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes {
        /// Blocks stay, or become, allocated.
        keep_space: bool,
        /// Refuse it if it takes as long as writing.
        only_if_fast: bool,
    },
    BlockStatus {
        /// One run is enough.
        only_one: bool,
    },
    Unknown,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Chosen by the client, sent back with the answer.
    pub(super) cookie: u64,
    /// What to do.
    pub(super) command: Command,
    /// In bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) bytes: u32,
    /// Whether it is to be durable when it is answered.
    pub(super) is_durable: bool,
    has_unknown_flags: bool,
}

/// What a request is held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The export's size, now.
    pub(super) bytes: u64,
    /// What offsets and lengths are multiples of.
    pub(super) sector_bytes: u32,
    /// Whether changes are refused.
    pub(super) is_read_only: bool,
    /// What the handshake came to.
    pub(super) agreed: Agreed,
}

impl Request {
    /// Takes a request apart. An error means that the client and this server have lost each other.
    pub(super) fn decode(bytes: [u8; REQUEST_BYTES]) -> Result<Self> {
        let mut fields = Fields(&bytes);
        let magic = fields.u32();
        let (flags, number) = (fields.u16().unwrap_or(0), fields.u16().unwrap_or(u16::MAX));
        let (cookie, offset) = (fields.u64().unwrap_or(0), fields.u64().unwrap_or(0));
        let length = fields.u32().unwrap_or(0);
        if magic != Some(REQUEST_MAGIC) {
            return Err(Error::with(ErrorKind::Invalid, "not a request of NBD"));
        }
        let has = |flag| flags & flag != 0;
        let (command, known) = match number {
            command::READ => (Command::Read, flag::DF),
            command::WRITE => (Command::Write, 0),
            command::DISC => (Command::Disconnect, u16::MAX),
            command::FLUSH => (Command::Flush, 0),
            command::TRIM => (Command::Trim, 0),
            command::WRITE_ZEROES => (
                Command::WriteZeroes {
                    keep_space: has(flag::NO_HOLE),
                    only_if_fast: has(flag::FAST_ZERO),
                },
                flag::NO_HOLE | flag::FAST_ZERO,
            ),
            command::BLOCK_STATUS => (
                Command::BlockStatus {
                    only_one: has(flag::REQ_ONE),
                },
                flag::REQ_ONE,
            ),
            _ => (Command::Unknown, u16::MAX),
        };
        Ok(Self {
            cookie,
            command,
            offset,
            bytes: length,
            is_durable: has(flag::FUA),
            // FUA is allowed with every request, and means something with those that change something.
            has_unknown_flags: flags & !(known | flag::FUA) != 0,
        })
    }

    /// Bytes that follow the request. An error if those are more than are ever read.
    pub(super) fn payload_bytes(&self) -> Result<usize> {
        if self.command != Command::Write {
            return Ok(0);
        }
        if self.bytes > NBD_PAYLOAD_BYTES_MAX {
            let message = format!(
                "a write of {} bytes; at most {NBD_PAYLOAD_BYTES_MAX} are taken",
                self.bytes
            );
            return Err(Error::with(ErrorKind::Invalid, message));
        }
        Ok(usize::try_from(self.bytes).unwrap_or(usize::MAX))
    }

    /// Bytes of memory that it takes from here to its answer.
    pub(super) fn memory_bytes(&self) -> usize {
        if !matches!(self.command, Command::Read | Command::Write) {
            return 0;
        }
        usize::try_from(self.bytes.min(NBD_PAYLOAD_BYTES_MAX)).unwrap_or(usize::MAX)
    }

    /// Whether it changes the volume.
    fn changes(&self) -> bool {
        matches!(
            self.command,
            Command::Write | Command::Trim | Command::WriteZeroes { .. }
        )
    }

    /// Whether it waits for the device's flush.
    pub(super) fn waits_for_flush(&self) -> bool {
        self.command == Command::Flush || (self.changes() && self.is_durable)
    }

    /// Why it cannot be carried out, if so.
    pub(super) fn check(&self, bounds: &Bounds) -> Result<(), Errno> {
        if self.has_unknown_flags {
            return Err(Errno::Inval);
        }
        let beyond_end = match self.command {
            Command::Flush | Command::Disconnect => return Ok(()),
            Command::Unknown => return Err(Errno::Inval),
            Command::Write | Command::WriteZeroes { .. } => Errno::NoSpc,
            Command::Read | Command::Trim | Command::BlockStatus { .. } => Errno::Inval,
        };
        if self.changes() && bounds.is_read_only {
            return Err(Errno::Perm);
        }
        let end = self.offset.checked_add(u64::from(self.bytes));
        if end.is_none_or(|end| end > bounds.bytes) {
            return Err(beyond_end);
        }
        let sector = u64::from(bounds.sector_bytes);
        let is_aligned =
            self.offset.is_multiple_of(sector) && u64::from(self.bytes).is_multiple_of(sector);
        let is_too_long = self.command == Command::Read && self.bytes > NBD_PAYLOAD_BYTES_MAX;
        let is_status = matches!(self.command, Command::BlockStatus { .. });
        if !is_aligned || is_too_long {
            return Err(Errno::Inval);
        }
        if is_status && (self.bytes == 0 || !bounds.agreed.allocation) {
            return Err(Errno::Inval);
        }
        // Zeros that stay allocated are written.
        let is_slow_but_must_be_fast = matches!(
            self.command,
            Command::WriteZeroes {
                keep_space: true,
                only_if_fast: true,
            }
        );
        if is_slow_but_must_be_fast {
            return Err(Errno::NotSup);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Message;
    use super::*;

    const BOUNDS: Bounds = Bounds {
        bytes: 1 << 20,
        sector_bytes: 4096,
        is_read_only: false,
        agreed: Agreed {
            structured: true,
            allocation: true,
        },
    };

    fn request(number: u16, flags: u16, offset: u64, bytes: u32) -> Request {
        let message = Message::default().u32(REQUEST_MAGIC).u16(flags).u16(number);
        let message = message.u64(77).u64(offset).u32(bytes);
        Request::decode(message.0.try_into().unwrap()).unwrap()
    }

    fn checked(number: u16, flags: u16, offset: u64, bytes: u32) -> Result<(), Errno> {
        request(number, flags, offset, bytes).check(&BOUNDS)
    }

    #[test]
    fn another_magic_is_an_error() {
        assert!(Request::decode([0; REQUEST_BYTES]).is_err());
        assert!(Request::decode([0xff; REQUEST_BYTES]).is_err());
    }

    #[test]
    fn what_lies_beyond_the_end_has_the_errno_of_its_command() {
        for (offset, bytes) in [
            (1 << 20, 4096),
            (u64::MAX - 4095, 4096),
            (0, (1 << 20) + 4096),
        ] {
            assert_eq!(checked(command::READ, 0, offset, bytes), Err(Errno::Inval));
            assert_eq!(checked(command::TRIM, 0, offset, bytes), Err(Errno::Inval));
            assert_eq!(checked(command::WRITE, 0, offset, bytes), Err(Errno::NoSpc));
            assert_eq!(
                checked(command::WRITE_ZEROES, 0, offset, bytes),
                Err(Errno::NoSpc)
            );
            assert_eq!(
                checked(command::BLOCK_STATUS, 0, offset, bytes),
                Err(Errno::Inval)
            );
        }
        assert_eq!(checked(command::WRITE, 0, (1 << 20) - 4096, 4096), Ok(()));
        // A flush has no range.
        assert_eq!(checked(command::FLUSH, 0, u64::MAX, u32::MAX), Ok(()));
    }

    #[test]
    fn parts_of_sectors_are_refused() {
        assert_eq!(checked(command::READ, 0, 512, 4096), Err(Errno::Inval));
        assert_eq!(checked(command::WRITE, 0, 0, 4095), Err(Errno::Inval));
        let bounds = Bounds {
            sector_bytes: 512,
            ..BOUNDS
        };
        assert_eq!(request(command::READ, 0, 512, 1024).check(&bounds), Ok(()));
    }

    #[test]
    fn a_read_only_export_refuses_every_change() {
        let bounds = Bounds {
            is_read_only: true,
            ..BOUNDS
        };
        for number in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(request(number, 0, 0, 4096).check(&bounds), Err(Errno::Perm));
        }
        for number in [command::READ, command::FLUSH, command::BLOCK_STATUS] {
            assert_eq!(request(number, 0, 0, 4096).check(&bounds), Ok(()));
        }
    }

    #[test]
    fn flags_are_known_by_command() {
        assert_eq!(
            checked(command::READ, flag::FUA | flag::DF, 0, 4096),
            Ok(())
        );
        assert_eq!(
            checked(command::READ, flag::NO_HOLE, 0, 4096),
            Err(Errno::Inval)
        );
        assert_eq!(checked(command::WRITE, 1 << 5, 0, 4096), Err(Errno::Inval));
        assert_eq!(
            checked(command::WRITE_ZEROES, flag::FAST_ZERO, 0, 4096),
            Ok(())
        );
        let slow = flag::FAST_ZERO | flag::NO_HOLE;
        assert_eq!(
            checked(command::WRITE_ZEROES, slow, 0, 4096),
            Err(Errno::NotSup)
        );
        for number in [5, 8, 9, u16::MAX] {
            assert_eq!(checked(number, 0, 0, 4096), Err(Errno::Inval));
        }
    }

    #[test]
    fn the_status_is_for_those_who_selected_it() {
        let bounds = Bounds {
            agreed: Agreed::default(),
            ..BOUNDS
        };
        let asked = request(command::BLOCK_STATUS, flag::REQ_ONE, 0, 4096);
        assert_eq!(asked.check(&bounds), Err(Errno::Inval));
        assert_eq!(asked.check(&BOUNDS), Ok(()));
        assert_eq!(checked(command::BLOCK_STATUS, 0, 0, 0), Err(Errno::Inval));
    }

    #[test]
    fn only_a_write_carries_a_payload_and_a_limited_one() {
        assert_eq!(
            request(command::WRITE, 0, 1, 100).payload_bytes().unwrap(),
            100
        );
        assert!(
            request(command::WRITE, 0, 0, u32::MAX)
                .payload_bytes()
                .is_err()
        );
        for number in (0..16).filter(|number| *number != command::WRITE) {
            assert_eq!(request(number, 0, 0, u32::MAX).payload_bytes().unwrap(), 0);
            assert!(request(number, 0, 0, u32::MAX).memory_bytes() <= 32 << 20);
        }
        assert_eq!(checked(command::READ, 0, 0, u32::MAX), Err(Errno::Inval));
    }
}
