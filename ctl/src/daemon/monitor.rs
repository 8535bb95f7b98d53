//! What the daemon notices by looking: marks of the use of space, the end of a reclaim, faults.

use crate::events::{Direction, Event};
use crate::host::Host;
use crate::marks::{Level, Use};
use blockfork::error::ErrorKind;
use blockfork::pool::PoolStatus;
use tracing::{error, info, warn};

/// What was seen the last time.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    level: Level,
    is_reclaiming: bool,
    is_poisoned: bool,
    warnings: Vec<String>,
    looks: u32,
    misplaced: Option<String>,
}

/// One look in so many is for the pool's file: once a second.
const LOOKS_PER_PLACE: u32 = 10;

impl Monitor {
    /// Looks at the pool, and tells what is not as it was.
    pub(super) fn observe(&mut self, host: &Host) {
        let has_removed = host.take_removed();
        let status = host.pool().status();
        self.space(host, &status);
        let was_reclaiming = self.is_reclaiming || has_removed;
        self.is_reclaiming = status.reclaiming > 0;
        if was_reclaiming && !self.is_reclaiming {
            host.tell(&Event::ReclaimDone {
                free_bytes: status.free_bytes,
            });
        }
        if status.poisoned && !self.is_poisoned {
            self.is_poisoned = true;
            host.tell_error(
                ErrorKind::Poisoned,
                "a flush failed; the pool takes no more writes".to_owned(),
            );
        }
        for warning in &status.warnings {
            if !self.warnings.contains(warning) {
                host.tell_error(ErrorKind::Corrupt, warning.clone());
            }
        }
        self.warnings = status.warnings;
        if self.looks.is_multiple_of(LOOKS_PER_PLACE) {
            self.place(host);
        }
        self.looks = self.looks.wrapping_add(1);
    }

    /// Looks whether the pool's file is where it was opened.
    fn place(&mut self, host: &Host) {
        let misplaced = host.misplaced();
        if misplaced == self.misplaced {
            return;
        }
        if let Some(fact) = &misplaced {
            error!("{fact}");
            host.tell_error(ErrorKind::NotFound, fact.clone());
        } else {
            info!("the pool's file is where it was opened again");
        }
        self.misplaced = misplaced;
    }

    fn space(&mut self, host: &Host, status: &PoolStatus) {
        let (marks, used) = (host.marks(), Use::of(status));
        let passed = self.level.observe(&marks, used);
        for passed in &passed {
            host.tell(&Event::SpaceMark {
                mark: passed.mark,
                passed: if passed.is_up {
                    Direction::Up
                } else {
                    Direction::Down
                },
                used_percent: used.percent(),
                free_bytes: status.free_bytes,
            });
        }
        // Several at once are worth one line.
        match passed.last() {
            Some(last) if last.is_up => {
                let said = marks.warning(status).unwrap_or_default();
                warn!(pool = %status.name, mark = last.mark, "{said}");
            }
            Some(last) => {
                let percent = used.percent();
                info!(pool = %status.name, mark = last.mark, percent, "the use of space is below the mark again");
            }
            None => {}
        }
    }
}
