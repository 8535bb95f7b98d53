//! A small NBD client: it sends requests and takes replies in its own time, so that a test knows what was acknowledged.
//! It says what it is told to, also what no client should.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Commands.
pub const READ: u16 = 0;
/// Write the payload.
pub const WRITE: u16 = 1;
/// Leave.
pub const DISC: u16 = 2;
/// Make what was acknowledged durable.
pub const FLUSH: u16 = 3;
/// Unmap.
pub const TRIM: u16 = 4;
/// Zero.
pub const WRITE_ZEROES: u16 = 6;
/// What is allocated.
pub const BLOCK_STATUS: u16 = 7;
/// The flag of a write that is durable when it is acknowledged.
pub const FUA: u16 = 1;
/// The flag of zeros that stay allocated.
pub const NO_HOLE: u16 = 2;

/// How long a reply may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection after its handshake.
#[derive(Debug)]
pub struct Client {
    input: BufReader<UnixStream>,
    /// The export's size in bytes.
    pub bytes: u64,
}

/// A request without its payload.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Comes back with the reply.
    pub cookie: u64,
    /// What to do.
    pub command: u16,
    /// How.
    pub flags: u16,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub bytes: u32,
}

/// A reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// That of the request.
    pub cookie: u64,
    /// 0 for success.
    pub errno: u32,
    /// To a read.
    pub data: Vec<u8>,
    /// To a question what is allocated: lengths and flags.
    pub status: Vec<(u32, u32)>,
}

/// A stream that has been greeted, and has answered with its flags.
///
/// # Errors
///
/// If nobody listens, or it is no NBD server.
pub fn greeted(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(&3_u32.to_be_bytes())?;
    Ok(stream)
}

/// An option of the handshake as it goes over the wire.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(number.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
    out
}

/// The next reply to an option: its kind and data.
///
/// # Errors
///
/// If the connection ends or the reply is none.
pub fn option_reply(stream: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    if u64_at(&head, 0) != 0x0003_e889_0455_65a9 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut data = vec![0; u32_at(&head, 16) as usize];
    stream.read_exact(&mut data)?;
    Ok((u32_at(&head, 12), data))
}

impl Ask {
    /// The request as it goes over the wire.
    pub fn encode(self) -> Vec<u8> {
        let mut out = 0x2560_9513_u32.to_be_bytes().to_vec();
        out.extend(self.flags.to_be_bytes());
        out.extend(self.command.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        out.extend(self.bytes.to_be_bytes());
        out
    }
}

impl Client {
    /// Connects to the default export, with structured replies and `base:allocation`.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let mut stream = greeted(path)?;
        stream.write_all(&option(8, &[]))?;
        let mut wanted = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15];
        wanted.extend(b"base:allocation");
        stream.write_all(&option(10, &wanted))?;
        stream.write_all(&option(7, &[0; 6]))?;
        let mut bytes = 0;
        let mut acks = 0;
        while acks < 3 {
            match option_reply(&mut stream)? {
                (1, _) => acks += 1,
                (3, data) if data.starts_with(&[0, 0]) => bytes = u64_at(&data, 2),
                (kind, _) if kind >> 31 == 1 => return Err(io::ErrorKind::Unsupported.into()),
                _ => {}
            }
        }
        let input = BufReader::with_capacity(256 << 10, stream);
        Ok(Self { input, bytes })
    }

    /// The socket.
    pub fn stream(&mut self) -> &mut UnixStream {
        self.input.get_mut()
    }

    /// Sends a request and its payload.
    ///
    /// # Errors
    ///
    /// If the connection is lost.
    pub fn send(&mut self, ask: Ask, payload: &[u8]) -> io::Result<()> {
        let mut message = ask.encode();
        message.extend(payload);
        self.stream().write_all(&message)
    }

    /// The next reply, to whatever request.
    ///
    /// # Errors
    ///
    /// If the connection is lost, or what comes is no reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut magic = [0; 4];
        self.input.read_exact(&mut magic)?;
        let mut reply = Reply::default();
        match u32::from_be_bytes(magic) {
            0x6744_6698 => {
                let mut head = [0; 12];
                self.input.read_exact(&mut head)?;
                reply.errno = u32_at(&head, 0);
                reply.cookie = u64_at(&head, 4);
            }
            0x668e_33ef => {
                let mut head = [0; 16];
                self.input.read_exact(&mut head)?;
                reply.cookie = u64_at(&head, 4);
                let mut data = vec![0; u32_at(&head, 12) as usize];
                self.input.read_exact(&mut data)?;
                match u16::from_be_bytes([head[2], head[3]]) {
                    0 => {}
                    1 => reply.data = data.split_off(8),
                    5 => {
                        let pair = |pair: &[u8]| (u32_at(pair, 0), u32_at(pair, 4));
                        reply.status = data[4..].chunks_exact(8).map(pair).collect();
                    }
                    _ => reply.errno = u32_at(&data, 0),
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(reply)
    }

    /// Sends a request that is alone, and takes its reply.
    ///
    /// # Errors
    ///
    /// As [`Client::send`] and [`Client::receive`].
    pub fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        bytes: u32,
        payload: &[u8],
    ) -> io::Result<Reply> {
        let ask = Ask {
            cookie: offset ^ 0x55,
            command,
            flags,
            offset,
            bytes,
        };
        self.send(ask, payload)?;
        let reply = self.receive()?;
        if reply.cookie != ask.cookie {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(reply)
    }

    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// As [`Client::call`], or with the errno of the reply.
    pub fn read(&mut self, offset: u64, bytes: u32) -> io::Result<Vec<u8>> {
        succeeded(self.call(READ, 0, offset, bytes, &[])?).map(|reply| reply.data)
    }

    /// Writes bytes.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        succeeded(self.call(WRITE, 0, offset, bytes, data)?).map(drop)
    }

    /// A request without payload that must succeed.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn change(&mut self, command: u16, offset: u64, bytes: u32) -> io::Result<()> {
        succeeded(self.call(command, 0, offset, bytes, &[])?).map(drop)
    }
}

fn succeeded(reply: Reply) -> io::Result<Reply> {
    match i32::try_from(reply.errno) {
        Ok(0) => Ok(reply),
        Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
        Err(e) => Err(io::Error::other(e)),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}
