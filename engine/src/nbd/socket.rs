//! A connection: unix or TCP.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// On this machine.
    Unix(UnixStream),
    /// From anywhere.
    Tcp(TcpStream),
}

impl Socket {
    /// How long a read and a write may take; for ever with none.
    pub(super) fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(time)?;
                stream.set_write_timeout(time)
            }
            Self::Tcp(stream) => {
                // Answers are small and awaited.
                stream.set_nodelay(true)?;
                stream.set_read_timeout(time)?;
                stream.set_write_timeout(time)
            }
        }
    }

    /// Ends both directions; whoever reads or writes comes back.
    pub(super) fn shut_down(&self) {
        let done = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
        if let Err(error) = done {
            tracing::debug!(%error, "the other end was gone already");
        }
    }

    /// Writes a head and what follows it, in one packet where that is possible.
    pub(super) fn write_both(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut socket = self;
        let mut done = 0;
        while done < head.len() {
            let rest = head.get(done..).unwrap_or_default();
            match socket.write_vectored(&[IoSlice::new(rest), IoSlice::new(body)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => done += bytes,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        socket.write_all(body.get(done - head.len()..).unwrap_or_default())
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => { stream }.read(buffer),
            Socket::Tcp(stream) => { stream }.read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => { stream }.write(buffer),
            Socket::Tcp(stream) => { stream }.write(buffer),
        }
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => { stream }.write_vectored(buffers),
            Socket::Tcp(stream) => { stream }.write_vectored(buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
