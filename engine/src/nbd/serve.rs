//! Carrying out one request on the volume.

use super::request::{Bounds, Command, Request};
use super::wire::Errno;
use crate::device::{BlockBuf, Device};
use crate::error::{Error, ErrorKind};
use crate::limits::NBD_STATUS_RUNS_MAX;
use crate::pool::{Attached, Patience, Run};
use crate::units::BLOCK_LEN;
use std::sync::atomic::{AtomicU64, Ordering};

/// Requests that this process has failed for other reasons than a full pool.
static FAILED: AtomicU64 = AtomicU64::new(0);

/// Bytes of a request or for its answer, in memory that the device takes.
#[derive(Debug)]
pub(super) struct Payload {
    buffer: BlockBuf,
    /// How many bytes count.
    pub(super) bytes: usize,
}

impl Payload {
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self {
            buffer: BlockBuf::zeroed(bytes.div_ceil(BLOCK_LEN)),
            bytes,
        }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.buffer.get(..self.bytes).unwrap_or_default()
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.bytes).unwrap_or_default()
    }
}

/// What came of a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// It is done.
    Done,
    /// To a read.
    Data(Payload),
    /// To a question what is allocated: at least one run.
    Status(Vec<Run>),
}

/// Carries out a request; `payload` is that of a write. None: it found no space, and is to come again after
/// [`LOOK_NS`](crate::pool::LOOK_NS).
pub(super) async fn serve<D: Device>(
    request: &Request,
    bounds: &Bounds,
    payload: &Payload,
    attached: &Attached,
    device: &D,
    patience: &mut Option<Patience>,
) -> Option<Result<Answer, (Errno, String)>> {
    if let Err(errno) = request.check(bounds) {
        return Some(Err((errno, String::new())));
    }
    let answer = carry_out(request, payload, attached, device).await;
    let answer = match answer {
        Ok(answer) if request.waits_for_flush() && request.command != Command::Flush => {
            attached.flush(device).await.map(|()| answer)
        }
        other => other,
    };
    match answer {
        Err(error) if attached.waits(&error, patience) => None,
        answer => Some(answer.map_err(|error| refusal(request, &error))),
    }
}

async fn carry_out<D: Device>(
    request: &Request,
    payload: &Payload,
    attached: &Attached,
    device: &D,
) -> Result<Answer, Error> {
    let (offset, bytes) = (request.offset, u64::from(request.bytes));
    let is_empty = bytes == 0;
    match request.command {
        Command::Flush => attached.flush(device).await?,
        // The protocol leaves an empty range to the server.
        _ if is_empty => {}
        Command::Read => {
            let mut data = Payload::zeroed(usize::try_from(bytes).unwrap_or(usize::MAX));
            attached.read(device, offset, data.as_mut_slice()).await?;
            return Ok(Answer::Data(data));
        }
        Command::Write => {
            attached
                .try_write(device, offset, payload.as_slice())
                .await?;
        }
        Command::Trim => attached.discard(device, offset, bytes).await?,
        Command::WriteZeroes { keep_space, .. } => {
            let zeroed = attached.try_write_zeroes(device, offset, bytes, keep_space);
            zeroed.await?;
        }
        Command::BlockStatus { only_one } => {
            let most = if only_one { 1 } else { NBD_STATUS_RUNS_MAX };
            let runs = attached.allocation(device, offset, bytes, most).await?;
            return Ok(Answer::Status(runs));
        }
        Command::Disconnect | Command::Unknown => {
            return Err(Error::new(ErrorKind::Unsupported));
        }
    }
    Ok(Answer::Done)
}

/// The errno for the client, and the fact. A full pool is the client's business alone; the rest is worth a line, but a
/// broken pool fails every request, so the lines get rarer.
#[cold]
fn refusal(request: &Request, error: &Error) -> (Errno, String) {
    let mut fact = error.to_string();
    if let Some(cause) = std::error::Error::source(error) {
        fact = format!("{fact}: {cause}");
    }
    if error.kind() != ErrorKind::OutOfSpace {
        let count = FAILED.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(?request, count, "a request over NBD failed: {fact}");
        }
    }
    (errno(error.kind()), fact)
}

fn errno(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::OutOfSpace | ErrorKind::OverQuota => Errno::NoSpc,
        ErrorKind::ReadOnly => Errno::Perm,
        ErrorKind::Invalid => Errno::Inval,
        ErrorKind::Unsupported => Errno::NotSup,
        ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::Busy
        | ErrorKind::Corrupt
        | ErrorKind::Poisoned
        | ErrorKind::Permission
        | ErrorKind::Io => Errno::Io,
    }
}
