//! The superblock: where everything begins. Two copies hold the same, written one after the other with a flush between,
//! so that one of them is whole at any moment.

use super::bytes::{Reader, Writer, crc_without};
use super::counts::{ENTRY_BYTES, IndexEntry};
use super::host::{HOST_BYTES, Host};
use super::layout::{TOP_ENTRIES, journal, usable_blocks};
use super::page::PagePtr;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    NAME_BYTES_MAX, POOL_BLOCKS_MAX, POOL_BLOCKS_MIN, RING_PATH_BYTES_MAX, VOLUMES_MAX,
};
use crate::name::Name;
use crate::units::{BLOCK_LEN, Extent, Generation, MetadataId, Pba, PoolId, Seq, Timestamp};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The first bytes of a pool.
pub(crate) const MAGIC: [u8; 8] = *b"BLKFORK\0";
/// The format that this engine writes and reads.
pub(crate) const VERSION: u32 = 1;
const CRC_AT: std::ops::Range<usize> = 12..16;
const FLAGS_AT: usize = 310;
/// The bit among the flags for [`Superblock::forbids_overcommit`].
const NO_OVERCOMMIT: u8 = 1;
const OWNER_AT: usize = 311;
const TOP_AT: usize = 1024;
/// Incompatible: pages and journal blocks carry another id than the pool's.
const METADATA_ID: u64 = 1;
/// Write-incompatible: whoever writes must claim the pool, and says in the superblock who it is.
const CLAIMED: u64 = 1;
const _: () = assert!(OWNER_AT + HOST_BYTES + 8 + 16 + 1 + RING_PATH_BYTES_MAX <= TOP_AT);
const _: () = assert!(TOP_AT + TOP_ENTRIES * ENTRY_BYTES <= BLOCK_LEN);

/// A decoded superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) id: PoolId,
    /// What its pages and journal blocks carry.
    pub(crate) metadata_id: MetadataId,
    pub(crate) name: Name,
    pub(crate) created: Timestamp,
    pub(crate) blocks: u64,
    /// The checkpoint that this names.
    pub(crate) generation: Generation,
    /// How often the pool was opened for writing; the shared ring of an opening carries it.
    pub(crate) session: u64,
    /// Whether the last opening was closed.
    pub(crate) is_clean: bool,
    /// The boot in which it was opened last with a ring; zeros without one.
    pub(crate) boot_id: [u8; 16],
    /// Who opened it for writing last; not known of a pool of an earlier program.
    pub(crate) host: Host,
    /// When this superblock was written, by that host's clock.
    pub(crate) written: Timestamp,
    /// Where the shared ring of that opening is, if it has one.
    pub(crate) ring: Option<PathBuf>,
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
        // Features that a reader must know, that a writer must know, and that either may ignore.
        let has_own_id = self.metadata_id.0 != self.id.0;
        writer.u64(if has_own_id { METADATA_ID } else { 0 });
        writer.u64(CLAIMED);
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
        let mut owner = Writer::new(block.get_mut(OWNER_AT..TOP_AT).unwrap_or_default());
        self.host.encode(&mut owner);
        owner.u64(self.written.0);
        let own_id = if has_own_id {
            self.metadata_id.0
        } else {
            [0; 16]
        };
        owner.bytes(&own_id);
        let ring = self.ring.as_deref().map_or(&b""[..], path_bytes);
        owner.u8(u8::try_from(ring.len()).unwrap_or(u8::MAX));
        owner.bytes(ring);
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
        let (features, mut reader) = check_header(block, place)?;
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
        let mut owner = Reader::new(block.get(OWNER_AT..TOP_AT).unwrap_or_default());
        let host = Host::decode(&mut owner).map_err(|error| damaged(&error.to_string()))?;
        let written = Timestamp(owner.u64()?);
        let own_id = owner.array()?;
        let ring_length = usize::from(owner.u8()?);
        let ring =
            decode_ring(owner.bytes(ring_length)?).map_err(|error| damaged(&error.to_string()))?;
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
            && flags & !NO_OVERCOMMIT == 0
            && features.has_own_id == (own_id != [0; 16] && own_id != id.0);
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
            metadata_id: MetadataId(if features.has_own_id { own_id } else { id.0 }),
            name,
            created,
            blocks,
            generation,
            session,
            is_clean,
            boot_id,
            host,
            written,
            ring,
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

fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// The path of a ring, if there is one.
fn decode_ring(bytes: &[u8]) -> Result<Option<PathBuf>> {
    let is_plausible = bytes.len() <= RING_PATH_BYTES_MAX
        && !bytes.iter().any(u8::is_ascii_control)
        && bytes.first().is_none_or(|first| *first == b'/');
    if !is_plausible {
        return Err(Error::corrupt("a path of a ring that cannot be"));
    }
    Ok((!bytes.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(bytes))))
}

/// Features that this program knows.
struct Features {
    has_own_id: bool,
}

/// Checks all that says whether the block can be read at all, and gives its features and its fields behind that.
fn check_header(block: &[u8; BLOCK_LEN], place: Pba) -> Result<(Features, Reader<'_>)> {
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
        ("incompatible", incompatible & !METADATA_ID),
        ("write-incompatible", write_incompatible & !CLAIMED),
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
    let features = Features {
        has_own_id: incompatible & METADATA_ID != 0,
    };
    Ok((features, reader))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::host::HostName;
    use crate::format::page::PageBytes;

    fn example() -> Superblock {
        Superblock {
            id: PoolId([3; 16]),
            metadata_id: MetadataId([4; 16]),
            name: "p0".parse().unwrap(),
            created: Timestamp(1),
            blocks: POOL_BLOCKS_MIN,
            generation: Generation(5),
            session: 2,
            is_clean: true,
            boot_id: [9; 16],
            host: Host {
                id: [5; 16],
                boot_id: [9; 16],
                name: HostName::new("web1"),
            },
            written: Timestamp(2),
            ring: Some("/run/ublkctl/p0.ring".into()),
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

    fn sealed(block: &[u8; BLOCK_LEN]) -> [u8; BLOCK_LEN] {
        let mut block = *block;
        let crc = crc_without(&block, CRC_AT);
        block[CRC_AT].copy_from_slice(&crc.to_le_bytes());
        block
    }

    fn decode(block: &[u8; BLOCK_LEN]) -> Result<Superblock> {
        Superblock::decode(&sealed(block), Pba(8), POOL_BLOCKS_MIN)
    }

    #[test]
    fn a_superblock_of_a_program_that_knew_no_owner_is_read() {
        let mut block = example().encode(Pba(8));
        block[16..32].fill(0);
        block[OWNER_AT..TOP_AT].fill(0);
        let earlier = Superblock {
            metadata_id: MetadataId(example().id.0),
            host: Host::default(),
            written: Timestamp(0),
            ring: None,
            ..example()
        };
        assert_eq!(decode(&block).unwrap(), earlier);
    }

    #[test]
    fn hostile_owners_are_refused() {
        let (id_at, ring_at) = (OWNER_AT + HOST_BYTES + 8, OWNER_AT + HOST_BYTES + 24);
        let hostile: [fn(&mut PageBytes, usize, usize); 6] = [
            // A name with a control character, and one that is longer than its room.
            |block, _, _| block[OWNER_AT + 33] = 0x1b,
            |block, _, _| block[OWNER_AT + 32] = 65,
            // A path that is not absolute, and one with a line break.
            |block, _, ring_at| block[ring_at + 1] = b'.',
            |block, _, ring_at| block[ring_at + 5] = b'\n',
            // An id of pages without its feature, and the feature without it.
            |block, _, _| block[16] = 0,
            |block, id_at, _| block[id_at..id_at + 16].fill(0),
        ];
        assert!(decode(&example().encode(Pba(8))).is_ok());
        for (case, change) in hostile.into_iter().enumerate() {
            let mut block = example().encode(Pba(8));
            change(&mut block, id_at, ring_at);
            assert_eq!(
                decode(&block).map_err(|error| error.kind()),
                Err(ErrorKind::Corrupt),
                "case {case}"
            );
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
