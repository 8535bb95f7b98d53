//! Doors for fuzzing: each decoder of bytes from the device or from shared memory, called as the engine calls it.
//!
//! The bytes are what stands under the checksum, which is made right here, so that a fuzzer gets behind it. A decoder
//! must end without a panic; what it accepts must be encoded to something that it decodes to the same again.

use crate::format::bytes::crc_without;
use crate::format::layout::{Bounds, Slot, journal};
use crate::format::page::{PageBytes, PageIdentity, PageKind, PagePtr, body_mut, seal, verify};
use crate::format::record::Record;
use crate::format::superblock::Superblock;
use crate::format::{catalog, counts, journal as journal_block, map_page};
use crate::journal::ring;
use crate::limits::{NAME_BYTES_MAX, POOL_BLOCKS_MIN};
use crate::name::{Name, Target, VolumePath};
use crate::units::{BLOCK_LEN, Generation, MetadataId, Pba, PoolId, Seq};

#[cfg(not(any(shuttle, loom_cells)))]
pub use crate::nbd::fuzz::{handshake as nbd_handshake, requests as nbd_requests};

const POOL: PoolId = PoolId([1; 16]);
const METADATA: MetadataId = MetadataId(POOL.0);
const PLACE: PagePtr = PagePtr {
    pba: Pba(4711),
    generation: Generation(9),
};

fn identity(kind: PageKind, level: u8) -> PageIdentity {
    PageIdentity {
        metadata: METADATA,
        kind,
        level,
        ptr: PLACE,
    }
}

fn bounds() -> Bounds {
    Bounds {
        blocks: POOL_BLOCKS_MIN,
        journal: journal(POOL_BLOCKS_MIN),
    }
}

/// The first bytes of a block, the rest being zeros.
fn block(bytes: &[u8]) -> PageBytes {
    let mut block = [0; BLOCK_LEN];
    let length = bytes.len().min(BLOCK_LEN);
    if let (Some(to), Some(from)) = (block.get_mut(..length), bytes.get(..length)) {
        to.copy_from_slice(from);
    }
    block
}

/// A page with this body, sealed as `identity` has it.
fn page(body: &[u8], identity: PageIdentity) -> PageBytes {
    let mut page = [0; BLOCK_LEN];
    body_mut(&mut page).bytes(body.get(..BLOCK_LEN - 64).unwrap_or(body));
    seal(&mut page, identity);
    page
}

fn split(bytes: &[u8]) -> (u8, &[u8]) {
    bytes
        .split_first()
        .map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// A superblock; its checksum is made right if the first byte is odd.
pub fn superblock(bytes: &[u8]) {
    let (flags, rest) = split(bytes);
    let mut block = block(rest);
    if flags & 1 != 0 {
        let crc = crc_without(&block, 12..16).to_le_bytes();
        block
            .iter_mut()
            .skip(12)
            .zip(crc)
            .for_each(|(to, from)| *to = from);
    }
    let place = Pba(u64::from(flags & 8));
    if let Ok(decoded) = Superblock::decode(&block, place, 1 << 41) {
        let again = Superblock::decode(&decoded.encode(place), place, 1 << 41);
        assert!(again.is_ok_and(|again| again == decoded));
    }
}

/// A page's header: the whole block is as given.
pub fn page_header(bytes: &[u8]) {
    let (flags, rest) = split(bytes);
    let block = block(rest);
    let kind = match flags % 6 {
        0 => PageKind::Map,
        1 => PageKind::Counts,
        2 => PageKind::CountsHigh,
        3 => PageKind::CountsIndex,
        4 => PageKind::Catalog,
        _ => PageKind::CatalogIndex,
    };
    if let Ok(reader) = verify(&block, identity(kind, flags >> 5)) {
        assert_eq!(reader.remaining(), BLOCK_LEN - 64);
    }
}

/// A map page; the first byte is its level.
pub fn map_page(bytes: &[u8]) {
    let (level, body) = split(bytes);
    let identity = identity(PageKind::Map, level % (map_page::LEVEL_MAX + 1));
    if let Ok((mapped, node)) = map_page::decode(&page(body, identity), identity, bounds()) {
        let again = map_page::encode(&node, mapped, identity);
        let again = map_page::decode(&again, identity, bounds());
        assert!(again.is_ok_and(|again| again == (mapped, node)));
    }
}

/// A page of counts.
pub fn counts_page(bytes: &[u8]) {
    let identity = identity(PageKind::Counts, 0);
    let page = page(bytes, identity);
    if let Ok(halves) = counts::decode_counts(&page, identity) {
        let again = counts::encode_counts(&halves, identity);
        assert!(counts::decode_counts(&again, identity).is_ok_and(|again| again == halves));
    }
}

/// An index page of the counts; the first byte is its level.
pub fn counts_index(bytes: &[u8]) {
    let (level, body) = split(bytes);
    let identity = identity(PageKind::CountsIndex, 1 + level % 3);
    if let Ok(index) = counts::decode_index(&page(body, identity), identity) {
        let again = counts::encode_index(&index, identity);
        assert!(counts::decode_index(&again, identity).is_ok_and(|again| again == index));
        let is_slot = |slot| matches!(slot, Some((Slot::A | Slot::B, _)) | None);
        assert!(index.iter().all(|entry| is_slot(entry.place)));
    }
}

/// A page of the catalog.
pub fn catalog_page(bytes: &[u8]) {
    let identity = identity(PageKind::Catalog, 0);
    if let Ok(slots) = catalog::decode_page(&page(bytes, identity), identity, bounds()) {
        let again = catalog::encode_page(slots.iter().map(Option::as_ref), identity);
        let again = catalog::decode_page(&again, identity, bounds());
        assert!(again.is_ok_and(|again| again == slots));
    }
}

/// An index page of the catalog; the first byte is its level.
pub fn catalog_index(bytes: &[u8]) {
    let (level, body) = split(bytes);
    let identity = identity(PageKind::CatalogIndex, 1 + level % 3);
    if let Ok(children) = catalog::decode_index(&page(body, identity), identity, bounds()) {
        let again = catalog::encode_index(&children, identity);
        let again = catalog::decode_index(&again, identity, bounds());
        assert!(again.is_ok_and(|again| again == children));
    }
}

/// A record of the journal.
pub fn record(bytes: &[u8]) {
    if let Ok(record) = Record::decode(bytes) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert!(Record::decode(&again).is_ok_and(|again| again == record));
    }
}

/// A journal block from its 16-bit length on, with the records behind it. The first byte, if odd, makes its header the
/// next one and its checksum right.
pub fn journal_block(bytes: &[u8]) {
    let (flags, rest) = split(bytes);
    let header = journal_block::BlockHeader {
        metadata: METADATA,
        number: 4,
        chain: 5,
        first_seq: Seq(6),
        batch: 0,
        session: 1,
    };
    let mut block = block(rest);
    if flags & 1 != 0 {
        let start = b"BFjb".iter().copied().chain([0; 4]).chain(POOL.0);
        let start = start.chain(4_u64.to_le_bytes()).chain(6_u64.to_le_bytes());
        let start = start.chain(5_u32.to_le_bytes());
        let start: Vec<u8> = start.chain(rest.iter().copied()).collect();
        block = self::block(&start);
        let crc = crc_without(&block, 4..8).to_le_bytes();
        block
            .iter_mut()
            .skip(4)
            .zip(crc)
            .for_each(|(to, from)| *to = from);
        assert!(journal_block::decode_number(&block, METADATA).is_ok_and(|found| found.is_some()));
    }
    if let Ok(Some((mut framed, _))) = journal_block::decode_block(&block, header) {
        while let Ok((one, rest)) = journal_block::split_framed(framed) {
            check_framed(one);
            framed = rest;
        }
    }
}

fn check_framed(bytes: &[u8]) {
    if let Ok(framed) = journal_block::decode_framed(bytes) {
        let mut again = Vec::new();
        journal_block::encode_framed(&framed.record, framed.continues, &mut again);
        assert!(journal_block::decode_framed(&again).is_ok_and(|again| again == framed));
    }
}

/// A ring of shared memory: 8 bytes of where it begins, then its data. Frames that lie one behind another from there get
/// right checksums if the first byte of the data is odd.
pub fn ring(bytes: &[u8]) {
    let owner = ring::RingOwner {
        pool: POOL,
        boot_id: [2; 16],
        session: 1,
    };
    let is_sealed = bytes.get(8).is_some_and(|byte| byte & 1 != 0);
    let ring = ring::of_bytes(owner, bytes, is_sealed);
    if let Ok(Some(records)) = ring::records_in(&ring, owner) {
        let held: usize = records.iter().map(|(_, record)| record.len()).sum();
        assert!(held <= bytes.len());
        for (_, record) in &records {
            check_framed(record);
        }
    }
}

/// A name, a path and a target as typed: what is accepted is what it prints, and a name can stand in a path.
pub fn name(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string(), text);
        check_name(&target.pool);
    }
    if let Ok(path) = text.parse::<VolumePath>() {
        assert_eq!(path.to_string(), text);
        check_name(&path.volume);
        path.snapshot.iter().for_each(check_name);
    }
    match text.parse::<Name>() {
        Ok(name) => check_name(&name),
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

fn check_name(name: &Name) {
    let text = name.as_str();
    assert!((1..=NAME_BYTES_MAX).contains(&text.len()));
    assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(!text.contains(['/', '@', '\\', '"', '\'']) && !text.contains(".."));
    assert!(!text.starts_with(['-', '.']));
}
