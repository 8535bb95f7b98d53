//! Where NBD clients connect: a unix socket or a TCP port, the thread that accepts, and the URI that leads there.
//!
//! Invariant: a socket file is its owner's alone from the moment it exists (the daemon's umask sees to that), and only
//! a socket that nobody listens on is replaced.

use crate::protocol::NbdAddress;
use crate::state::{self, Runtime};
use blockfork::device::FileDevice;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::VolumePath;
use blockfork::nbd::{Export, Socket};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt::KeepAlive};
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tracing::{debug, warn};

/// How long to wait when a connection cannot be accepted: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A bound socket, and the thread that accepts connections to an export.
#[derive(Debug)]
pub(crate) struct Endpoint {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    listener: Bound,
    is_closed: AtomicBool,
}

/// What is listened on.
#[derive(Debug)]
pub(crate) enum Bound {
    /// A socket file, with its device and inode.
    Unix(UnixListener, PathBuf, (u64, u64)),
    /// A port.
    Tcp(TcpListener),
}

impl Bound {
    /// Binds what `address` says. From here on clients can connect; they are answered after [`Endpoint::start`].
    pub(crate) fn new(
        address: &NbdAddress,
        runtime: &Runtime,
        volume: &VolumePath,
    ) -> Result<Self> {
        match address {
            NbdAddress::Runtime => bind_unix(&runtime.nbd_socket(volume)),
            NbdAddress::Unix(path) => bind_unix(path),
            NbdAddress::Tcp(address) => {
                let bound = TcpListener::bind(address);
                let failed = |e| Error::io(e, format!("{address}: cannot be bound"));
                bound.map(Self::Tcp).map_err(failed)
            }
        }
    }

    /// The URI of an export there.
    pub(crate) fn uri(&self, export: &str) -> Result<String> {
        match self {
            Self::Unix(_, path, _) => Ok(format!(
                "nbd+unix:///{}?socket={}",
                escaped(export.as_bytes()),
                escaped(path.as_os_str().as_encoded_bytes())
            )),
            Self::Tcp(listener) => {
                let address = listener.local_addr();
                let address = address.map_err(|e| Error::io(e, "a socket without an address"))?;
                Ok(format!("nbd://{address}/{}", escaped(export.as_bytes())))
            }
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener, ..) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // A client whose machine went away must not count for ever.
                setsockopt(&stream, KeepAlive, &true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    fn descriptor(&self) -> i32 {
        match self {
            Self::Unix(listener, ..) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let Self::Unix(_, path, identity) = self else {
            return;
        };
        // Somebody else's by now, perhaps.
        if identity_of(path).is_ok_and(|now| now == *identity)
            && let Err(e) = state::remove_file(path)
        {
            warn!("{e}");
        }
    }
}

impl Endpoint {
    /// Accepts connections to the export, each in a thread of its own, until [`Endpoint::close`].
    pub(crate) fn start(bound: Bound, export: Arc<Export<FileDevice>>) -> Result<Self> {
        let shared = Arc::new(Shared {
            listener: bound,
            is_closed: AtomicBool::new(false),
        });
        let seen = shared.clone();
        let thread = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept_all(&seen, &export));
        Ok(Self {
            shared,
            thread: thread
                .map_err(|e| Error::io(e, "the thread that listens cannot be started"))?,
        })
    }

    /// Takes no more connections; the socket file is gone on return.
    pub(crate) fn close(self) {
        self.shared.is_closed.store(true, Ordering::Release);
        // Wakes the thread from its accept.
        if let Err(e) = shutdown(self.shared.listener.descriptor(), Shutdown::Both) {
            warn!("a listener cannot be shut down: {e}");
            return;
        }
        if self.thread.join().is_err() {
            warn!("the thread that listened panicked");
        }
    }
}

fn accept_all(shared: &Shared, export: &Arc<Export<FileDevice>>) {
    loop {
        let accepted = shared.listener.accept();
        if shared.is_closed.load(Ordering::Acquire) {
            return;
        }
        let socket = match accepted {
            Ok(socket) => socket,
            Err(e) => {
                warn!(export = export.name(), "a connection was lost: {e}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        debug!(export = export.name(), "a client connected");
        let served = export.clone();
        let started = thread::Builder::new()
            .name("nbd-client".into())
            .spawn(move || served.serve(socket));
        if let Err(e) = started {
            warn!(export = export.name(), "a client was turned away: {e}");
        }
    }
}

fn bind_unix(path: &Path) -> Result<Bound> {
    let shown = path.display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be bound"));
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::with(
                ErrorKind::AlreadyExists,
                format!("{shown}: is there already, and is no socket"),
            ));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => state::remove_file(path)?,
            _ => {
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!("{shown}: somebody listens there already"),
                ));
            }
        },
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let identity = identity_of(path).map_err(failed)?;
    Ok(Bound::Unix(listener, path.to_owned(), identity))
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Text as it may stand in a URI's path or query.
fn escaped(text: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 0xf)]);
    let mut out = String::new();
    for &byte in text {
        if byte.is_ascii_alphanumeric() || b"-._~/@:,".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.extend(['%', digit(byte >> 4), digit(byte)]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_where_and_what() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a b&c");
        let bound = bind_unix(&path).unwrap();
        let uri = bound.uri("p0/v@s").unwrap();
        assert!(uri.starts_with("nbd+unix:///p0/v@s?socket=/"), "{uri}");
        assert!(uri.ends_with("/a%20b%26c"), "{uri}");
        let bound = Bound::Tcp(TcpListener::bind("127.0.0.1:0").unwrap());
        assert!(bound.uri("p0/v").unwrap().starts_with("nbd://127.0.0.1:"));
    }

    #[test]
    fn a_socket_that_is_listened_on_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let bound = bind_unix(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(bind_unix(&path).unwrap_err().kind(), ErrorKind::Busy);
        drop(bound);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        drop(bind_unix(&path).unwrap());
        fs::write(&path, "mine").unwrap();
        let error = bind_unix(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
