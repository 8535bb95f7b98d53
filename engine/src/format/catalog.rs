//! The catalog: one slot of 256 bytes for each volume, each snapshot, each tree that is being reclaimed and each hold.

use super::bytes::{Reader, Writer};
use super::layout::Bounds;
use super::map_page::{LEVEL_MAX, span_blocks};
use super::page::{BODY_BYTES, PageBytes, PageIdentity, PagePtr, body_mut, seal, verify};
use crate::error::{Error, Result};
use crate::limits::{NAME_BYTES_MAX, VOLUME_BYTES_MAX};
use crate::name::Name;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Generation, Lba, Pba, Timestamp, VolumeId};

/// Slots of a catalog page.
pub(crate) const SLOTS_PER_PAGE: usize = 15;
/// Pointers of a catalog index page.
pub(crate) const CATALOG_INDEX_ENTRIES: usize = 252;
const SLOT_BYTES: usize = 256;
const _: () = assert!(SLOTS_PER_PAGE * SLOT_BYTES <= BODY_BYTES);
const _: () = assert!(CATALOG_INDEX_ENTRIES * 16 <= BODY_BYTES);
/// Where in a slot stands what it says of kin.
const KIN_AT: usize = 208;
/// Where the limits of a volume stand in its slot, behind the longest name.
const LIMITS_AT: usize = 192;
const _: () = assert!(64 + NAME_BYTES_MAX <= LIMITS_AT && LIMITS_AT + 16 <= KIN_AT);

/// How many pages each level of the catalog has, from the pages with the slots to the single top one.
pub(crate) fn level_sizes(slots: usize) -> impl Iterator<Item = usize> {
    let lowest = slots.div_ceil(SLOTS_PER_PAGE);
    std::iter::successors((lowest > 0).then_some(lowest), |pages| {
        (*pages > 1).then(|| pages.div_ceil(CATALOG_INDEX_ENTRIES))
    })
}

/// The root of a map: its page, none while nothing is mapped, and the level that the page has or would have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Root {
    pub(crate) ptr: Option<PagePtr>,
    pub(crate) level: u8,
}

/// What a slot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A volume with its name and the snapshot that it began as.
    Volume {
        name: Name,
        origin: Option<VolumeId>,
    },
    /// A snapshot with its name and its volume.
    Snapshot { name: Name, volume: VolumeId },
    /// A removed tree; everything below `cursor` is returned already.
    Reclaiming { cursor: Lba },
    /// What keeps a snapshot from being removed, under a name of its own. It has no map.
    Hold { snapshot: VolumeId, tag: Name },
}

/// Blocks that one volume or snapshot owns alone: nothing else has them, nor a page above them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Own {
    pub(crate) data: u64,
    /// Pages of its map.
    pub(crate) pages: u64,
}

/// Whom a volume or snapshot shares blocks with, and what it owns alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Kin {
    /// The snapshot that it goes on from. The number of something removed: it goes on from that, as all others do that
    /// give the number. None: only what goes on from it can share its blocks.
    pub(crate) parent: Option<VolumeId>,
    /// What goes on from it may share blocks that it does not have itself.
    pub(crate) is_ragged: bool,
    /// What it owns alone: exact where that is counted, otherwise not more than it does.
    pub(crate) own: Own,
    pub(crate) is_counted: bool,
}

impl Kin {
    /// A parent for those of whom it is not known any more: whoever gives it may share blocks with all others that do.
    pub(crate) const ANYONE: VolumeId = VolumeId((1 << 62) - 1);

    /// Nothing is known.
    pub(crate) const UNKNOWN: Self = Self {
        parent: Some(Self::ANYONE),
        is_ragged: true,
        own: Own { data: 0, pages: 0 },
        is_counted: false,
    };

    /// Goes on from `parent` and owns nothing alone.
    pub(crate) fn beside(parent: Option<VolumeId>) -> Self {
        Self {
            parent,
            is_counted: true,
            ..Self::default()
        }
    }

    /// What it owns alone, where that is counted.
    pub(crate) fn counted(self) -> Option<Own> {
        self.is_counted.then_some(self.own)
    }

    fn encode(self, slot: &mut Writer<'_>) {
        let own = self.own;
        slot.u64(self.parent.map_or(0, |id| id.0));
        slot.u64(own.data);
        slot.u64(own.pages);
        slot.u8(1 | u8::from(self.is_counted) << 1 | u8::from(self.is_ragged) << 2);
    }

    fn decode(slot: &mut Reader<'_>, bounds: Bounds) -> Result<Self> {
        let parent = slot.u64()?;
        let own = Own {
            data: slot.u64()?,
            pages: slot.u64()?,
        };
        let flags = slot.u8()?;
        if parent >> 62 != 0 || own.data.max(own.pages) > bounds.blocks {
            return Err(Error::corrupt("catalog page: kin that cannot be"));
        }
        if flags & 1 == 0 {
            return Ok(Self::UNKNOWN);
        }
        Ok(Self {
            parent: (parent != 0).then_some(VolumeId(parent)),
            is_ragged: flags & 4 != 0,
            own,
            is_counted: flags & 2 != 0,
        })
    }
}

/// An occupied slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CatalogEntry {
    pub(crate) id: VolumeId,
    pub(crate) role: Role,
    pub(crate) root: Root,
    pub(crate) bytes: u64,
    pub(crate) sector_bytes: u32,
    pub(crate) redirects_always: bool,
    pub(crate) mapped_blocks: u64,
    pub(crate) created: Timestamp,
    pub(crate) kin: Kin,
    /// The most that a volume maps, in bytes; 0 for no limit.
    pub(crate) quota_bytes: u64,
    /// What is set aside for a volume, in bytes; 0 for nothing.
    pub(crate) reserve_bytes: u64,
}

/// Whether a quota or a reserve can be so many bytes: whole blocks, and not beyond the largest volume.
pub(crate) fn is_limit(bytes: u64) -> bool {
    bytes <= VOLUME_BYTES_MAX && bytes.is_multiple_of(BLOCK_BYTES)
}

fn encode_slot(entry: Option<&CatalogEntry>, writer: &mut Writer<'_>) {
    let mut slot = [0; SLOT_BYTES];
    if let Some(entry) = entry {
        let (code, name, other) = match &entry.role {
            Role::Volume { name, origin } => (1, name.as_str(), origin.map_or(0, |id| id.0)),
            Role::Snapshot { name, volume } => (2, name.as_str(), volume.0),
            Role::Reclaiming { cursor } => (3, "", cursor.0),
            Role::Hold { snapshot, tag } => (4, tag.as_str(), snapshot.0),
        };
        let (pba, generation) = entry
            .root
            .ptr
            .map_or((0, 0), |ptr| (ptr.pba.0, ptr.generation.0));
        entry
            .kin
            .encode(&mut Writer::new(slot.get_mut(KIN_AT..).unwrap_or_default()));
        let mut limits = Writer::new(slot.get_mut(LIMITS_AT..).unwrap_or_default());
        limits.u64(entry.quota_bytes);
        limits.u64(entry.reserve_bytes);
        let mut slot = Writer::new(&mut slot);
        slot.u8(code);
        slot.u8(entry.root.level);
        slot.u8(u8::from(entry.redirects_always));
        slot.u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
        slot.u32(entry.sector_bytes);
        slot.u64(entry.id.0);
        slot.u64(other);
        slot.u64(pba);
        slot.u64(generation);
        slot.u64(entry.bytes);
        slot.u64(entry.mapped_blocks);
        slot.u64(entry.created.0);
        slot.bytes(name.as_bytes());
    }
    writer.bytes(&slot);
}

fn decode_slot(reader: &mut Reader<'_>, bounds: Bounds) -> Result<Option<CatalogEntry>> {
    let slot_bytes = reader.bytes(SLOT_BYTES)?;
    let mut slot = Reader::new(slot_bytes);
    let damaged = |fact: &str| Error::corrupt(format!("catalog page: {fact}"));
    let code = slot.u8()?;
    if code == 0 {
        return Ok(None);
    }
    let level = slot.u8()?;
    if level > LEVEL_MAX {
        return Err(damaged("a map deeper than maps can be"));
    }
    let redirects_always = slot.u8()? != 0;
    let name_len = usize::from(slot.u8()?);
    let sector_bytes = slot.u32()?;
    let is_hold = code == 4;
    if !is_hold && sector_bytes != 512 && sector_bytes != 4096 {
        return Err(damaged("a sector size that is neither 512 nor 4096"));
    }
    let id = VolumeId(slot.u64()?);
    let other = slot.u64()?;
    if id.0 >> 62 != 0 || (code == 3 && other >= span_blocks(level)) {
        return Err(damaged("a number that cannot be"));
    }
    let (pba, generation) = (Pba(slot.u64()?), Generation(slot.u64()?));
    if (pba.0 != 0 && !bounds.contain(pba)) || generation.0 >> 48 != 0 {
        return Err(damaged("a map that begins where none can"));
    }
    let bytes = slot.u64()?;
    if (bytes == 0 && !is_hold) || bytes > VOLUME_BYTES_MAX {
        return Err(damaged("a size that volumes cannot have"));
    }
    let mapped_blocks = slot.u64()?;
    if mapped_blocks > span_blocks(level) {
        return Err(damaged("more blocks than its map spans"));
    }
    let has_map = level > 0 || pba.0 != 0 || generation.0 != 0 || mapped_blocks != 0;
    if is_hold && (has_map || redirects_always || sector_bytes != 0 || bytes != 0) {
        return Err(damaged("a hold with a map"));
    }
    let created = Timestamp(slot.u64()?);
    let mut kin = Reader::new(slot_bytes.get(KIN_AT..).unwrap_or_default());
    let kin = Kin::decode(&mut kin, bounds)?;
    let mut limits = Reader::new(slot_bytes.get(LIMITS_AT..).unwrap_or_default());
    let (quota_bytes, reserve_bytes) = (limits.u64()?, limits.u64()?);
    if !is_limit(quota_bytes) || !is_limit(reserve_bytes) {
        return Err(damaged("a limit that volumes cannot have"));
    }
    if code != 1 && (quota_bytes, reserve_bytes) != (0, 0) {
        return Err(damaged("a limit of something else than a volume"));
    }
    let name = std::str::from_utf8(slot.bytes(name_len)?);
    let name = || {
        name.ok()
            .and_then(|text| text.parse::<Name>().ok())
            .ok_or_else(|| damaged("a name that cannot be"))
    };
    let role = match code {
        1 => Role::Volume {
            name: name()?,
            origin: (other != 0).then_some(VolumeId(other)),
        },
        2 => Role::Snapshot {
            name: name()?,
            volume: VolumeId(other),
        },
        3 => Role::Reclaiming { cursor: Lba(other) },
        4 => Role::Hold {
            snapshot: VolumeId(other),
            tag: name()?,
        },
        _ => return Err(damaged("a slot of an unknown kind")),
    };
    Ok(Some(CatalogEntry {
        id,
        role,
        root: Root {
            ptr: (pba.0 != 0).then_some(PagePtr { pba, generation }),
            level,
        },
        bytes,
        sector_bytes,
        redirects_always,
        mapped_blocks,
        created,
        kin,
        quota_bytes,
        reserve_bytes,
    }))
}

/// The catalog page as it goes to disk.
pub(crate) fn encode_page<'a>(
    slots: impl Iterator<Item = Option<&'a CatalogEntry>>,
    identity: PageIdentity,
) -> PageBytes {
    let mut page = [0; BLOCK_LEN];
    let mut writer = body_mut(&mut page);
    for slot in slots.take(SLOTS_PER_PAGE) {
        encode_slot(slot, &mut writer);
    }
    seal(&mut page, identity);
    page
}

/// The slots in `page`.
pub(crate) fn decode_page(
    page: &PageBytes,
    identity: PageIdentity,
    bounds: Bounds,
) -> Result<Vec<Option<CatalogEntry>>> {
    let mut reader = verify(page, identity)?;
    (0..SLOTS_PER_PAGE)
        .map(|_| decode_slot(&mut reader, bounds).map_err(|e| e.at_pba(identity.ptr.pba)))
        .collect()
}

/// The catalog index page as it goes to disk.
pub(crate) fn encode_index(children: &[Option<PagePtr>], identity: PageIdentity) -> PageBytes {
    assert!(
        children.len() <= CATALOG_INDEX_ENTRIES,
        "too many children for an index page"
    );
    let mut page = [0; BLOCK_LEN];
    let mut writer = body_mut(&mut page);
    for child in children {
        let (pba, generation) = child.map_or((0, 0), |ptr| (ptr.pba.0, ptr.generation.0));
        writer.u64(pba);
        writer.u64(generation);
    }
    seal(&mut page, identity);
    page
}

/// The pointers in `page`.
pub(crate) fn decode_index(
    page: &PageBytes,
    identity: PageIdentity,
    bounds: Bounds,
) -> Result<Vec<Option<PagePtr>>> {
    let mut reader = verify(page, identity)?;
    let mut children = Vec::with_capacity(CATALOG_INDEX_ENTRIES);
    for _ in 0..CATALOG_INDEX_ENTRIES {
        let (pba, generation) = (Pba(reader.u64()?), Generation(reader.u64()?));
        if (pba.0 != 0 && !bounds.contain(pba)) || generation > identity.ptr.generation {
            return Err(
                Error::corrupt("catalog index page: a pointer that cannot be")
                    .at_pba(identity.ptr.pba),
            );
        }
        children.push((pba.0 != 0).then_some(PagePtr { pba, generation }));
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::page::PageKind;
    use crate::units::MetadataId;

    const PLACE: PageIdentity = PageIdentity {
        metadata: MetadataId([1; 16]),
        kind: PageKind::Catalog,
        level: 0,
        ptr: PagePtr {
            pba: Pba(4711),
            generation: Generation(9),
        },
    };

    fn bounds() -> Bounds {
        Bounds {
            blocks: 1 << 20,
            journal: super::super::layout::journal(1 << 20),
        }
    }

    fn hold() -> CatalogEntry {
        CatalogEntry {
            id: VolumeId(8),
            role: Role::Hold {
                snapshot: VolumeId(7),
                tag: "backup".parse().unwrap(),
            },
            root: Root::default(),
            bytes: 0,
            sector_bytes: 0,
            redirects_always: false,
            mapped_blocks: 0,
            created: Timestamp(5),
            kin: Kin::default(),
            quota_bytes: 0,
            reserve_bytes: 0,
        }
    }

    fn decoded(page: &PageBytes) -> Result<Vec<Option<CatalogEntry>>> {
        decode_page(page, PLACE, bounds())
    }

    #[test]
    fn a_hold_survives_its_page() {
        let page = encode_page([None, Some(&hold())].into_iter(), PLACE);
        let slots = decoded(&page).unwrap();
        assert_eq!((slots[0].clone(), slots[1].clone()), (None, Some(hold())));
        let at = 64 + 256;
        assert_eq!((page[at], page[at + 3]), (4, 6));
        assert_eq!(page[at + 16..at + 24], 7_u64.to_le_bytes());
        assert_eq!(&page[at + 64..at + 70], b"backup");
    }

    #[test]
    fn a_hold_that_has_something_of_a_volume_is_refused() {
        // Level, redirected always, sector, pba, generation, size, blocks mapped; no name; a name that cannot be.
        for (at, byte) in [
            (1, 1),
            (2, 1),
            (4, 0),
            (26, 1),
            (32, 1),
            (41, 16),
            (48, 1),
            (3, 0),
            (64, b'/'),
        ] {
            let mut page = encode_page([Some(&hold())].into_iter(), PLACE);
            page[64 + at] = byte;
            // A sector as volumes have it.
            page[64 + 5] = u8::from(at == 4) * 16;
            seal(&mut page, PLACE);
            assert!(decoded(&page).is_err(), "offset {at}");
        }
    }
}
