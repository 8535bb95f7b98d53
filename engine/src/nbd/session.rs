//! One connection, from the greeting to its end: the thread that reads, and the workers that answer.

use super::export::Export;
use super::handshake::{self, Agreed, Handshake, Next, OPTION_HEADER_BYTES, Offer};
use super::queue::{Job, Queue};
use super::reply;
use super::request::{Bounds, Command, REQUEST_BYTES, Request};
use super::serve::{self, Answer, Payload};
use super::socket::Socket;
use crate::clock::{Clock, SystemClock};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use smol::future::block_on;
use std::io::{self, BufReader, Read, Write};
use std::thread;
use std::time::Duration;

/// How long the handshake may take.
const HANDSHAKE_NS_MAX: u64 = 30_000_000_000;
/// How long the socket may be silent in the handshake.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// Bytes that are read ahead: some hundred requests.
const READ_AHEAD_BYTES: usize = 16 << 10;

/// Serves a connection to its end.
pub(super) fn run<D: Device + Sync>(socket: &Socket, export: &Export<D>) -> Result<()> {
    let mut input = BufReader::with_capacity(READ_AHEAD_BYTES, socket);
    match negotiate(&mut input, socket, export)? {
        Some(agreed) => transmit(&mut input, socket, export, agreed),
        None => Ok(()),
    }
}

fn lost(error: io::Error) -> Error {
    Error::io(error, "the connection was lost")
}

/// Fills `buffer`; false if the connection ended before its first byte.
fn read_or_end(input: &mut impl Read, buffer: &mut [u8]) -> Result<bool> {
    let mut done = 0;
    while done < buffer.len() {
        match input.read(buffer.get_mut(done..).unwrap_or_default()) {
            Ok(0) if done == 0 => return Ok(false),
            Ok(0) => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => done += bytes,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(lost(e)),
        }
    }
    Ok(true)
}

/// The handshake, within its limits; none if the client left in it.
fn negotiate<D: Device>(
    input: &mut BufReader<&Socket>,
    mut socket: &Socket,
    export: &Export<D>,
) -> Result<Option<Agreed>> {
    socket.limit(Some(HANDSHAKE_WAIT)).map_err(lost)?;
    let offer = Offer {
        name: export.name(),
        bytes: export.attached().bytes(),
        sector_bytes: export.attached().sector_bytes(),
        is_read_only: export.attached().is_read_only(),
    };
    let agreed = agree(input, &mut socket, offer, &SystemClock::new())?;
    if agreed.is_some() {
        socket.limit(None).map_err(lost)?;
    }
    Ok(agreed)
}

/// The handshake over any stream.
pub(super) fn agree(
    input: &mut impl Read,
    output: &mut impl Write,
    offer: Offer<'_>,
    clock: &impl Clock,
) -> Result<Option<Agreed>> {
    output.write_all(&handshake::greeting()).map_err(lost)?;
    let mut flags = [0; 4];
    if !read_or_end(input, &mut flags)? {
        return Ok(None);
    }
    let mut handshake = Handshake::begin(offer, flags)?;
    loop {
        let mut header = [0; OPTION_HEADER_BYTES];
        if !read_or_end(input, &mut header)? {
            return Ok(None);
        }
        let (option, bytes) = handshake::option_header(header)?;
        let mut data = vec![0; bytes];
        input.read_exact(&mut data).map_err(lost)?;
        let (answer, next) = handshake.answer(option, &data);
        output.write_all(&answer).map_err(lost)?;
        match next {
            Next::Option if clock.monotonic_ns() > HANDSHAKE_NS_MAX => {
                return Err(Error::with(ErrorKind::Invalid, "a handshake without end"));
            }
            Next::Option => {}
            Next::Transmission(agreed) => return Ok(Some(agreed)),
            Next::End => return Ok(None),
        }
    }
}

fn transmit<D: Device + Sync>(
    input: &mut BufReader<&Socket>,
    socket: &Socket,
    export: &Export<D>,
    agreed: Agreed,
) -> Result<()> {
    let queue = Queue::default();
    let output = Mutex::new(());
    let work = || {
        while let Some(mut job) = queue.take() {
            if answer(&mut job, socket, &output, export, agreed) {
                queue.done(&job.request);
            } else {
                queue.park(job);
            }
        }
    };
    thread::scope(|scope| {
        let mut workers = 0;
        let mut read = || {
            while let Some(request) = next_request(input)? {
                queue.reserve(&request);
                let mut payload = Payload::zeroed(request.payload_bytes()?);
                input.read_exact(payload.as_mut_slice()).map_err(lost)?;
                let patience = None;
                if !queue.push(Job {
                    request,
                    payload,
                    patience,
                }) {
                    continue;
                }
                let builder = thread::Builder::new().name("nbd".into());
                match builder.spawn_scoped(scope, work) {
                    Ok(_) => workers += 1,
                    Err(e) if workers == 0 => return Err(Error::io(e, "no thread for a client")),
                    Err(error) => tracing::debug!(%error, "a client has fewer threads"),
                }
            }
            Ok(())
        };
        let ended = read();
        queue.close();
        if ended.is_err() {
            // Nobody waits for the answers, and none may follow what could not be understood.
            socket.shut_down();
        }
        ended
    })
}

/// The next request; none at the end of the connection, announced or not.
pub(super) fn next_request(input: &mut impl Read) -> Result<Option<Request>> {
    let mut header = [0; REQUEST_BYTES];
    if !read_or_end(input, &mut header)? {
        return Ok(None);
    }
    let request = Request::decode(header)?;
    if request.command == Command::Disconnect {
        return Ok(None);
    }
    request.payload_bytes()?;
    Ok(Some(request))
}

/// Carries a request out and answers it. False if it found no space and is to come again.
fn answer<D: Device>(
    job: &mut Job,
    socket: &Socket,
    output: &Mutex<()>,
    export: &Export<D>,
    agreed: Agreed,
) -> bool {
    let attached = export.attached();
    let bounds = Bounds {
        bytes: attached.bytes(),
        sector_bytes: attached.sector_bytes(),
        is_read_only: attached.is_read_only(),
        agreed,
    };
    let (request, payload) = (&job.request, &job.payload);
    let mut patience = job.patience.take();
    let device = export.device();
    let served = serve::serve(request, &bounds, payload, attached, device, &mut patience);
    let Some(answer) = block_on(served) else {
        job.patience = patience;
        return false;
    };
    let head = reply::head(request, agreed, &answer);
    let body = match &answer {
        Ok(Answer::Data(data)) => data.as_slice(),
        Ok(Answer::Done | Answer::Status(_)) | Err(_) => &[],
    };
    let _alone = output.lock();
    if let Err(error) = socket.write_both(&head, body) {
        tracing::debug!(%error, "a client does not take its answers");
        // The reader sees it too, and ends.
        socket.shut_down();
    }
    true
}
