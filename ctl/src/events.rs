//! What happens to a pool, told to whoever watches it.
//!
//! Invariant: telling never waits. Each watcher has a queue of bounded length; what it is too slow for is dropped, oldest
//! first, and counted.

use blockfork::error::{Error, ErrorKind, Result};
use blockfork::units::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// The most events that wait for one watcher.
const WAITING_MAX: usize = 256;
/// The most watchers of a pool.
const WATCHERS_MAX: usize = 32;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// The first one: how it stands.
    Watching {
        used_percent: u64,
        free_bytes: u64,
        mark: Option<u8>,
        devices: u64,
        exports: u64,
    },
    /// The use of space passed a mark.
    SpaceMark {
        mark: u8,
        passed: Direction,
        used_percent: u64,
        free_bytes: u64,
    },
    /// A block device was made. A name is POOL/VOLUME or POOL/VOLUME@SNAPSHOT.
    DeviceAdded { name: String, device: String },
    /// A block device was taken away.
    DeviceGone { name: String, device: String },
    /// A volume or snapshot is served over NBD.
    ExportAdded { name: String, uri: String },
    /// It is no longer.
    ExportGone { name: String, uri: String },
    /// The space of all that was removed has come back.
    ReclaimDone { free_bytes: u64 },
    /// Something is wrong with the pool.
    Error { kind: String, message: String },
    /// The watcher was too slow for so many events.
    Lost { events: u64 },
}

/// Which way a mark was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Direction {
    /// There is less space.
    Up,
    /// There is more again.
    Down,
}

/// An event with its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    /// When, in nanoseconds since 1970.
    pub(crate) at: Timestamp,
    /// What.
    #[serde(flatten)]
    pub(crate) event: Event,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Told>,
    lost: u64,
}

/// All who watch a pool.
#[derive(Debug, Default)]
pub(crate) struct Events(Mutex<Vec<Arc<Mutex<Waiting>>>>);

/// One who watches, until it is dropped.
#[derive(Debug)]
pub(crate) struct Watcher<'a> {
    events: &'a Events,
    waiting: Arc<Mutex<Waiting>>,
}

impl Events {
    /// Tells an event to all who watch.
    pub(crate) fn tell(&self, at: Timestamp, event: &Event) {
        for watcher in self.0.lock().iter() {
            let mut waiting = watcher.lock();
            if waiting.events.len() >= WAITING_MAX {
                waiting.events.pop_front();
                waiting.lost += 1;
            }
            waiting.events.push_back(Told {
                at,
                event: event.clone(),
            });
        }
    }

    /// Whether somebody watches.
    pub(crate) fn is_watched(&self) -> bool {
        !self.0.lock().is_empty()
    }

    /// Watches from now on.
    pub(crate) fn watch(&self) -> Result<Watcher<'_>> {
        let mut watchers = self.0.lock();
        if watchers.len() >= WATCHERS_MAX {
            let fact = format!("the pool is watched {WATCHERS_MAX} times already; end one");
            return Err(Error::with(ErrorKind::Busy, fact));
        }
        let waiting = Arc::<Mutex<Waiting>>::default();
        watchers.push(Arc::clone(&waiting));
        Ok(Watcher {
            events: self,
            waiting,
        })
    }
}

impl Watcher<'_> {
    /// What happened since the last call, with the number of those that were too many before it.
    pub(crate) fn take(&self, now: Timestamp) -> Vec<Told> {
        let Waiting { events, lost } = std::mem::take(&mut *self.waiting.lock());
        let lost = (lost > 0).then_some(Told {
            at: events.front().map_or(now, |told| told.at),
            event: Event::Lost { events: lost },
        });
        lost.into_iter().chain(events).collect()
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        let mut watchers = self.events.0.lock();
        watchers.retain(|other| !Arc::ptr_eq(other, &self.waiting));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(free_bytes: u64) -> Event {
        Event::ReclaimDone { free_bytes }
    }

    #[test]
    fn each_watcher_hears_what_happens_while_it_watches() {
        let events = Events::default();
        events.tell(Timestamp(1), &done(1));
        let one = events.watch().unwrap();
        events.tell(Timestamp(2), &done(2));
        let other = events.watch().unwrap();
        events.tell(Timestamp(3), &done(3));
        let heard = |watcher: &Watcher<'_>| -> Vec<u64> {
            let told = watcher.take(Timestamp(9)).into_iter();
            told.map(|told| told.at.0).collect()
        };
        assert_eq!((heard(&one), heard(&other)), (vec![2, 3], vec![3]));
        assert!(heard(&one).is_empty());
        drop(one);
        assert_eq!(events.0.lock().len(), 1);
    }

    #[test]
    fn a_watcher_that_takes_nothing_costs_bounded_memory_and_hears_how_much_it_missed() {
        let events = Events::default();
        let slow = events.watch().unwrap();
        for number in 0..1000 {
            events.tell(Timestamp(number), &done(number));
        }
        assert_eq!(slow.waiting.lock().events.len(), WAITING_MAX);
        let told = slow.take(Timestamp(2000));
        assert_eq!(told.len(), WAITING_MAX + 1);
        assert_eq!(told[0].event, Event::Lost { events: 744 });
        assert_eq!(told[1].event, done(744));
    }

    #[test]
    fn a_watcher_too_many_is_refused_until_one_goes() {
        let events = Events::default();
        let mut watchers: Vec<_> = (0..WATCHERS_MAX).map(|_| events.watch().unwrap()).collect();
        assert_eq!(events.watch().unwrap_err().kind(), ErrorKind::Busy);
        watchers.pop();
        assert!(events.watch().is_ok());
    }

    #[test]
    fn an_event_is_one_flat_object() {
        let told = Told {
            at: Timestamp(5),
            event: Event::SpaceMark {
                mark: 90,
                passed: Direction::Up,
                used_percent: 91,
                free_bytes: 7,
            },
        };
        let text = serde_json::to_string(&told).unwrap();
        assert_eq!(
            text,
            r#"{"at":5,"event":"space-mark","mark":90,"passed":"up","used_percent":91,"free_bytes":7}"#
        );
        assert_eq!(serde_json::from_str::<Told>(&text).unwrap(), told);
    }
}
