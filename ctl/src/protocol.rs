//! The control protocol: one JSON value a line, a greeting first, then requests and their answers in turn.
//!
//! `{"hello":{..}}` comes from the daemon; then the client sends a [`Request`] a line and reads [`Message`]s up to the
//! first that is not progress. A request line is at most [`REQUEST_BYTES_MAX`] long; whoever sends more is cut off.

use crate::events::Told;
use crate::exit_code::one_line;
use crate::marks::Marks;
use crate::retention::{Policy, Rule};
use blockfork::clock::Clock;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::pool::{
    Backlog, CheckReport, DiffExtent, Entry, LimitChange, Limits, OnFull, OutlineEntry, PoolStats,
    PoolStatus, Removal, VolumeOptions,
};
use blockfork::units::{Timestamp, VolumeId};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The version of the protocol; a client refuses a daemon of another one.
pub(crate) const VERSION: u32 = 2;
/// The longest request, with its newline.
pub(crate) const REQUEST_BYTES_MAX: usize = 1 << 20;

/// What a client asks of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// The state of the pool.
    Status,
    /// The counters.
    Stats,
    /// All volumes and snapshots.
    List,
    /// The devices that are attached.
    Devices,
    /// Where `to` differs from `from`.
    Diff { from: VolumePath, to: VolumePath },
    /// Holds every reference against every count.
    Check,
    /// Makes a volume.
    Create {
        volume: Name,
        options: VolumeOptions,
        #[serde(default)]
        limits: Limits,
    },
    /// Changes what a volume may take.
    SetLimits {
        volume: Name,
        changes: Vec<LimitChange>,
    },
    /// Removes volumes and snapshots.
    Remove {
        targets: Vec<VolumePath>,
        recursive: bool,
        dry_run: bool,
    },
    /// Renames a volume or a snapshot.
    Rename { from: VolumePath, to: VolumePath },
    /// Gives the pool's daemon other space marks.
    SetMarks { marks: Marks },
    /// Tells what happens, as [`Message::Event`], for as long as the connection lasts.
    Watch,
    /// Changes a volume's size.
    Resize {
        volume: Name,
        bytes: u64,
        allow_shrink: bool,
    },
    /// Takes snapshots at one point in time.
    Snapshot { targets: Vec<VolumePath> },
    /// Makes a volume from a snapshot.
    Clone { snapshot: VolumePath, volume: Name },
    /// Turns a volume back to a snapshot.
    Rollback { snapshot: VolumePath },
    /// All volumes and snapshots, as far as the catalog alone knows them.
    Outline,
    /// Puts a hold on snapshots.
    Hold {
        tag: Name,
        snapshots: Vec<VolumePath>,
    },
    /// Takes a hold from snapshots.
    Release {
        tag: Name,
        snapshots: Vec<VolumePath>,
    },
    /// Removes the snapshots of a volume that a policy does not keep.
    Prune {
        volume: Name,
        policy: Policy,
        dry_run: bool,
    },
    /// Extends the pool: a file to `bytes`, a device to what it holds now.
    Grow { bytes: u64 },
    /// Serves a volume or a snapshot as a block device.
    Attach {
        path: VolumePath,
        read_only: bool,
        queues: u16,
        depth: u16,
        /// Memory for metadata from here on, in bytes.
        #[serde(default)]
        metadata_cache: Option<u64>,
        #[serde(default)]
        on_full: OnFull,
    },
    /// Serves a volume or a snapshot over NBD, for as long as the connection lasts that asked for it. When the client
    /// has shut down its side and everything is durable, a second answer follows: `Done`, or an error.
    ServeNbd {
        path: VolumePath,
        read_only: bool,
        address: NbdAddress,
        #[serde(default)]
        on_full: OnFull,
    },
    /// Takes devices away.
    Detach { devices: Selection, force: bool },
    /// Serves again the devices that nothing serves.
    Recover,
    /// Closes the pool and ends the daemon; refused while a device is attached.
    Stop,
    /// What of these, which were removed, still holds space.
    Backlog { ids: Vec<VolumeId> },
}

/// Where NBD clients are to connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NbdAddress {
    /// A socket among the daemon's runtime files.
    Runtime,
    /// This socket; the path is absolute.
    Unix(PathBuf),
    /// This port.
    Tcp(SocketAddr),
}

/// Which devices a detach means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Selection {
    /// All of the pool.
    All,
    /// Those of these volumes and snapshots.
    Paths(Vec<VolumePath>),
}

impl Request {
    /// Whether it changes nothing in the pool, so that without a daemon the pool may be opened read-only.
    pub(crate) fn is_read_only(&self) -> bool {
        match self {
            Self::Status
            | Self::Stats
            | Self::List
            | Self::Devices
            | Self::Diff { .. }
            | Self::Check
            | Self::Outline
            | Self::Backlog { .. }
            | Self::SetMarks { .. }
            | Self::Watch => true,
            Self::Remove { dry_run, .. } | Self::Prune { dry_run, .. } => *dry_run,
            Self::Create { .. }
            | Self::SetLimits { .. }
            | Self::Rename { .. }
            | Self::Resize { .. }
            | Self::Snapshot { .. }
            | Self::Clone { .. }
            | Self::Rollback { .. }
            | Self::Hold { .. }
            | Self::Release { .. }
            | Self::Grow { .. }
            | Self::Attach { .. }
            | Self::ServeNbd { .. }
            | Self::Detach { .. }
            | Self::Recover
            | Self::Stop => false,
        }
    }
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// It is done, and there is no more to say.
    Done,
    /// To `Status`.
    Status(Status),
    /// To `Stats`.
    Stats(PoolStats),
    /// To `List`.
    List(Vec<Row>),
    /// To `Devices`, `Recover`, `Attach` and `Detach`: those meant.
    Devices(Vec<DeviceRow>),
    /// To `ServeNbd`: clients can connect.
    ServingNbd { uri: String, read_only: bool },
    /// To `Diff`.
    Diff(Vec<DiffExtent>),
    /// To `Check`.
    Check(CheckReport),
    /// To `Remove`.
    Removal(Removal),
    /// To `Resize`.
    Resized(Resized),
    /// To `Outline`.
    Outline(Vec<OutlineEntry>),
    /// To `Prune`.
    Pruned(Pruned),
    /// To `Backlog`.
    Backlog(Backlog),
}

/// What a policy keeps of a volume's snapshots, and what removing the others frees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pruned {
    /// All snapshots, oldest first.
    pub(crate) snapshots: Vec<Judged>,
    /// Bytes that come back; only a dry run walks the maps to tell.
    pub(crate) freed_bytes: Option<u64>,
}

/// A snapshot, and what keeps it; what nothing keeps goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Judged {
    /// The snapshot.
    pub(crate) path: VolumePath,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// The rules that keep it.
    pub(crate) rules: Vec<Rule>,
    /// The tags of its holds, which keep it.
    pub(crate) holds: Vec<Name>,
    /// Whether it is attached, which keeps it.
    pub(crate) attached: bool,
    /// Whether it is dated in the future, which keeps it and makes every rule pass it over.
    #[serde(default)]
    pub(crate) in_future: bool,
}

impl Judged {
    /// Whether anything keeps it.
    pub(crate) fn is_kept(&self) -> bool {
        self.attached || self.in_future || !self.rules.is_empty() || !self.holds.is_empty()
    }
}

/// A pool's state and that of what serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The engine's view.
    #[serde(flatten)]
    pub(crate) pool: PoolStatus,
    /// Whether its daemon can only read it, because it is damaged or its medium takes no writes.
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Whether the pool's file is not where its daemon opened it; a warning says what to do.
    #[serde(default)]
    pub(crate) misplaced: bool,
    /// The daemon, if one runs.
    pub(crate) daemon_pid: Option<u32>,
    /// How many devices are attached.
    pub(crate) devices: u64,
    /// How many volumes and snapshots are served over NBD.
    pub(crate) exports: u64,
    /// Whether I/O goes past the page cache of the file system below.
    pub(crate) direct_io: bool,
}

/// A volume or snapshot and the device that serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The engine's view.
    #[serde(flatten)]
    pub(crate) entry: Entry,
    /// `/dev/ublkbN`, or the URI of what is served over NBD.
    pub(crate) device: Option<String>,
    /// Whether a daemon serves that now.
    pub(crate) served: bool,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceRow {
    /// What it serves.
    pub(crate) path: VolumePath,
    /// Its number in the pool.
    pub(crate) id: VolumeId,
    /// `/dev/ublkbN`.
    pub(crate) device: String,
    /// Whether it refuses writes.
    pub(crate) read_only: bool,
    /// Whether a daemon serves it now.
    pub(crate) served: bool,
    /// Why not, or why it fails.
    pub(crate) fault: Option<String>,
}

/// What a resize did to a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Resized {
    /// Nothing is attached.
    Unattached,
    /// The device has the new size.
    Online,
    /// The device keeps its old size for now: why, and until when.
    Later(String),
}

/// A line from the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// The first line: the pool with its id, because another state directory may have one of this name.
    Hello {
        version: u32,
        pool: Name,
        id: String,
        pid: u32,
    },
    /// How far a long request got.
    Progress { done: u64, total: u64 },
    /// To a client that watches: something happened.
    Event(Told),
    /// The answer.
    Reply(Reply),
    /// The request failed.
    Error { kind: String, message: String },
    /// The daemon is closing the pool; ask again, without it.
    Stopping,
}

impl From<&Error> for Message {
    fn from(error: &Error) -> Self {
        Self::Error {
            kind: error.kind().word().to_owned(),
            message: one_line(error),
        }
    }
}

impl Message {
    /// The error that a daemon sent.
    pub(crate) fn into_error(kind: &str, message: String) -> Error {
        Error::with(ErrorKind::from_word(kind).unwrap_or(ErrorKind::Io), message)
    }
}

/// Writes one line.
pub(crate) fn write_line<T: Serialize>(out: &mut impl Write, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// How a line from a stranger is limited.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineLimits {
    /// Its length with the newline.
    pub(crate) bytes_max: usize,
    /// The time from the call to the newline.
    pub(crate) wait_ns_max: u64,
}

/// Reads one line without its newline; none at the end. Slow, long and unfinished lines are errors.
pub(crate) fn read_line(
    input: &mut impl BufRead,
    limits: LineLimits,
    clock: &dyn Clock,
) -> io::Result<Option<Vec<u8>>> {
    let begun = clock.monotonic_ns();
    let mut line = Vec::new();
    loop {
        if clock.monotonic_ns().saturating_sub(begun) > limits.wait_ns_max {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "no whole line in time",
            ));
        }
        let available = match input.fill_buf() {
            Ok([]) if line.is_empty() => return Ok(None),
            Ok([]) => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the line has no end",
                ));
            }
            Ok(available) => available,
            // The socket's own timeout; it exists to come back here and look at the clock.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            Err(e) => return Err(e),
        };
        let end = available.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(available.len(), |end| end + 1);
        if line.len() + taken > limits.bytes_max {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the line is too long",
            ));
        }
        line.extend(available.iter().take(taken));
        input.consume(taken);
        if end.is_some() {
            line.pop();
            return Ok(Some(line));
        }
    }
}

/// Parses a request line.
pub(crate) fn parse_request(line: &[u8]) -> Result<Request> {
    serde_json::from_slice(line)
        .map_err(|e| Error::with(ErrorKind::Invalid, format!("request: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockfork::clock::{ManualClock, SystemClock};
    use std::io::{BufReader, Read};

    const LIMITS: LineLimits = LineLimits {
        bytes_max: 16,
        wait_ns_max: 1_000_000_000,
    };

    fn lines(mut input: impl BufRead) -> Vec<io::Result<Option<Vec<u8>>>> {
        let clock = SystemClock::new();
        (0..3)
            .map(|_| read_line(&mut input, LIMITS, &clock))
            .collect()
    }

    #[test]
    fn lines_come_one_by_one() {
        let got = lines(BufReader::with_capacity(3, &b"{\"a\":1}\n\n"[..]));
        assert_eq!(got[0].as_ref().unwrap().as_deref(), Some(&b"{\"a\":1}"[..]));
        assert_eq!(got[1].as_ref().unwrap().as_deref(), Some(&b""[..]));
        assert!(got[2].as_ref().unwrap().is_none());
    }

    #[test]
    fn a_line_beyond_the_limit_is_cut_off() {
        assert!(lines(&b"0123456789abcde\n"[..])[0].is_ok());
        assert!(lines(&b"0123456789abcdef\n"[..])[0].is_err());
        assert!(lines(BufReader::with_capacity(4, io::repeat(b'x')))[0].is_err());
    }

    #[test]
    fn a_line_without_end_is_an_error() {
        assert!(lines(&b"{}"[..])[0].is_err());
    }

    /// Gives a byte, then nothing but timeouts, while its clock runs.
    struct Slow(std::sync::Arc<ManualClock>, bool);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.advance_ns(300_000_000);
            if std::mem::replace(&mut self.1, true) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            buffer[0] = b'x';
            Ok(1)
        }
    }

    #[test]
    fn a_slow_writer_is_given_up() {
        let clock = std::sync::Arc::new(ManualClock::default());
        let mut input = BufReader::new(Slow(clock.clone(), false));
        let error = read_line(&mut input, LIMITS, clock.as_ref()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn requests_survive_their_line() {
        let requests = [
            Request::Status,
            Request::Rollback {
                snapshot: "v@s".parse().unwrap(),
            },
            Request::Detach {
                devices: Selection::Paths(vec!["v".parse().unwrap()]),
                force: false,
            },
            Request::Hold {
                tag: "backup".parse().unwrap(),
                snapshots: vec!["v@s".parse().unwrap()],
            },
            Request::Prune {
                volume: "v".parse().unwrap(),
                policy: Policy {
                    last: 3,
                    ..Policy::default()
                },
                dry_run: true,
            },
        ];
        for request in requests {
            let mut line = Vec::new();
            write_line(&mut line, &request).unwrap();
            assert_eq!(
                line.iter().position(|&byte| byte == b'\n'),
                Some(line.len() - 1)
            );
            assert_eq!(parse_request(&line).unwrap(), request);
        }
    }

    #[test]
    fn hostile_requests_are_errors() {
        for line in [
            "",
            "null",
            "{}",
            "\"destroy\"",
            "{\"rollback\":{\"snapshot\":{\"volume\":\"../x\",\"snapshot\":null}}}",
            "{\"check\":{},\"extra\":1}",
            "{\"grow\":{\"bytes\":-1}}",
            "{\"grow\":{\"bytes\":1,\"more\":2}}",
            &"[".repeat(100_000),
        ] {
            assert_eq!(
                parse_request(line.as_bytes()).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{line:.20}"
            );
        }
    }

    #[test]
    fn an_error_keeps_its_kind_across_the_socket() {
        let sent = Message::from(&Error::with(ErrorKind::OutOfSpace, "p0: full"));
        let Message::Error { kind, message } = sent else {
            panic!()
        };
        let got = Message::into_error(&kind, message);
        assert_eq!(
            (got.kind(), got.to_string().as_str()),
            (ErrorKind::OutOfSpace, "p0: full")
        );
    }
}
