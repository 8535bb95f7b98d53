//! The header and the seal that every metadata page carries.
//! Under its CRC stand the pool, the page's own address and its generation, so that a flipped bit, a lost write, a
//! stale copy and a misdirected write are all told from the page that its pointer names.

use super::bytes::{Reader, Writer, crc_without};
use crate::error::{Error, Result};
use crate::units::{BLOCK_LEN, Generation, MetadataId, Pba};

/// `BFpg`.
const MAGIC: u32 = u32::from_le_bytes(*b"BFpg");
/// Bytes before a page's own fields.
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of a page's own fields.
pub(crate) const BODY_BYTES: usize = BLOCK_LEN - HEADER_BYTES;
const CRC_AT: std::ops::Range<usize> = 4..8;

/// Where a metadata page stands and which checkpoint wrote it: all that is needed to know it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PagePtr {
    /// Its block.
    pub(crate) pba: Pba,
    /// The generation it was made in.
    pub(crate) generation: Generation,
}

/// What a metadata page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    /// Leaf or inner page of a volume's map.
    Map,
    /// Counts of a region's blocks, their low 16 bits.
    Counts,
    /// The high 16 bits.
    CountsHigh,
    /// Index over count pages or over other such indexes.
    CountsIndex,
    /// Volumes and snapshots.
    Catalog,
    /// Index over catalog pages.
    CatalogIndex,
}

impl PageKind {
    fn code(self) -> u8 {
        match self {
            Self::Map => 1,
            Self::Counts => 2,
            Self::CountsHigh => 3,
            Self::CountsIndex => 4,
            Self::Catalog => 5,
            Self::CatalogIndex => 6,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Map => "map page",
            Self::Counts | Self::CountsHigh => "count page",
            Self::CountsIndex => "count index page",
            Self::Catalog => "catalog page",
            Self::CatalogIndex => "catalog index page",
        }
    }
}

/// All that identifies a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageIdentity {
    pub(crate) metadata: MetadataId,
    pub(crate) kind: PageKind,
    pub(crate) level: u8,
    pub(crate) ptr: PagePtr,
}

/// A whole page as it stands on disk.
pub(crate) type PageBytes = [u8; BLOCK_LEN];

/// Writes the header and the CRC over a page whose body is filled in.
pub(crate) fn seal(page: &mut PageBytes, identity: PageIdentity) {
    let mut header = [0; HEADER_BYTES];
    let mut writer = Writer::new(&mut header);
    writer.u32(MAGIC);
    writer.u32(0);
    writer.bytes(&identity.metadata.0);
    writer.u64(identity.ptr.pba.0);
    writer.u64(identity.ptr.generation.0);
    writer.u8(identity.kind.code());
    writer.u8(identity.level);
    if let Some(place) = page.first_chunk_mut() {
        *place = header;
    }
    let crc = crc_without(page, CRC_AT);
    if let Some(place) = page.get_mut(CRC_AT) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Checks that `page` is the page that `identity` names and gives its body.
pub(crate) fn verify(page: &PageBytes, identity: PageIdentity) -> Result<Reader<'_>> {
    let name = identity.kind.name();
    let damaged =
        |fact: &str| Err(Error::corrupt(format!("{name}: {fact}")).at_pba(identity.ptr.pba));
    let mut reader = Reader::new(page);
    if reader.u32()? != MAGIC {
        return damaged("is not a metadata page (never written, or overwritten)");
    }
    if reader.u32()? != crc_without(page, CRC_AT) {
        return damaged("its checksum does not match");
    }
    if reader.array()? != identity.metadata.0 {
        return damaged("belongs to another pool");
    }
    if reader.u64()? != identity.ptr.pba.0 {
        return damaged("was written for another place");
    }
    let generation = reader.u64()?;
    if generation != identity.ptr.generation.0 {
        return damaged(&format!(
            "is of generation {generation}, its pointer names {}",
            identity.ptr.generation.0
        ));
    }
    if reader.u8()? != identity.kind.code() || reader.u8()? != identity.level {
        return damaged("is of another kind or level");
    }
    reader.bytes(HEADER_BYTES - 42)?;
    Ok(reader)
}

/// The body of a page that is being filled in.
pub(crate) fn body_mut(page: &mut PageBytes) -> Writer<'_> {
    Writer::new(page.get_mut(HEADER_BYTES..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> PageIdentity {
        PageIdentity {
            metadata: MetadataId([7; 16]),
            kind: PageKind::Map,
            level: 1,
            ptr: PagePtr {
                pba: Pba(4711),
                generation: Generation(9),
            },
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs minutes")]
    fn every_flipped_bit_is_found() {
        let mut page = [0; BLOCK_LEN];
        body_mut(&mut page).u64(0x1234_5678);
        seal(&mut page, identity());
        assert!(verify(&page, identity()).is_ok());
        for bit in 0..BLOCK_LEN * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(&page, identity()).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn another_pages_content_is_found() {
        let mut page = [0; BLOCK_LEN];
        seal(&mut page, identity());
        let mut other = identity();
        other.ptr.generation = Generation(8);
        assert!(verify(&page, other).is_err());
        other = identity();
        other.ptr.pba = Pba(4712);
        assert!(verify(&page, other).is_err());
        other = identity();
        other.metadata = MetadataId([8; 16]);
        assert!(verify(&page, other).is_err());
        other = identity();
        other.level = 2;
        assert!(verify(&page, other).is_err());
    }
}
