//! The superblock: where everything begins. Two copies hold the same, written one after the other with a flush between,
//! so that one of them is whole at any moment.

use super::bytes::{Reader, Writer, crc_without};
use super::counts::{ENTRY_BYTES, IndexEntry};
use super::layout::{TOP_ENTRIES, journal, usable_blocks};
use super::page::PagePtr;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{NAME_BYTES_MAX, POOL_BLOCKS_MAX, POOL_BLOCKS_MIN, VOLUMES_MAX};
use crate::name::Name;
use crate::units::{BLOCK_LEN, Extent, Generation, Pba, PoolId, Seq, Timestamp};

/// The first bytes of a pool.
pub(crate) const MAGIC: [u8; 8] = *b"BLKFORK\0";
/// The format that this engine writes and reads.
pub(crate) const VERSION: u32 = 1;
const CRC_AT: std::ops::Range<usize> = 12..16;
const FLAGS_AT: usize = 310;
/// The bit among the flags for [`Superblock::forbids_overcommit`].
const NO_OVERCOMMIT: u8 = 1;
const TOP_AT: usize = 1024;
const _: () = assert!(TOP_AT + TOP_ENTRIES * ENTRY_BYTES <= BLOCK_LEN);

/// A decoded superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) id: PoolId,
    pub(crate) name: Name,
    pub(crate) created: Timestamp,
    pub(crate) blocks: u64,
    /// The checkpoint that this names.
    pub(crate) generation: Generation,
    /// How often the pool was opened for writing; the shared ring of an opening carries it.
    pub(crate) session: u64,
    /// Whether the last opening was closed.
    pub(crate) is_clean: bool,
    /// The boot in which it was opened last.
    pub(crate) boot_id: [u8; 16],
    /// Whether the volumes together may not be larger than the pool.
    pub(crate) forbids_overcommit: bool,
    pub(crate) journal: Extent,
    /// The first journal block that is not part of the checkpoint.
    pub(crate) journal_block: u64,
    /// The CRC of the journal block before that.
    pub(crate) journal_chain: u32,
    /// The first record that is not part of the checkpoint.
    pub(crate) seq: Seq,
    /// The next number for a volume or snapshot.
    pub(crate) next_id: u64,
    /// The catalog's top page; its level; how many slots it has.
    pub(crate) catalog: Option<PagePtr>,
    pub(crate) catalog_level: u8,
    pub(crate) catalog_slots: u64,
    /// The top of the count tree.
    pub(crate) counts: Box<[IndexEntry; TOP_ENTRIES]>,
}

impl Superblock {
    /// The block as it goes to the copy at `place`.
    pub(crate) fn encode(&self, place: Pba) -> [u8; BLOCK_LEN] {
        let mut block = [0; BLOCK_LEN];
        let mut writer = Writer::new(&mut block);
        writer.bytes(&MAGIC);
        writer.u32(VERSION);
        writer.u32(0);
        // Features that a reader must know, that a writer must know, and that either may ignore: none yet.
        writer.u64(0);
        writer.u64(0);
        writer.u64(0);
        writer.u64(place.0);
        writer.bytes(&self.id.0);
        writer.u64(self.created.0);
        writer.u64(self.blocks);
        writer.u64(self.generation.0);
        writer.u64(self.session);
        writer.bytes(&self.boot_id);
        writer.u64(self.journal.start.0);
        writer.u64(self.journal.count);
        writer.u64(self.journal_block);
        writer.u64(self.seq.0);
        writer.u64(self.next_id);
        writer.u64(self.catalog.map_or(0, |ptr| ptr.pba.0));
        writer.u64(self.catalog.map_or(0, |ptr| ptr.generation.0));
        writer.u64(self.catalog_slots);
        writer.u32(self.journal_chain);
        writer.u8(self.catalog_level);
        writer.u8(u8::from(self.is_clean));
        writer.u8(u8::try_from(self.name.as_str().len()).unwrap_or(u8::MAX));
        writer.bytes(self.name.as_str().as_bytes());
        if let Some(flags) = block.get_mut(FLAGS_AT) {
            *flags = if self.forbids_overcommit {
                NO_OVERCOMMIT
            } else {
                0
            };
        }
        let mut top = Writer::new(block.get_mut(TOP_AT..).unwrap_or_default());
        for entry in self.counts.iter() {
            entry.encode(&mut top);
        }
        let crc = crc_without(&block, CRC_AT);
        if let Some(field) = block.get_mut(CRC_AT) {
            field.copy_from_slice(&crc.to_le_bytes());
        }
        block
    }

    /// The superblock in the copy at `place` of a device with `device_blocks` blocks.
    ///
    /// `NotFound`: there is no pool. `Unsupported`: a version or a feature this engine does not know, by name.
    /// `Corrupt`: a pool's, but damaged.
    pub(crate) fn decode(block: &[u8; BLOCK_LEN], place: Pba, device_blocks: u64) -> Result<Self> {
        let damaged = |fact: &str| Error::corrupt(format!("superblock: {fact}")).at_pba(place);
        let mut reader = check_header(block, place)?;
        let id = PoolId(reader.array()?);
        let created = Timestamp(reader.u64()?);
        let blocks = reader.u64()?;
        if !(POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(&blocks) || usable_blocks(blocks) != blocks
        {
            return Err(damaged("a pool of a size that cannot be"));
        }
        if blocks > device_blocks {
            return Err(Error::corrupt(format!(
                "the pool has {blocks} blocks, the file or device holds {device_blocks}; it was truncated"
            )));
        }
        let generation = Generation(reader.u64()?);
        let session = reader.u64()?;
        let boot_id = reader.array()?;
        let journal_at = Extent::new(Pba(reader.u64()?), reader.u64()?);
        let journal_block = reader.u64()?;
        let seq = Seq(reader.u64()?);
        let next_id = reader.u64()?;
        let (pba, catalog_generation) = (Pba(reader.u64()?), Generation(reader.u64()?));
        let catalog_slots = reader.u64()?;
        let journal_chain = reader.u32()?;
        let catalog_level = reader.u8()?;
        let is_clean = reader.u8()? != 0;
        let name_len = usize::from(reader.u8()?).min(NAME_BYTES_MAX);
        let name = std::str::from_utf8(reader.bytes(name_len)?)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| damaged("a name that cannot be"))?;
        let flags = block.get(FLAGS_AT).copied().unwrap_or(0);
        let plausible = journal_at.start == journal(blocks).start
            && journal_at.count > 0
            && journal_at.count <= blocks
            && journal_at.end().0 <= blocks
            && generation.0 >> 47 == 0
            && seq.0 >> 62 == 0
            && journal_block >> 62 == 0
            && session >> 62 == 0
            && next_id >> 62 == 0
            && pba.0 < blocks
            && catalog_generation <= generation
            && catalog_slots <= VOLUMES_MAX as u64
            && catalog_level <= 3
            && flags & !NO_OVERCOMMIT == 0;
        if !plausible {
            return Err(damaged("a field that cannot be"));
        }
        let mut counts = Box::new([IndexEntry::default(); TOP_ENTRIES]);
        let mut top = Reader::new(block.get(TOP_AT..).unwrap_or_default());
        for entry in counts.iter_mut() {
            *entry = IndexEntry::decode(&mut top)?;
        }
        Ok(Self {
            id,
            name,
            created,
            blocks,
            generation,
            session,
            is_clean,
            boot_id,
            forbids_overcommit: flags & NO_OVERCOMMIT != 0,
            journal: journal_at,
            journal_block,
            journal_chain,
            seq,
            next_id,
            catalog: (pba.0 != 0).then_some(PagePtr {
                pba,
                generation: catalog_generation,
            }),
            catalog_level,
            catalog_slots,
            counts,
        })
    }
}

/// Checks all that says whether the block can be read at all, and gives its fields behind that.
fn check_header(block: &[u8; BLOCK_LEN], place: Pba) -> Result<Reader<'_>> {
    let mut reader = Reader::new(block);
    if reader.array()? != MAGIC {
        return Err(Error::with(ErrorKind::NotFound, "no pool here"));
    }
    let damaged = |fact: &str| Error::corrupt(format!("superblock: {fact}")).at_pba(place);
    let version = reader.u32()?;
    let crc = reader.u32()?;
    if crc != crc_without(block, CRC_AT) {
        return Err(damaged("its checksum does not match"));
    }
    if version != VERSION {
        return Err(Error::with(
            ErrorKind::Unsupported,
            format!(
                "the pool has format version {version}, this program reads version {VERSION}; use a newer one"
            ),
        ));
    }
    let (incompatible, write_incompatible, _compatible) =
        (reader.u64()?, reader.u64()?, reader.u64()?);
    for (what, bits) in [
        ("incompatible", incompatible),
        ("write-incompatible", write_incompatible),
    ] {
        if bits != 0 {
            return Err(Error::with(
                ErrorKind::Unsupported,
                format!(
                    "the pool uses {what} feature bit {}, which this program does not know; use a newer one",
                    bits.trailing_zeros()
                ),
            ));
        }
    }
    if reader.u64()? != place.0 {
        return Err(damaged("was written for another place"));
    }
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Superblock {
        Superblock {
            id: PoolId([3; 16]),
            name: "p0".parse().unwrap(),
            created: Timestamp(1),
            blocks: POOL_BLOCKS_MIN,
            generation: Generation(5),
            session: 2,
            is_clean: true,
            boot_id: [9; 16],
            forbids_overcommit: true,
            journal: journal(POOL_BLOCKS_MIN),
            journal_block: 77,
            journal_chain: 8,
            seq: Seq(12),
            next_id: 4,
            catalog: None,
            catalog_level: 0,
            catalog_slots: 0,
            counts: Box::new([IndexEntry::default(); TOP_ENTRIES]),
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn a_superblock_round_trips_and_every_flipped_bit_is_found() {
        let mut block = example().encode(Pba(8));
        assert_eq!(
            Superblock::decode(&block, Pba(8), POOL_BLOCKS_MIN).unwrap(),
            example()
        );
        assert!(Superblock::decode(&block, Pba(0), POOL_BLOCKS_MIN).is_err());
        assert!(Superblock::decode(&block, Pba(8), POOL_BLOCKS_MIN - 1).is_err());
        for bit in 0..BLOCK_LEN * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Superblock::decode(&block, Pba(8), POOL_BLOCKS_MIN).is_err(),
                "bit {bit}"
            );
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_newer_version_and_an_unknown_feature_are_refused_by_name() {
        for (at, word) in [(8, "version 2"), (16, "bit 3"), (24, "bit 3")] {
            let mut block = example().encode(Pba(0));
            block[at] = if at == 8 { 2 } else { 8 };
            let crc = crc_without(&block, CRC_AT);
            block[CRC_AT].copy_from_slice(&crc.to_le_bytes());
            let error = Superblock::decode(&block, Pba(0), POOL_BLOCKS_MIN).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
