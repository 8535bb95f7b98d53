//! The count tree: pages of block counts and the index pages above them.

use super::layout::{INDEX_ENTRIES, REGION_BLOCKS, Slot};
use super::page::{BODY_BYTES, PageBytes, PageIdentity, body_mut, seal, verify};
use crate::error::{Error, Result};
use crate::units::{BLOCK_LEN, Generation};

/// [`REGION_BLOCKS`] as an array length.
pub(crate) const REGION_LEN: usize = 1984;
const INDEX_LEN: usize = 252;
/// Bytes of an index entry.
pub(crate) const ENTRY_BYTES: usize = 16;
const _: () = assert!(REGION_LEN as u64 == REGION_BLOCKS && INDEX_LEN as u64 == INDEX_ENTRIES);
const _: () = assert!(REGION_LEN * 2 <= BODY_BYTES && INDEX_LEN * ENTRY_BYTES <= BODY_BYTES);

const WIDE: u8 = 1;
const UNTRIMMED: u8 = 2;

/// Half of the counts of a region's blocks.
pub(crate) type Halves = [u16; REGION_LEN];

/// What an index says of the page below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct IndexEntry {
    /// Where the current page stands; none if nothing below was ever counted.
    pub(crate) place: Option<(Slot, Generation)>,
    /// Whether the counts have high halves (count pages only).
    pub(crate) is_wide: bool,
    /// Whether free blocks of the region may still hold room of the device below (count pages only).
    pub(crate) is_untrimmed: bool,
    /// Blocks with count 0 (count pages only).
    pub(crate) free: u64,
}

/// An index page's entries.
pub(crate) type Index = [IndexEntry; INDEX_LEN];

/// An index page without anything below it.
pub(crate) fn empty_index() -> Box<Index> {
    Box::new([IndexEntry::default(); INDEX_LEN])
}

/// The count page as it goes to disk.
pub(crate) fn encode_counts(halves: &Halves, identity: PageIdentity) -> PageBytes {
    let mut page = [0; BLOCK_LEN];
    let mut writer = body_mut(&mut page);
    for half in halves {
        writer.u16(*half);
    }
    seal(&mut page, identity);
    page
}

/// The counts in `page`.
pub(crate) fn decode_counts(page: &PageBytes, identity: PageIdentity) -> Result<Halves> {
    let mut reader = verify(page, identity)?;
    let mut halves = [0; REGION_LEN];
    for half in &mut halves {
        *half = reader.u16()?;
    }
    Ok(halves)
}

impl IndexEntry {
    /// The entry's 16 bytes.
    pub(crate) fn encode(&self, writer: &mut super::bytes::Writer<'_>) {
        let (code, generation) = match self.place {
            None => (0, 0),
            Some((Slot::A, generation)) => (1, generation.0),
            Some((Slot::B, generation)) => (2, generation.0),
        };
        writer.u48(generation);
        writer.u8(code);
        let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
        writer.u8(flag(self.is_wide, WIDE) | flag(self.is_untrimmed, UNTRIMMED));
        writer.u64(self.free);
    }

    /// The entry in the next 16 bytes.
    pub(crate) fn decode(reader: &mut super::bytes::Reader<'_>) -> Result<Self> {
        let generation = Generation(reader.u48()?);
        let place = match reader.u8()? {
            0 => None,
            1 => Some((Slot::A, generation)),
            2 => Some((Slot::B, generation)),
            _ => return Err(Error::corrupt("count index: a place that cannot be")),
        };
        let flags = reader.u8()?;
        if flags & !(WIDE | UNTRIMMED) != 0 {
            return Err(Error::corrupt("count index: a flag that cannot be"));
        }
        Ok(Self {
            place,
            is_wide: flags & WIDE != 0,
            is_untrimmed: flags & UNTRIMMED != 0,
            free: reader.u64()?,
        })
    }
}

/// The index page as it goes to disk.
pub(crate) fn encode_index(index: &Index, identity: PageIdentity) -> PageBytes {
    let mut page = [0; BLOCK_LEN];
    let mut writer = body_mut(&mut page);
    for entry in index {
        entry.encode(&mut writer);
    }
    seal(&mut page, identity);
    page
}

/// The entries in `page`.
pub(crate) fn decode_index(page: &PageBytes, identity: PageIdentity) -> Result<Box<Index>> {
    let mut reader = verify(page, identity)?;
    let mut index = empty_index();
    for entry in index.iter_mut() {
        *entry = IndexEntry::decode(&mut reader).map_err(|e| e.at_pba(identity.ptr.pba))?;
        if entry.free > REGION_BLOCKS {
            return Err(
                Error::corrupt("count index: more free blocks than a region has")
                    .at_pba(identity.ptr.pba),
            );
        }
    }
    Ok(index)
}
