//! Doors for fuzzing: what reads bytes from outside, called as the program calls it. Each must end without a panic,
//! and whatever it accepts must be what it prints.

use crate::devices::Saved;
use crate::exit_code::{one_line, printable};
use crate::protocol::{self, LineLimits, Message, Request};
use crate::state::PoolEntry;
use crate::{cli, size};
use blockfork::clock::SystemClock;
use std::io::BufReader;

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

fn is_same_line(request: &Request) -> bool {
    let mut line = Vec::new();
    protocol::write_line(&mut line, request).is_ok()
        && line.iter().position(|byte| *byte == b'\n') == Some(line.len() - 1)
        && protocol::parse_request(&line).is_ok_and(|again| again == *request)
}

fn is_one_line(text: &str) -> bool {
    !text.contains(char::is_control)
}
