//! Progress lines for a client that may read them slowly or not at all: the work that they are about never waits for it.

use crate::protocol::{self, Message};
use nix::sys::socket::{MsgFlags, send};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use tracing::debug;

/// Writes progress lines as far as the socket takes them at once, and leaves out the others.
pub(super) struct ProgressLines<'a> {
    stream: &'a UnixStream,
    /// What the socket did not take of the line that it took last.
    rest: Vec<u8>,
}

impl<'a> ProgressLines<'a> {
    pub(super) fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            rest: Vec::new(),
        }
    }

    /// Tells how much of how much is done, unless the client is behind.
    pub(super) fn tell(&mut self, done: u64, total: u64) {
        if self.rest.is_empty()
            && let Err(e) = protocol::write_line(&mut self.rest, &Message::Progress { done, total })
        {
            debug!("progress cannot be written: {e}");
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.stream.as_raw_fd(), &self.rest, flags) {
            Ok(taken) => drop(self.rest.drain(..taken)),
            // The line waits for the socket, and later ones are left out.
            Err(e) => debug!("nobody reads the progress: {e}"),
        }
    }

    /// Ends the last line, so that others can follow. Waits for the client.
    pub(super) fn end(self) -> io::Result<()> {
        let mut stream = self.stream;
        stream.write_all(&self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn a_client_that_does_not_read_makes_nobody_wait_and_finds_whole_lines_later() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut lines = ProgressLines::new(&ours);
        // Many times what a socket holds.
        for done in 0..200_000 {
            lines.tell(done, 200_000);
        }
        let reader = std::thread::spawn(move || {
            let read: Vec<String> = BufReader::new(theirs).lines().map(Result::unwrap).collect();
            read
        });
        lines.end().unwrap();
        drop(ours);
        let read = reader.join().unwrap();
        assert!(read.len() > 10 && read.len() < 200_000, "{}", read.len());
        for line in read {
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["progress"]["total"], 200_000, "{line}");
        }
    }
}
