//! Volumes over NBD: the fixed newstyle handshake and the transmission of the protocol, on a unix or a TCP socket.
//!
//! What happens, in order:
//!
//! 1. An [`Export`] is a volume or snapshot under a name. Whoever listens hands each connection to [`Export::serve`],
//!    in a thread of the connection's own (`session`).
//! 2. The handshake (`handshake`) is pure: bytes in, bytes out. It has a time limit and small messages, so a stranger
//!    costs a thread for some seconds and 64 KiB at most.
//! 3. In the transmission the connection's thread reads requests (`request`) into a bounded queue (`queue`), and workers
//!    of the connection carry them out (`serve`) and answer (`reply`) in any order.
//! 4. [`Export::close`] shuts all connections down and returns when nothing is under way any more.
//!
//! Invariant: no lock and no ticket of the engine is held while a socket is read or written. A client that stalls
//! stalls its own connection.

mod export;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod handshake;
mod queue;
mod reply;
mod request;
mod serve;
mod session;
mod socket;
mod wire;

pub use export::Export;
pub use socket::Socket;
