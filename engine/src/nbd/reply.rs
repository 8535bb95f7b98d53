//! The answers of the transmission: a simple reply, or one chunk where structured replies were agreed on.
//! A reply that carries data is its head here; the data follows as it is.

use super::handshake::Agreed;
use super::request::{Command, Request};
use super::serve::Answer;
use super::wire::{Errno, Message, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, allocation, chunk};
use crate::pool::Run;

/// The longest text in an error chunk.
const MESSAGE_BYTES_MAX: usize = 512;

/// The bytes before the data, if there is any, otherwise the whole reply.
pub(super) fn head(
    request: &Request,
    agreed: Agreed,
    answer: &Result<Answer, (Errno, String)>,
) -> Vec<u8> {
    let may_be_chunks = matches!(request.command, Command::Read | Command::BlockStatus { .. });
    let in_chunks = may_be_chunks && agreed.structured;
    match answer {
        Err((errno, message)) if in_chunks => error_chunk(request.cookie, *errno, message),
        Err((errno, _)) => simple(request.cookie, *errno as u32),
        // An empty read has no content to put in a chunk.
        Ok(Answer::Done) if in_chunks => chunk_head(request.cookie, chunk::NONE, 0).0,
        Ok(Answer::Data(data)) if in_chunks => {
            let bytes = 8 + u32::try_from(data.bytes).unwrap_or(u32::MAX - 8);
            let message = chunk_head(request.cookie, chunk::OFFSET_DATA, bytes);
            message.u64(request.offset).0
        }
        Ok(Answer::Done | Answer::Data(_)) => simple(request.cookie, 0),
        Ok(Answer::Status(runs)) => status_chunk(request.cookie, runs),
    }
}

fn simple(cookie: u64, errno: u32) -> Vec<u8> {
    let message = Message::default().u32(SIMPLE_REPLY_MAGIC);
    message.u32(errno).u64(cookie).0
}

/// The head of the only, and so last, chunk of a reply.
fn chunk_head(cookie: u64, kind: u16, bytes: u32) -> Message {
    let message = Message::default().u32(STRUCTURED_REPLY_MAGIC);
    message.u16(chunk::DONE).u16(kind).u64(cookie).u32(bytes)
}

fn error_chunk(cookie: u64, errno: Errno, text: &str) -> Vec<u8> {
    let mut end = text.len().min(MESSAGE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default().as_bytes();
    let length = u16::try_from(text.len()).unwrap_or(0);
    let message = chunk_head(cookie, chunk::ERROR, 6 + u32::from(length));
    message.u32(errno as u32).u16(length).bytes(text).0
}

fn status_chunk(cookie: u64, runs: &[Run]) -> Vec<u8> {
    let bytes = 4 + 8 * u32::try_from(runs.len()).unwrap_or(0);
    let mut message = chunk_head(cookie, chunk::BLOCK_STATUS, bytes);
    message = message.u32(allocation::CONTEXT_ID);
    for run in runs {
        let flags = if run.is_mapped {
            allocation::DATA
        } else {
            allocation::HOLE_THAT_READS_ZERO
        };
        let bytes = u32::try_from(run.bytes).unwrap_or(u32::MAX);
        message = message.u32(bytes).u32(flags);
    }
    message.0
}

#[cfg(test)]
mod tests {
    use super::super::request::REQUEST_BYTES;
    use super::super::wire::{Fields, REQUEST_MAGIC, command};
    use super::*;

    const STRUCTURED: Agreed = Agreed {
        structured: true,
        allocation: true,
    };

    fn request(number: u16) -> Request {
        let message = Message::default().u32(REQUEST_MAGIC).u16(0).u16(number);
        let bytes: [u8; REQUEST_BYTES] =
            (message.u64(77).u64(4096).u32(8192).0).try_into().unwrap();
        Request::decode(bytes).unwrap()
    }

    #[test]
    fn an_error_is_what_the_client_can_read() {
        let failed = Err((Errno::Io, "\u{e9}".repeat(400)));
        let bytes = head(&request(command::READ), STRUCTURED, &failed);
        let mut fields = Fields(&bytes);
        assert_eq!(fields.u32(), Some(STRUCTURED_REPLY_MAGIC));
        assert_eq!((fields.u16(), fields.u16()), (Some(1), Some(chunk::ERROR)));
        assert_eq!(fields.u64(), Some(77));
        let length = fields.u32().unwrap() as usize;
        assert_eq!(length, fields.0.len());
        assert_eq!((fields.u32(), fields.u16()), (Some(5), Some(512)));
        for (number, agreed) in [
            (command::READ, Agreed::default()),
            (command::WRITE, STRUCTURED),
        ] {
            let bytes = head(&request(number), agreed, &failed);
            let mut fields = Fields(&bytes);
            assert_eq!(fields.u32(), Some(SIMPLE_REPLY_MAGIC));
            assert_eq!((fields.u32(), fields.u64()), (Some(5), Some(77)));
            assert!(fields.is_empty());
        }
    }

    #[test]
    fn a_status_says_how_long_each_run_is() {
        let run = |bytes, is_mapped| Run { bytes, is_mapped };
        let answer = Ok(Answer::Status(vec![run(4096, true), run(8192, false)]));
        let bytes = head(&request(command::BLOCK_STATUS), STRUCTURED, &answer);
        let mut fields = Fields(&bytes);
        fields.take(16).unwrap();
        assert_eq!(fields.u32(), Some(20));
        let numbers: Vec<u32> = std::iter::from_fn(|| fields.u32()).collect();
        assert_eq!(numbers, [allocation::CONTEXT_ID, 4096, 0, 8192, 3]);
    }
}
