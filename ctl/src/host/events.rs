//! Telling those who watch.

use super::{Host, Role};
use crate::events::{Event, Told, Watcher};
use crate::marks::{Marks, Use};
use crate::protocol::Reply;
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::pool::CheckReport;
use std::sync::atomic::Ordering;

impl Host {
    /// Tells all who watch.
    pub(crate) fn tell(&self, event: &Event) {
        self.events.tell(SystemClock::new().now(), event);
    }

    /// Tells them that something is wrong.
    pub(crate) fn tell_error(&self, kind: ErrorKind, message: String) {
        let kind = kind.word().to_owned();
        self.tell(&Event::Error { kind, message });
    }

    /// Tells them what a check found.
    pub(super) fn tell_damage(&self, report: &CheckReport) {
        if let Some(first) = report.damage.first() {
            let count = report.damage.len();
            let message = format!("a check found damage in {count} places; {first}");
            self.tell_error(ErrorKind::Corrupt, message);
        }
    }

    /// The space marks.
    pub(crate) fn marks(&self) -> Marks {
        self.marks.lock().clone()
    }

    /// Something was removed, whose space comes back from now on.
    pub(super) fn note_removed(&self) {
        self.has_removed.store(true, Ordering::Release);
    }

    /// Whether something was removed since the last call.
    pub(crate) fn take_removed(&self) -> bool {
        self.has_removed.swap(false, Ordering::AcqRel)
    }

    /// Refuses where nothing would ever be told.
    pub(super) fn watchable(&self) -> Result<Reply> {
        match self.role {
            Role::Daemon => Ok(Reply::Done),
            Role::Command => {
                let fact = "only a daemon tells what happens";
                Err(Error::with(ErrorKind::Unsupported, fact))
            }
        }
    }

    /// Whether somebody watches.
    pub(crate) fn is_watched(&self) -> bool {
        self.events.is_watched()
    }

    /// Watches: how the pool stands, and then what happens.
    pub(crate) fn watch(&self) -> Result<(Told, Watcher<'_>)> {
        let watcher = self.events.watch()?;
        let status = self.pool.status();
        let used = Use::of(&status);
        let devices = self.devices();
        let event = Event::Watching {
            used_percent: used.percent(),
            free_bytes: status.free_bytes,
            mark: self.marks.lock().reached(used),
            devices: devices.count(),
            exports: devices.exports().count(),
        };
        let at = SystemClock::new().now();
        Ok((Told { at, event }, watcher))
    }
}
