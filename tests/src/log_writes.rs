//! The log of the device mapper's `log-writes` target, read back and replayed: every write as the device got it, in the
//! order in which flushes made them durable (Documentation/admin-guide/device-mapper/log-writes.rst of the kernel).
//!
//! A superblock in the first sector; then for each write a sector that describes it and, but for a discard, its data.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// Bytes of a description before a mark's text.
const ENTRY_BYTES: usize = 32;

/// A log.
#[derive(Debug)]
pub struct Log<R> {
    input: R,
    sector_bytes: u64,
    /// In order.
    pub entries: Vec<Entry>,
}

/// A write, a discard or a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    flags: u64,
    /// Where it begins and how long it is, in bytes of the device.
    offset: u64,
    bytes: u64,
    /// Where its data stands in the log.
    data_at: u64,
    /// The text of a mark.
    pub mark: Option<String>,
}

impl Entry {
    /// Whether everything before it, or it itself, is durable once it is answered.
    pub fn is_flush(&self) -> bool {
        self.flags & (FLUSH | FUA) != 0
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn wrong(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("log of writes: {what}"))
}

impl<R: Read + Seek> Log<R> {
    /// Reads what the log describes.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is no log.
    pub fn read(mut input: R) -> io::Result<Self> {
        let mut sector = vec![0; 512];
        input.seek(SeekFrom::Start(0))?;
        input.read_exact(&mut sector)?;
        if word(&sector, 0) != MAGIC || word(&sector, 8) != VERSION {
            return Err(wrong("has no superblock"));
        }
        let count = word(&sector, 16);
        let sector_bytes = u64::from(u32::from_le_bytes(sector[24..28].try_into().unwrap()));
        if !(512..=4096).contains(&sector_bytes) {
            return Err(wrong(format!("has sectors of {sector_bytes} bytes")));
        }
        let mut entries = Vec::new();
        let mut at = sector_bytes;
        sector.resize(usize::try_from(sector_bytes).unwrap(), 0);
        for _ in 0..count {
            input.seek(SeekFrom::Start(at))?;
            input.read_exact(&mut sector)?;
            at += sector_bytes;
            let flags = word(&sector, 16);
            let text = usize::try_from(word(&sector, 24)).map_err(wrong)?;
            let mark = match sector.get(ENTRY_BYTES..ENTRY_BYTES.saturating_add(text)) {
                Some(text) if flags & MARK != 0 => {
                    let text = String::from_utf8_lossy(text);
                    Some(text.trim_end_matches('\0').to_owned())
                }
                Some(_) => None,
                None => return Err(wrong(format!("a mark of {text} bytes"))),
            };
            let entry = Entry {
                flags,
                offset: word(&sector, 0) * sector_bytes,
                bytes: word(&sector, 8) * sector_bytes,
                data_at: at,
                mark,
            };
            if flags & DISCARD == 0 {
                at += entry.bytes;
            }
            entries.push(entry);
        }
        Ok(Self {
            input,
            sector_bytes,
            entries,
        })
    }

    /// Does again what an entry describes.
    ///
    /// # Errors
    ///
    /// If the log cannot be read or the file not be written.
    pub fn replay(&mut self, number: usize, onto: &File) -> io::Result<()> {
        let entry = &self.entries[number];
        let mut data = vec![0; usize::try_from(entry.bytes).map_err(wrong)?];
        // What a discard leaves is the device's affair; zeros are what a RAM disk leaves.
        if entry.flags & DISCARD == 0 {
            self.input.seek(SeekFrom::Start(entry.data_at))?;
            self.input.read_exact(&mut data)?;
        }
        onto.write_all_at(&data, entry.offset)
    }

    /// Bytes of its sectors.
    pub fn sector_bytes(&self) -> u64 {
        self.sector_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn entry(sector: u64, count: u64, flags: u64, text: &str) -> Vec<u8> {
        let words = [sector, count, flags, text.len() as u64];
        let mut out: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        out.extend(text.as_bytes());
        out.resize(512, 0);
        out
    }

    fn log(entries: &[Vec<u8>]) -> Cursor<Vec<u8>> {
        let words = [MAGIC, VERSION, entries.len() as u64, 512];
        let mut out: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        out.resize(512, 0);
        out.extend(entries.concat());
        Cursor::new(out)
    }

    #[test]
    fn a_log_is_replayed_in_order_and_its_marks_are_read() {
        let with_data = |sector, flags, byte| {
            let mut out = entry(sector, 2, flags, "");
            out.extend([byte; 1024]);
            out
        };
        let path = std::env::temp_dir().join(format!("log-writes-{}", std::process::id()));
        let onto = File::create_new(&path).unwrap();
        let mut log = Log::read(log(&[
            with_data(0, 0, 1),
            with_data(1, FUA, 2),
            entry(0, 0, MARK, "here"),
            entry(1, 1, DISCARD, ""),
            entry(0, 0, FLUSH, ""),
            with_data(4, 0, 3),
        ]))
        .unwrap();
        let flushes: Vec<bool> = log.entries.iter().map(Entry::is_flush).collect();
        assert_eq!(flushes, [false, true, false, false, true, false]);
        assert_eq!(log.entries[2].mark.as_deref(), Some("here"));
        let mut seen = Vec::new();
        for number in 0..log.entries.len() {
            log.replay(number, &onto).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            seen.push(bytes.iter().step_by(512).copied().collect::<Vec<u8>>());
        }
        std::fs::remove_file(path).unwrap();
        assert_eq!(seen[0], [1, 1]);
        assert_eq!(seen[1], [1, 2, 2]);
        assert_eq!(seen[2], seen[1]);
        assert_eq!(seen[4], [1, 0, 2]);
        assert_eq!(seen[5], [1, 0, 2, 0, 3, 3]);
    }

    #[test]
    fn what_is_no_log_is_an_error() {
        assert!(Log::read(Cursor::new(vec![0; 4096])).is_err());
        assert!(Log::read(log(&[entry(0, 0, MARK, &"x".repeat(479)), vec![]])).is_err());
        let mut cut = log(&[entry(0, 0, 0, "")]).into_inner();
        cut.truncate(1000);
        assert!(Log::read(Cursor::new(cut)).is_err());
    }
}
