//! Little-endian fields written to and read from a byte slice, in order, and the checksum over them; running off the end is an
//! error, not a panic.

use crate::error::{Error, Result};
use std::ops::Range;

/// The CRC of a block with the field that holds it taken as zeros.
pub(crate) fn crc_without(block: &[u8], field: Range<usize>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(block.get(..field.start).unwrap_or_default());
    hasher.update(&[0; 4]);
    hasher.update(block.get(field.end..).unwrap_or_default());
    hasher.finalize()
}

/// Writes fields one after the other into a slice that the caller made large enough.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    rest: &'a mut [u8],
}

impl<'a> Writer<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        Self { rest: bytes }
    }

    #[expect(
        clippy::panic,
        reason = "our own structures have a fixed size below that of their place"
    )]
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        let Some((field, rest)) = rest.split_at_mut_checked(bytes.len()) else {
            panic!("a structure outgrew its place on disk");
        };
        field.copy_from_slice(bytes);
        self.rest = rest;
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// The low 48 bits, which is all that a block address or a generation has.
    pub(crate) fn u48(&mut self, value: u64) {
        assert!(value >> 48 == 0, "{value} does not fit 48 bits");
        let bytes = value.to_le_bytes();
        self.bytes(bytes.first_chunk::<6>().unwrap_or(&[0; 6]));
    }
}

/// Reads fields one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (field, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| Error::corrupt("a structure ends before its last field"))?;
        self.rest = rest;
        Ok(field)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (field, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| Error::corrupt("a structure ends before its last field"))?;
        self.rest = rest;
        Ok(*field)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn u48(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes
            .iter_mut()
            .zip(self.array::<6>()?)
            .for_each(|(place, byte)| *place = byte);
        Ok(u64::from_le_bytes(bytes))
    }
}
