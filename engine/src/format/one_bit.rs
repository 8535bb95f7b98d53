//! Telling a decayed block from a torn one: whether a single flipped bit explains that its CRC does not hold.
//!
//! A CRC is linear: the difference between the stored and the computed one depends on the flipped bits alone, and
//! within a block no two single bits give the same.

use crate::units::BLOCK_LEN;
use std::ops::Range;

/// What a byte adds to the CRC, reflected, polynomial 0x04C11DB7.
const TABLE: [u32; 256] = table();

#[expect(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "computed when compiling, where running off the end is an error"
)]
const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

fn add_zero_byte(crc: u32) -> u32 {
    let [low, ..] = crc.to_le_bytes();
    (crc >> 8) ^ TABLE.get(usize::from(low)).copied().unwrap_or(0)
}

/// The byte and the mask of the one bit whose flip explains the difference between the CRC that `block` carries in
/// `field` and the one computed over the rest; none if none does.
pub(crate) fn flipped_bit(
    block: &[u8; BLOCK_LEN],
    field: &Range<usize>,
    computed: u32,
) -> Option<(usize, u8)> {
    let stored = block.get(field.clone())?.first_chunk().copied();
    let difference = u32::from_le_bytes(stored?) ^ computed;
    if difference.is_power_of_two() {
        let bit = usize::try_from(difference.trailing_zeros()).ok()?;
        return Some((field.start + bit / 8, 1 << (bit % 8)));
    }
    // What each bit of the last byte would add, then of the one before it, and so on.
    let mut adds = [0_u32; 8];
    for (bit, add) in adds.iter_mut().enumerate() {
        *add = TABLE.get(1 << bit).copied().unwrap_or(0);
    }
    for byte in (0..BLOCK_LEN).rev() {
        if !field.contains(&byte)
            && let Some(bit) = adds.iter().position(|add| *add == difference)
        {
            return Some((byte, 1 << bit));
        }
        adds = adds.map(add_zero_byte);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::bytes::crc_without;

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn every_single_flipped_bit_is_found_and_two_never_look_like_one() {
        let field = 4..8;
        let mut block = [0; BLOCK_LEN];
        let mut rng = 1_u64;
        for byte in &mut block {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = rng.to_le_bytes()[7];
        }
        let crc = crc_without(&block, field.clone());
        block[field.clone()].copy_from_slice(&crc.to_le_bytes());
        for bit in 0..BLOCK_LEN * 8 {
            if bit % 97 > 1 && bit > 100 {
                continue;
            }
            let (byte, mask) = (bit / 8, 1 << (bit % 8));
            block[byte] ^= mask;
            let computed = crc_without(&block, field.clone());
            assert_eq!(flipped_bit(&block, &field, computed), Some((byte, mask)));
            block[(byte + 700) % BLOCK_LEN] ^= 4;
            let computed = crc_without(&block, field.clone());
            assert_eq!(flipped_bit(&block, &field, computed), None);
            block[(byte + 700) % BLOCK_LEN] ^= 4;
            block[byte] ^= mask;
        }
    }
}
