//! What clients connect to: a volume or snapshot under a name, and its connections.

use super::session;
use super::socket::Socket;
use crate::device::Device;
use crate::limits::NBD_CONNECTIONS_MAX;
use crate::pool::Attached;
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A volume or snapshot that is served over NBD.
#[derive(Debug)]
pub struct Export<D> {
    name: String,
    attached: Arc<Attached>,
    device: D,
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    open: BTreeMap<u64, Arc<Socket>>,
    next: u64,
    is_closed: bool,
}

impl<D: Device + Sync> Export<D> {
    /// An export of this name; clients may leave the name out, too.
    pub fn new(name: String, attached: Arc<Attached>, device: D) -> Self {
        Self {
            name,
            attached,
            device,
            connections: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// Serves a connection to its end, in the calling thread and some more. Turned away if there are too many already,
    /// or if the export is closed.
    pub fn serve(&self, socket: Socket) {
        let socket = Arc::new(socket);
        let number = {
            let mut connections = self.connections.lock();
            if connections.is_closed || connections.open.len() >= NBD_CONNECTIONS_MAX {
                tracing::warn!(export = self.name, "a client was turned away");
                return;
            }
            let number = connections.next;
            connections.next += 1;
            connections.open.insert(number, Arc::clone(&socket));
            number
        };
        if let Err(error) = session::run(&socket, self) {
            tracing::debug!(export = self.name, "a client's connection ended: {error}");
        }
        // Not left to the last owner: whoever closes the export may hold the socket a moment longer.
        socket.shut_down();
        self.connections.lock().open.remove(&number);
        self.ended.notify_all();
    }

    /// Shuts all connections down, and waits until nothing of them is under way. Requests that were not answered may
    /// have been carried out.
    pub fn close(&self) {
        let mut connections = self.connections.lock();
        connections.is_closed = true;
        connections
            .open
            .values()
            .for_each(|socket| socket.shut_down());
        while !connections.open.is_empty() {
            self.ended.wait(&mut connections);
        }
    }
}

impl<D> Export<D> {
    /// The name under which it is found.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it serves.
    pub fn attached(&self) -> &Arc<Attached> {
        &self.attached
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.connections.lock().open.len()
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }
}
