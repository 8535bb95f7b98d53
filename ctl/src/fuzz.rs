//! Doors for fuzzing: what reads bytes from outside, called as the program calls it. Each must end without a panic,
//! and whatever it accepts must be what it prints.

use crate::devices::Saved;
use crate::exit_code::{one_line, printable};
use crate::protocol::{self, LineLimits, Message, Request};
use crate::state::PoolEntry;
use crate::{cli, signature, size};
use blockfork::clock::SystemClock;
use std::cell::RefCell;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;

/// What a client sends over the control socket: lines up to the end or to the first that is refused.
pub fn requests(bytes: &[u8]) {
    let limits = LineLimits {
        bytes_max: protocol::REQUEST_BYTES_MAX,
        wait_ns_max: u64::MAX,
    };
    let clock = SystemClock::new();
    let mut input = BufReader::with_capacity(4096, bytes);
    while let Ok(Some(line)) = protocol::read_line(&mut input, limits, &clock) {
        match protocol::parse_request(&line) {
            Ok(request) => assert!(is_same_line(&request)),
            Err(error) => assert!(is_one_line(&one_line(&error))),
        }
    }
}

/// What a daemon sends back, as a client reads it.
pub fn message(bytes: &[u8]) {
    if let Ok(Message::Error { kind, message }) = serde_json::from_slice(bytes) {
        assert!(is_one_line(&one_line(&Message::into_error(&kind, message))));
    }
}

/// A name, a target or a size as typed.
pub fn word(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    assert!(is_one_line(&printable(&text)));
    if let Ok(bytes) = size::parse(&text) {
        assert!(bytes > 0);
        assert!(is_one_line(&size::human(bytes)));
    }
    if let Ok(target) = cli::path_target(&text) {
        assert_eq!(format!("{}/{}", target.pool, target.path), text);
    }
}

/// The files in which the program keeps what it knows.
pub fn state_files(bytes: &[u8]) {
    if let Ok(entry) = serde_json::from_slice::<PoolEntry>(bytes) {
        assert!(serde_json::to_vec(&entry).is_ok_and(|line| !line.is_empty()));
    }
    if let Ok(saved) = serde_json::from_slice::<Saved>(bytes) {
        assert!(serde_json::to_vec(&saved).is_ok_and(|line| !line.is_empty()));
    }
}

/// What `pool create` finds in a file that is there. The first 8 bytes are its size; then come edits: how many bytes, a
/// place of 24 bits from the start or, in its highest bit, from the end, and the bytes. What was wiped is found no more.
pub fn signatures(bytes: &[u8]) {
    let (size, mut edits) = bytes.split_first_chunk().unwrap_or((&[0; 8], &[]));
    // Small ones and those around a block's end are as likely as huge ones.
    let size = u64::from_le_bytes(*size) % FILE_BYTES_MAX;
    let file = Sparse(RefCell::default());
    while let Some(([length, place @ ..], rest)) = edits.split_first_chunk::<4>() {
        let (content, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        edits = rest;
        let place = u64::from(u32::from_le_bytes([place[0], place[1], place[2], 0]));
        let at = if place >> 23 == 0 {
            place
        } else {
            size.saturating_sub(place & 0x7f_ffff)
        };
        let room = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX);
        let content = content.get(..room).unwrap_or(content);
        file.0.borrow_mut().push((at, content.to_vec()));
    }
    let Ok(found) = signature::probe(&file, size) else {
        unreachable!("it can be read");
    };
    assert!(found.iter().all(|found| found.offset < size));
    let has_data = signature::has_data(&file, size).is_ok_and(|has_data| has_data);
    let is_at_start = |found: &signature::Found| found.offset < FOUND_BY_ITS_DATA;
    assert!(has_data || !found.iter().any(is_at_start));
    assert!(signature::overwrite(&file, size, &found).is_ok());
    assert!(signature::probe(&file, size).is_ok_and(|found| found.is_empty()));
}

/// Larger than any place that is looked at, and than 32 bits.
const FILE_BYTES_MAX: u64 = 1 << 41;
/// Before this, a signature is also data.
const FOUND_BY_ITS_DATA: u64 = 4096;

/// A file of zeros but for these writes, the later over the earlier.
struct Sparse(RefCell<Vec<(u64, Vec<u8>)>>);

impl FileExt for Sparse {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        buffer.fill(0);
        for (at, content) in &*self.0.borrow() {
            for (byte, place) in content.iter().zip(*at..) {
                let place = place.checked_sub(offset).map(usize::try_from);
                if let Some(Ok(place)) = place
                    && let Some(to) = buffer.get_mut(place)
                {
                    *to = *byte;
                }
            }
        }
        Ok(buffer.len())
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        self.0.borrow_mut().push((offset, buffer.to_vec()));
        Ok(buffer.len())
    }
}

fn is_same_line(request: &Request) -> bool {
    let mut line = Vec::new();
    protocol::write_line(&mut line, request).is_ok()
        && line.iter().position(|byte| *byte == b'\n') == Some(line.len() - 1)
        && protocol::parse_request(&line).is_ok_and(|again| again == *request)
}

fn is_one_line(text: &str) -> bool {
    !text.contains(char::is_control)
}
