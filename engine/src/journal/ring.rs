//! The shared ring: redo records that no commit has covered yet, in memory that outlives the process.
//!
//! It is a mapped file on a tmpfs. An append costs a copy; a killed process leaves the ring as it was after its last
//! whole append, and a power cut takes it away, as it takes a volatile cache. It belongs to one boot, one pool and one
//! opening of that pool; anything else in the file is stale and ignored.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe: others could change it under us"
)]

use crate::error::{Error, Result};
use crate::format::bytes::{Reader, Writer};
use crate::units::{PoolId, Seq};
use memmap2::MmapMut;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const MAGIC: [u8; 8] = *b"BFring1\0";
const HEADER_BYTES: usize = 4096;
const DATA_BYTES: usize = 16 << 20;
/// The most that one change may take of it.
pub(crate) const CHANGE_BYTES_MAX: usize = DATA_BYTES - (1 << 20);
/// Before a record: its CRC, its length, its number.
pub(super) const FRAME_BYTES: usize = 16;
const START_AT: std::ops::Range<usize> = 64..72;

/// Which opening of which pool a ring belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingOwner {
    pub(crate) pool: PoolId,
    pub(crate) boot_id: [u8; 16],
    pub(crate) session: u64,
}

/// Framed records with their numbers.
pub(crate) type RingRecords = Vec<(Seq, Vec<u8>)>;

/// A ring open for appending.
pub(crate) struct Ring {
    map: MmapMut,
    /// Bytes ever appended and ever trimmed; their difference is what the ring holds.
    appended: u64,
    trimmed: u64,
    /// The number of each record held, and where the record after it begins.
    ends: VecDeque<(Seq, u64)>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} bytes)", self.appended - self.trimmed)
    }
}

fn crc_of(seq: Seq, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&seq.0.to_le_bytes());
    hasher.update(record);
    hasher.finalize()
}

fn header_of(owner: RingOwner) -> [u8; 64] {
    let mut header = [0; 64];
    let mut writer = Writer::new(&mut header);
    writer.bytes(&MAGIC);
    writer.bytes(&owner.pool.0);
    writer.bytes(&owner.boot_id);
    writer.u64(owner.session);
    header
}

impl Ring {
    /// Makes an empty ring at `path` in place of whatever is there. The old one stays until the new one is whole.
    pub(crate) fn create(path: &Path, owner: RingOwner) -> Result<Self> {
        Self::create_sized(path, owner, DATA_BYTES)
    }

    /// The same with so many bytes for records.
    pub(crate) fn create_sized(path: &Path, owner: RingOwner, data_bytes: usize) -> Result<Self> {
        let header = header_of(owner);
        let write_to = |map: &mut [u8]| map[..header.len()].copy_from_slice(&header);
        Ok(Self {
            map: make(path, HEADER_BYTES + data_bytes, write_to)?,
            appended: 0,
            trimmed: 0,
            ends: VecDeque::new(),
        })
    }

    /// Makes the ring's file at `path` anew, with all that the ring holds, and goes on in it: somebody removed the file, and
    /// what is mapped would go with this process.
    pub(crate) fn put_back(&mut self, path: &Path) -> Result<()> {
        self.map = make(path, self.map.len(), |map| map.copy_from_slice(&self.map))?;
        Ok(())
    }

    /// The records that a ring of `owner` holds at `path`, numbers ascending by one; none if it belongs to another.
    pub(crate) fn recover(path: &Path, owner: RingOwner) -> Result<Option<RingRecords>> {
        let failed = |e| {
            Error::io(
                e,
                format!("{}: the shared ring cannot be read", path.display()),
            )
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        // A file of another size is no ring, and is not read: it may be larger than memory.
        let ring_bytes = HEADER_BYTES + DATA_BYTES;
        if file.metadata().map_err(failed)?.len() != ring_bytes as u64 {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(ring_bytes);
        (file.take(ring_bytes as u64).read_to_end(&mut bytes)).map_err(failed)?;
        records_in(&bytes, owner)
    }

    /// Appends a framed record. [`Ring::has_room`] made callers wait before it could overflow.
    pub(crate) fn append(&mut self, seq: Seq, record: &[u8]) {
        let mut frame = [0; FRAME_BYTES];
        let mut writer = Writer::new(&mut frame);
        writer.u32(crc_of(seq, record));
        writer.u32(u32::try_from(record.len()).unwrap_or(u32::MAX));
        writer.u64(seq.0);
        let end = self.appended + (FRAME_BYTES + record.len()) as u64;
        assert!(
            end - self.trimmed <= self.data_bytes(),
            "the shared ring overflowed"
        );
        let data = &mut self.map[HEADER_BYTES..];
        // A record counts only with its CRC, so the order of these stores does not matter to who reads them back.
        copy_in(data, self.appended, &frame);
        copy_in(data, self.appended + FRAME_BYTES as u64, record);
        self.appended = end;
        self.ends.push_back((seq, end));
    }

    /// Forgets the records before `end`: they are durable.
    pub(crate) fn trim(&mut self, end: Seq) {
        while let Some(&(seq, after)) = self.ends.front() {
            if seq >= end {
                break;
            }
            self.trimmed = after;
            self.ends.pop_front();
        }
        self.map[START_AT].copy_from_slice(&self.trimmed.to_le_bytes());
    }

    /// Whether less than half is free: writers wait for a commit.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.appended - self.trimmed > self.data_bytes() / 2
    }

    /// Whether a change that takes so many bytes, or, if it takes less, half of the ring, surely fits.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        let used = self.appended - self.trimmed;
        !self.is_nearly_full() && used + bytes as u64 <= self.data_bytes()
    }

    fn data_bytes(&self) -> u64 {
        (self.map.len() - HEADER_BYTES) as u64
    }
}

/// Makes a ring's file, filled before it has its name.
fn make(path: &Path, bytes: usize, write_to: impl FnOnce(&mut [u8])) -> Result<MmapMut> {
    let failed = |e| {
        Error::io(
            e,
            format!("{}: the shared ring cannot be made", path.display()),
        )
    };
    let fresh = path.with_extension("ring.new");
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(failed)?;
    // All of it is allocated now: a store to a page that a full tmpfs cannot give would kill the process.
    allocate(&file, bytes).map_err(failed)?;
    // SAFETY: the file is new, ours alone by its mode and by the pool's lock, and never truncated.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(failed)?;
    write_to(&mut map);
    std::fs::rename(&fresh, path).map_err(failed)?;
    Ok(map)
}

/// The records in the bytes of a ring of `owner`; none if it belongs to another.
pub(crate) fn records_in(bytes: &[u8], owner: RingOwner) -> Result<Option<RingRecords>> {
    let Some((header, data)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Ok(None);
    };
    if data.is_empty() || header[..48] != header_of(owner)[..48] {
        return Ok(None);
    }
    // Where it begins counts only modulo its length, whatever stands there.
    let mut at = Reader::new(&header[START_AT]).u64()? % data.len() as u64;
    let mut records: RingRecords = Vec::new();
    let mut taken = 0;
    while taken + FRAME_BYTES < data.len() {
        let frame = copy_out(data, at, FRAME_BYTES);
        let mut reader = Reader::new(&frame);
        let (crc, length, seq) = (reader.u32()?, reader.u32()?, Seq(reader.u64()?));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length == 0 || length > data.len() - taken - FRAME_BYTES {
            break;
        }
        let record = copy_out(data, at + FRAME_BYTES as u64, length);
        let is_next = (records.last()).is_none_or(|(last, _)| last.0.checked_add(1) == Some(seq.0));
        if crc != crc_of(seq, &record) || !is_next {
            break;
        }
        records.push((seq, record));
        taken += FRAME_BYTES + length;
        at += (FRAME_BYTES + length) as u64;
    }
    Ok(Some(records))
}

/// A ring of `owner` for a fuzzer: where it begins, then its data. `is_sealed`: with checksums that hold.
#[cfg(feature = "fuzz")]
pub(crate) fn of_bytes(owner: RingOwner, bytes: &[u8], is_sealed: bool) -> Vec<u8> {
    let mut ring = vec![0; HEADER_BYTES];
    ring[..64].copy_from_slice(&header_of(owner));
    let (start, data) = bytes.split_at(bytes.len().min(8));
    ring[START_AT.start..START_AT.start + start.len()].copy_from_slice(start);
    let at = ring[START_AT].try_into().map_or(0, u64::from_le_bytes);
    ring.extend_from_slice(data);
    let data = &mut ring[HEADER_BYTES..];
    if !is_sealed || data.is_empty() {
        return ring;
    }
    let (mut at, mut taken) = (at % data.len() as u64, 0);
    while taken + FRAME_BYTES < data.len() {
        let frame = copy_out(data, at, FRAME_BYTES);
        let mut reader = Reader::new(&frame[4..]);
        let (length, seq) = (reader.u32().unwrap_or(0), reader.u64().unwrap_or(0));
        let length = usize::try_from(length).unwrap_or(0);
        if length == 0 || length > data.len() - taken - FRAME_BYTES {
            break;
        }
        let record = copy_out(data, at + FRAME_BYTES as u64, length);
        copy_in(data, at, &crc_of(Seq(seq), &record).to_le_bytes());
        taken += FRAME_BYTES + length;
        at += (FRAME_BYTES + length) as u64;
    }
    ring
}

fn allocate(file: &File, bytes: usize) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let bytes = bytes.try_into().unwrap_or(libc::off_t::MAX);
    // SAFETY: posix_fallocate takes integers; the descriptor is open.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes) } {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    }
}

fn position(data: &[u8], at: u64) -> usize {
    usize::try_from(at % data.len() as u64).unwrap_or(0)
}

fn copy_in(data: &mut [u8], at: u64, bytes: &[u8]) {
    let start = position(data, at);
    let (now, wrapped) = bytes.split_at(bytes.len().min(data.len() - start));
    data[start..start + now.len()].copy_from_slice(now);
    data[..wrapped.len()].copy_from_slice(wrapped);
}

fn copy_out(data: &[u8], at: u64, count: usize) -> Vec<u8> {
    let start = position(data, at);
    let now = count.min(data.len() - start);
    let mut bytes = data[start..start + now].to_vec();
    bytes.extend_from_slice(&data[..count - now]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(session: u64) -> RingOwner {
        RingOwner {
            pool: PoolId([1; 16]),
            boot_id: [2; 16],
            session,
        }
    }

    /// A path that no other test has.
    fn path(name: &str) -> std::path::PathBuf {
        let process = std::process::id();
        std::env::temp_dir().join(format!("blockfork-ring-{name}-{process}"))
    }

    fn seqs(path: &Path) -> Vec<u64> {
        let found = Ring::recover(path, owner(1)).unwrap().unwrap();
        found.iter().map(|(seq, _)| seq.0).collect()
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a mapped file")]
    fn records_survive_their_writer_and_trimmed_ones_do_not() {
        let path = path("survive");
        let mut ring = Ring::create(&path, owner(1)).unwrap();
        // Several times around, with lengths that do not divide the ring.
        let record = [7; 1001];
        for seq in 1..100_000 {
            ring.append(Seq(seq), &record);
            if ring.is_nearly_full() {
                ring.trim(Seq(seq - 5));
            }
        }
        ring.trim(Seq(99_990));
        drop(ring);
        let found = Ring::recover(&path, owner(1)).unwrap().unwrap();
        assert_eq!(seqs(&path), (99_990..100_000).collect::<Vec<_>>());
        assert!(found.iter().all(|(_, bytes)| bytes == &record));
        assert!(Ring::recover(&path, owner(2)).unwrap().is_none());
        std::fs::remove_file(&path).unwrap();
        assert!(Ring::recover(&path, owner(1)).unwrap().is_none());
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a mapped file")]
    fn a_ring_that_was_removed_is_put_back_with_all_that_it_holds() {
        let path = path("removed");
        let mut ring = Ring::create(&path, owner(1)).unwrap();
        for seq in 1..5 {
            ring.append(Seq(seq), b"record");
        }
        ring.trim(Seq(3));
        std::fs::remove_file(&path).unwrap();
        ring.append(Seq(5), b"record");
        ring.put_back(&path).unwrap();
        assert_eq!(seqs(&path), [3, 4, 5]);
        ring.append(Seq(6), b"record");
        ring.trim(Seq(5));
        assert_eq!(seqs(&path), [5, 6]);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a mapped file")]
    fn a_ring_of_another_pool_boot_or_size_is_nobodys() {
        let path = path("others");
        let mut ring = Ring::create(&path, owner(1)).unwrap();
        ring.append(Seq(1), b"record");
        let mut others = [owner(1), owner(1), owner(7)];
        others[0].pool = PoolId([9; 16]);
        others[1].boot_id[15] = 0;
        for other in others {
            assert!(Ring::recover(&path, other).unwrap().is_none());
        }
        assert_eq!(seqs(&path), [1]);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len((HEADER_BYTES + DATA_BYTES) as u64 - 1)
            .unwrap();
        assert!(Ring::recover(&path, owner(1)).unwrap().is_none());
        // A new ring takes the old one's place, and nothing is left beside it.
        drop(Ring::create(&path, owner(1)).unwrap());
        assert!(seqs(&path).is_empty());
        assert!(!path.with_extension("ring.new").exists());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Ring::create(&path, owner(1)).is_err());
        assert!(Ring::recover(&path, owner(1)).unwrap().is_none());
        std::fs::remove_file(path.with_extension("ring.new")).unwrap();
        std::fs::remove_dir(&path).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a mapped file")]
    fn a_ring_is_read_up_to_the_first_record_that_is_not_the_next() {
        let path = path("next");
        let mut ring = Ring::create(&path, owner(1)).unwrap();
        for seq in [5, 6, 7, 9] {
            ring.append(Seq(seq), &[3; 100]);
        }
        assert_eq!(seqs(&path), [5, 6, 7]);
        // In the bytes of record 6, in its number, in its length.
        for at in [116 + 50, 116 + 8, 116 + 4] {
            ring.map[HEADER_BYTES + at] ^= 1;
            assert_eq!(seqs(&path), [5]);
            ring.map[HEADER_BYTES + at] ^= 1;
        }
        ring.trim(Seq(6));
        assert_eq!(seqs(&path), [6, 7]);
        ring.trim(Seq(6));
        assert_eq!(seqs(&path), [6, 7]);
        ring.trim(Seq(100));
        assert!(seqs(&path).is_empty());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a mapped file")]
    fn a_ring_can_be_filled_to_its_last_byte() {
        let path = path("full");
        let mut ring = Ring::create(&path, owner(1)).unwrap();
        let record = vec![5; (64 << 10) - FRAME_BYTES];
        // Begin in the middle, so that it goes around its end.
        for seq in 1..101 {
            ring.append(Seq(seq), &record);
        }
        ring.trim(Seq(101));
        for seq in 101..229 {
            assert!(!ring.is_nearly_full());
            ring.append(Seq(seq), &record);
        }
        assert!(!ring.is_nearly_full(), "half is full");
        ring.append(Seq(229), &record);
        assert!(ring.is_nearly_full());
        for seq in 230..357 {
            ring.append(Seq(seq), &record);
        }
        assert_eq!(seqs(&path), (101..357).collect::<Vec<_>>());
        let overflown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            ring.append(Seq(357), b"one more");
        }));
        assert!(overflown.is_err(), "the oldest record is overwritten");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_ring_that_begins_beyond_every_address_is_read_like_any_other() {
        let mut bytes = vec![0; HEADER_BYTES + 256];
        bytes[..64].copy_from_slice(&header_of(owner(1)));
        bytes[START_AT].fill(0xff);
        assert_eq!(records_in(&bytes, owner(1)).unwrap(), Some(Vec::new()));
        let record = [7; 20];
        let last = u64::MAX;
        let mut frame = Vec::new();
        frame.extend(crc_of(Seq(last), &record).to_le_bytes());
        frame.extend(20_u32.to_le_bytes());
        frame.extend(last.to_le_bytes());
        frame.extend(record);
        let at = u64::MAX % 256;
        for frame_at in [at, at + frame.len() as u64] {
            copy_in(&mut bytes[HEADER_BYTES..], frame_at, &frame);
        }
        let found = records_in(&bytes, owner(1)).unwrap().unwrap();
        assert_eq!(found, [(Seq(last), record.to_vec())]);
        assert_eq!(records_in(&bytes[..100], owner(1)).unwrap(), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a sparse file")]
    fn a_file_larger_than_any_ring_is_not_read() {
        let path = std::env::temp_dir().join(format!("blockfork-ring-big-{}", std::process::id()));
        File::create(&path).unwrap().set_len(1 << 30).unwrap();
        assert!(Ring::recover(&path, owner(1)).unwrap().is_none());
        std::fs::remove_file(&path).unwrap();
    }
}
