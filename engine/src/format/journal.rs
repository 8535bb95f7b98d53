//! A journal block: redo records between a header that chains it to the block before.
//!
//! A block is part of the journal if its CRC holds, its number is the next one, and the CRC it names is that of the
//! block before it. The chain makes blocks that an earlier, interrupted commit left further on worthless.

use super::bytes::{Reader, Writer, crc_without};
use super::one_bit::flipped_bit;
use super::record::{RECORD_BYTES_MAX, Record};
use crate::error::{Error, Result};
use crate::units::{BLOCK_LEN, MetadataId, Seq};

/// `BFjb`.
const MAGIC: u32 = u32::from_le_bytes(*b"BFjb");
const HEADER_BYTES: usize = 64;
const CRC_AT: std::ops::Range<usize> = 4..8;
/// Bytes before a record: its length and whether the next record belongs to the same change.
pub(crate) const FRAME_BYTES: usize = 3;
const _: () = assert!(FRAME_BYTES + RECORD_BYTES_MAX <= BLOCK_LEN - HEADER_BYTES);

/// A record with its frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Framed {
    pub(crate) record: Record,
    /// The record after this one belongs to the same change: neither counts without the other.
    pub(crate) continues: bool,
}

/// Appends a record with its frame.
pub(crate) fn encode_framed(record: &Record, continues: bool, out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&[0; FRAME_BYTES]);
    record.encode(out);
    let length = u16::try_from(out.len() - at - FRAME_BYTES).unwrap_or(u16::MAX);
    let [low, high] = length.to_le_bytes();
    if let Some(place) = out.get_mut(at..at + FRAME_BYTES) {
        place.copy_from_slice(&[low, high, u8::from(continues)]);
    }
}

/// The first record of `bytes` with its frame, and the rest.
pub(crate) fn split_framed(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let mut reader = Reader::new(bytes);
    let length = usize::from(reader.u16()?);
    bytes
        .split_at_checked(FRAME_BYTES + length)
        .ok_or_else(|| Error::corrupt("journal record: runs beyond its block"))
}

/// The record in a frame.
pub(crate) fn decode_framed(framed: &[u8]) -> Result<Framed> {
    let mut reader = Reader::new(framed);
    reader.u16()?;
    let continues = reader.u8()? != 0;
    Ok(Framed {
        record: Record::decode(reader.bytes(reader.remaining())?)?,
        continues,
    })
}

/// A journal block's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    pub(crate) metadata: MetadataId,
    /// Its number, ascending by one; its place is the number modulo the journal's size.
    pub(crate) number: u64,
    /// The CRC of the block before.
    pub(crate) chain: u32,
    /// The number of its first record.
    pub(crate) first_seq: Seq,
    /// The number of the first block of the commit that wrote it. Everything before that was flushed by then.
    pub(crate) batch: u64,
    /// The opening of the pool that wrote it, so that no two openings write the same block.
    pub(crate) session: u64,
}

/// Cuts framed records into blocks: whole records, as many as fit.
pub(crate) fn encode_blocks(
    mut framed: &[u8],
    mut header: BlockHeader,
) -> Result<(Vec<[u8; BLOCK_LEN]>, u32)> {
    let mut blocks = Vec::new();
    while !framed.is_empty() {
        let mut taken = 0;
        let mut records = 0;
        let mut rest = framed;
        while !rest.is_empty() {
            let (record, after) = split_framed(rest)?;
            if taken + record.len() > BLOCK_LEN - HEADER_BYTES {
                break;
            }
            taken += record.len();
            records += 1;
            rest = after;
        }
        let mut block = [0; BLOCK_LEN];
        let mut writer = Writer::new(&mut block);
        writer.u32(MAGIC);
        writer.u32(0);
        writer.bytes(&header.metadata.0);
        writer.u64(header.number);
        writer.u64(header.first_seq.0);
        writer.u32(header.chain);
        writer.u16(u16::try_from(taken).unwrap_or(u16::MAX));
        writer.u16(0);
        writer.u64(header.batch);
        writer.u64(header.session);
        writer.bytes(framed.get(..taken).unwrap_or_default());
        let crc = crc_without(&block, CRC_AT);
        if let Some(field) = block.get_mut(CRC_AT) {
            field.copy_from_slice(&crc.to_le_bytes());
        }
        blocks.push(block);
        header.number += 1;
        header.chain = crc;
        header.first_seq = Seq(header.first_seq.0 + records);
        framed = rest;
    }
    Ok((blocks, header.chain))
}

/// The framed records of `block` and its CRC, if it is the block that `header` describes; none if it is not.
pub(crate) fn decode_block(
    block: &[u8; BLOCK_LEN],
    header: BlockHeader,
) -> Result<Option<(&[u8], u32)>> {
    let mut reader = Reader::new(block);
    if reader.u32()? != MAGIC {
        return Ok(None);
    }
    let crc = reader.u32()?;
    let is_next = reader.array()? == header.metadata.0
        && reader.u64()? == header.number
        && reader.u64()? == header.first_seq.0
        && reader.u32()? == header.chain;
    if !is_next || crc != crc_without(block, CRC_AT) {
        return Ok(None);
    }
    let length = usize::from(reader.u16()?);
    reader.bytes(HEADER_BYTES - 46)?;
    Ok(Some((reader.bytes(length)?, crc)))
}

/// Whether `block` is the block that `header` describes but for one flipped bit: it was whole, and decayed. A block that
/// a power cut tore is another thing, whole sectors of it are old.
pub(crate) fn is_decayed(block: &[u8; BLOCK_LEN], header: BlockHeader) -> Result<bool> {
    let mut expected = [0; 48];
    let mut writer = Writer::new(&mut expected);
    writer.u32(MAGIC);
    writer.u32(0);
    writer.bytes(&header.metadata.0);
    writer.u64(header.number);
    writer.u64(header.first_seq.0);
    writer.u32(header.chain);
    let unlike: u32 = (0..44)
        .zip(block.iter().zip(&expected))
        .filter(|(at, _)| !CRC_AT.contains(at))
        .map(|(_, (found, expected))| (found ^ expected).count_ones())
        .sum();
    if unlike > 1 {
        return Ok(false);
    }
    let Some((byte, mask)) = flipped_bit(block, &CRC_AT, crc_without(block, CRC_AT)) else {
        return Ok(false);
    };
    let mut mended = *block;
    if let Some(byte) = mended.get_mut(byte) {
        *byte ^= mask;
    }
    Ok(decode_block(&mended, header)?.is_some())
}

/// For any block: its number and its commit's first, if it is a whole journal block of the pool.
pub(crate) fn decode_number(
    block: &[u8; BLOCK_LEN],
    metadata: MetadataId,
) -> Result<Option<(u64, u64)>> {
    let mut reader = Reader::new(block);
    let is_ours = reader.u32()? == MAGIC
        && reader.u32()? == crc_without(block, CRC_AT)
        && reader.array()? == metadata.0;
    if !is_ours {
        return Ok(None);
    }
    let number = reader.u64()?;
    reader.bytes(16)?;
    Ok(Some((number, reader.u64()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Lba, Pba, Timestamp, VolumeId};

    fn records() -> Vec<Record> {
        let name: crate::name::Name = "x".repeat(crate::limits::NAME_BYTES_MAX).parse().unwrap();
        let (a, b, c) = (VolumeId(1), VolumeId(2), VolumeId(3));
        let created = Timestamp(7);
        vec![
            Record::Map {
                volume: a,
                lba: Lba(5),
                pba: Pba(9),
                count: 3,
            },
            Record::Unmap {
                volume: a,
                lba: Lba(5),
                count: 3,
            },
            Record::Create {
                id: a,
                name: name.clone(),
                bytes: 4096,
                sector_bytes: 512,
                redirects_always: true,
                created,
            },
            Record::Snapshot {
                volume: a,
                id: b,
                name: name.clone(),
                created,
            },
            Record::Clone {
                snapshot: b,
                id: c,
                name: name.clone(),
                created,
            },
            Record::Rollback {
                volume: a,
                snapshot: b,
                reclaim: c,
            },
            Record::Remove { id: a },
            Record::RemoveAll {
                ids: vec![a, VolumeId(a.0 + 1), VolumeId(a.0 + 200), VolumeId(1 << 61)],
            },
            Record::Rename {
                id: a,
                name: name.clone(),
            },
            Record::Resize { id: a, bytes: 8192 },
            Record::Hold {
                snapshot: b,
                id: c,
                created,
                tag: name,
            },
            Record::Release { id: c },
        ]
    }

    #[test]
    fn records_round_trip_through_blocks() {
        let mut framed = Vec::new();
        let mut expected = Vec::new();
        for round in 0..20 {
            for record in records() {
                encode_framed(&record, round % 2 == 0, &mut framed);
                expected.push(Framed {
                    record,
                    continues: round % 2 == 0,
                });
            }
        }
        let mut header = BlockHeader {
            metadata: MetadataId([1; 16]),
            number: 40,
            chain: 5,
            first_seq: Seq(100),
            batch: 0,
            session: 1,
        };
        let (blocks, last) = encode_blocks(&framed, header).unwrap();
        assert!(blocks.len() > 1);
        let mut found = Vec::new();
        for block in &blocks {
            let (mut rest, crc) = decode_block(block, header)
                .unwrap()
                .expect("the next block");
            while !rest.is_empty() {
                let (one, after) = split_framed(rest).unwrap();
                found.push(decode_framed(one).unwrap());
                header.first_seq = header.first_seq.next();
                rest = after;
            }
            header.number += 1;
            header.chain = crc;
        }
        assert_eq!(header.chain, last);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_block_of_another_history_ends_the_journal() {
        let mut framed = Vec::new();
        encode_framed(&Record::Remove { id: VolumeId(1) }, false, &mut framed);
        let header = BlockHeader {
            metadata: MetadataId([1; 16]),
            number: 4,
            chain: 5,
            first_seq: Seq(1),
            batch: 0,
            session: 1,
        };
        let (blocks, _) = encode_blocks(&framed, header).unwrap();
        for other in [
            BlockHeader {
                metadata: MetadataId([2; 16]),
                ..header
            },
            BlockHeader {
                number: 5,
                ..header
            },
            BlockHeader { chain: 6, ..header },
            BlockHeader {
                first_seq: Seq(2),
                ..header
            },
        ] {
            assert_eq!(decode_block(&blocks[0], other).unwrap(), None);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn a_block_with_one_flipped_bit_is_decayed_and_a_torn_one_is_not() {
        let mut framed = Vec::new();
        for record in records() {
            encode_framed(&record, false, &mut framed);
        }
        let header = BlockHeader {
            metadata: MetadataId([1; 16]),
            number: 4,
            chain: 5,
            first_seq: Seq(1),
            batch: 4,
            session: 1,
        };
        let (blocks, _) = encode_blocks(&framed, header).unwrap();
        let mut block = blocks[0];
        assert!(!is_decayed(&block, header).unwrap());
        for bit in (0..BLOCK_LEN * 8).step_by(61).chain(0..600) {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(is_decayed(&block, header).unwrap(), "bit {bit}");
            assert!(decode_block(&block, header).unwrap().is_none(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
        block[512..].fill(0);
        assert!(!is_decayed(&block, header).unwrap());
        assert!(!is_decayed(&[0; BLOCK_LEN], header).unwrap());
    }

    #[test]
    fn cut_or_garbled_records_are_errors() {
        for record in records() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            let fixed = if matches!(
                record,
                Record::Create { .. }
                    | Record::Snapshot { .. }
                    | Record::Clone { .. }
                    | Record::Rename { .. }
                    | Record::Hold { .. }
            ) {
                bytes.len() - crate::limits::NAME_BYTES_MAX + 1
            } else {
                bytes.len()
            };
            for length in 0..fixed {
                assert!(
                    Record::decode(&bytes[..length]).is_err(),
                    "{record:?} cut to {length}"
                );
            }
        }
        assert!(Record::decode(&[200]).is_err());
    }
}
