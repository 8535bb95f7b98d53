//! The requests that run, and the end of the daemon: when it may begin no more of them, and when none is left.
//!
//! A request may run for hours. So nobody who waits for the end of requests keeps others from beginning, until the daemon
//! is really told to stop.

use parking_lot::{Condvar, Mutex};

/// Counts the requests that run.
#[derive(Debug, Default)]
pub(super) struct Requests {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    is_stopping: bool,
}

/// A request that runs, until it is dropped.
#[derive(Debug)]
pub(super) struct Running<'a>(&'a Requests);

impl Requests {
    /// Begins a request; none once the daemon stops.
    pub(super) fn begin(&self) -> Option<Running<'_>> {
        let mut state = self.state.lock();
        if state.is_stopping {
            return None;
        }
        state.running += 1;
        Some(Running(self))
    }

    /// Waits for a moment at which no request runs, and stops then if `is_idle`: no request begins any more. Whether the
    /// daemon stops because of this call.
    pub(super) fn stop_if(&self, is_idle: impl Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        while state.running > 0 && !state.is_stopping {
            self.ended.wait(&mut state);
        }
        if state.is_stopping || !is_idle() {
            return false;
        }
        state.is_stopping = true;
        true
    }

    /// Stops: no request begins any more. Waits for those that run.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.is_stopping = true;
        self.ended.notify_all();
        while state.running > 0 {
            self.ended.wait(&mut state);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.running -= 1;
        if state.running == 0 {
            self.0.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn whoever_waits_for_an_idle_moment_keeps_nobody_waiting() {
        let requests = Requests::default();
        let long = requests.begin().unwrap();
        thread::scope(|scope| {
            let (asks, asked) = mpsc::channel();
            let requests = &requests;
            let idle = scope.spawn(move || {
                asks.send(()).unwrap();
                requests.stop_if(|| true)
            });
            asked.recv().unwrap();
            for _ in 0..1000 {
                assert!(requests.begin().is_some(), "a request waits for a long one");
            }
            drop(long);
            assert!(idle.join().unwrap());
        });
        assert!(requests.begin().is_none());
        assert!(!requests.stop_if(|| true), "it stops already");
    }

    #[test]
    fn a_stop_waits_for_what_runs_and_for_nothing_else() {
        let requests = Requests::default();
        let long = requests.begin().unwrap();
        thread::scope(|scope| {
            let idle = scope.spawn(|| requests.stop_if(|| true));
            let stop = scope.spawn(|| requests.stop());
            assert!(!idle.join().unwrap(), "the stop did not end that wait");
            assert!(requests.begin().is_none());
            assert!(!stop.is_finished());
            drop(long);
        });
        requests.stop();
    }

    #[test]
    fn a_daemon_that_is_needed_does_not_stop() {
        let requests = Requests::default();
        assert!(!requests.stop_if(|| false));
        assert!(requests.begin().is_some());
    }
}
