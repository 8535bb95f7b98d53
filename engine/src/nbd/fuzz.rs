//! Doors for fuzzing: a whole handshake, and the requests of a whole transmission, as a session reads them.
//!
//! What is held here: no answer is long, every answer can be read, and no request passes that is outside its export.

use super::handshake::{Agreed, Offer};
use super::reply;
use super::request::{Bounds, Command, Request};
use super::serve::{Answer, Payload};
use super::session;
use super::wire::{Errno, Fields, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use crate::clock::ManualClock;
use crate::limits::{NBD_PAYLOAD_BYTES_MAX, NBD_STATUS_RUNS_MAX};
use crate::pool::Run;
use crate::units::BLOCK_LEN;

const NAME: &str = "p0/v";
/// Bytes of the export; with sectors of 4 KiB and of 512 bytes it has a size of its own.
const BYTES: u64 = 1 << 30;
const GREETING_BYTES: usize = 18;
/// No option is answered with more.
const ANSWER_BYTES_MAX: usize = 1000;
/// Bytes in the header of an option, and the least that an answer to one takes.
const OPTION_BYTES: usize = 16;

/// A handshake from the client's flags on. The first byte says what is exported.
pub fn handshake(bytes: &[u8]) {
    let (kind, mut input) = split(bytes);
    let sent = input.len();
    let bounds = bounds(kind);
    let offer = Offer {
        name: NAME,
        bytes: bounds.bytes,
        sector_bytes: bounds.sector_bytes,
        is_read_only: bounds.is_read_only,
    };
    let mut output = Vec::new();
    let agreed = session::agree(&mut input, &mut output, offer, &ManualClock::default());
    let options = 1 + sent / OPTION_BYTES;
    assert!(output.len() <= GREETING_BYTES + options * ANSWER_BYTES_MAX);
    let mut answers = Fields(&output);
    assert!(answers.take(GREETING_BYTES).is_some());
    while !answers.is_empty() {
        let rest = answers.0.len();
        if answers.u64() != Some(OPTION_REPLY_MAGIC) {
            // The one answer without a head, to the option that ends a handshake.
            assert!(matches!(agreed, Ok(Some(_))));
            assert!(rest == 10 || rest == 134);
            break;
        }
        assert!(answers.u64().is_some() && answers.string().is_some());
    }
    if let Ok(Some(agreed)) = agreed {
        assert!(agreed.structured || !agreed.allocation);
    }
}

/// Requests up to the end, or to the first that no server can go on after. The first byte says what is exported and what
/// was agreed on.
pub fn requests(bytes: &[u8]) {
    let (kind, mut input) = split(bytes);
    let bounds = bounds(kind);
    while let Ok(Some(request)) = session::next_request(&mut input) {
        // What a session makes room for, and reads.
        let Ok(payload) = request.payload_bytes() else {
            break;
        };
        let most = usize::try_from(NBD_PAYLOAD_BYTES_MAX).unwrap_or(usize::MAX);
        assert!(payload <= most && request.memory_bytes() <= most);
        let Some((_, rest)) = input.split_at_checked(payload) else {
            break;
        };
        input = rest;
        let answer = match request.check(&bounds) {
            Ok(()) => {
                assert!(is_inside(&request, &bounds));
                Ok(answer(&request))
            }
            Err(errno) => Err((errno, "refused".repeat(usize::from(kind)))),
        };
        check_reply(&request, bounds.agreed, &answer);
    }
}

fn split(bytes: &[u8]) -> (u8, &[u8]) {
    bytes
        .split_first()
        .map_or((0, bytes), |(first, rest)| (*first, rest))
}

fn bounds(kind: u8) -> Bounds {
    let has = |bit: u8| kind & 1 << bit != 0;
    Bounds {
        bytes: if has(1) { BYTES + 512 } else { BYTES },
        sector_bytes: if has(1) { 512 } else { 4096 },
        is_read_only: has(0),
        agreed: Agreed {
            structured: has(2),
            allocation: has(2) && has(3),
        },
    }
}

/// Said another way than the check says it.
fn is_inside(request: &Request, bounds: &Bounds) -> bool {
    let sector = u128::from(bounds.sector_bytes);
    let (offset, bytes) = (u128::from(request.offset), u128::from(request.bytes));
    let changes = matches!(
        request.command,
        Command::Write | Command::Trim | Command::WriteZeroes { .. }
    );
    match request.command {
        Command::Flush => true,
        Command::Disconnect | Command::Unknown => false,
        Command::Read
        | Command::Write
        | Command::Trim
        | Command::WriteZeroes { .. }
        | Command::BlockStatus { .. } => {
            offset + bytes <= u128::from(bounds.bytes)
                && offset % sector == 0
                && bytes % sector == 0
                && !(changes && bounds.is_read_only)
        }
    }
}

/// What a volume might answer, without its bytes.
fn answer(request: &Request) -> Answer {
    match request.command {
        Command::Read if request.bytes > 0 => Answer::Data(Payload::zeroed(BLOCK_LEN)),
        Command::BlockStatus { only_one } => {
            let count = if only_one { 1 } else { 3 };
            let run = |index: u64| Run {
                bytes: u64::from(request.bytes),
                is_mapped: index.is_multiple_of(2),
            };
            Answer::Status((0..count).map(run).collect())
        }
        Command::Read
        | Command::Write
        | Command::Flush
        | Command::Trim
        | Command::WriteZeroes { .. }
        | Command::Disconnect
        | Command::Unknown => Answer::Done,
    }
}

/// A client can read the reply, and tell to what it is.
fn check_reply(request: &Request, agreed: Agreed, answer: &Result<Answer, (Errno, String)>) {
    let head = reply::head(request, agreed, answer);
    let data = match answer {
        Ok(Answer::Data(data)) => data.bytes,
        Ok(Answer::Done | Answer::Status(_)) | Err(_) => 0,
    };
    let mut fields = Fields(&head);
    match fields.u32() {
        Some(SIMPLE_REPLY_MAGIC) => {
            let errno = answer.as_ref().err().map_or(0, |(errno, _)| *errno as u32);
            assert_eq!(fields.u32(), Some(errno));
            assert_eq!(fields.u64(), Some(request.cookie));
        }
        Some(STRUCTURED_REPLY_MAGIC) => {
            assert!(agreed.structured);
            assert!(fields.u32().is_some());
            assert_eq!(fields.u64(), Some(request.cookie));
            let follow = fields.u32().and_then(|bytes| usize::try_from(bytes).ok());
            let there = fields.0.len();
            assert_eq!(follow, Some(there + data));
            assert!(there <= 4 + 8 * NBD_STATUS_RUNS_MAX);
            assert!(fields.take(there).is_some());
        }
        _ => unreachable!("no magic of a reply"),
    }
    assert!(fields.is_empty());
}
