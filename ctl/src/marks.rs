//! Space marks: the percentages of used space at which a pool is said to run short.
//!
//! A mark that was passed counts until the use has fallen some way below it, so that a pool at a mark does not say so
//! again and again.

use crate::size;
use blockfork::error::{Error, ErrorKind};
use blockfork::pool::PoolStatus;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// So many percent below a mark it no longer counts as passed.
const SLACK_PERCENT: u8 = 2;
/// The most marks of a pool.
const MARKS_MAX: usize = 8;

/// Percentages, ascending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub(crate) struct Marks(Vec<u8>);

impl Default for Marks {
    fn default() -> Self {
        Self(vec![80, 90, 95])
    }
}

impl From<Marks> for Vec<u8> {
    fn from(marks: Marks) -> Self {
        marks.0
    }
}

impl TryFrom<Vec<u8>> for Marks {
    type Error = Error;

    fn try_from(percents: Vec<u8>) -> Result<Self, Error> {
        let is_ascending = percents.is_sorted_by(|one, other| one < other);
        let in_range = percents.iter().all(|percent| (1..=100).contains(percent));
        if is_ascending && in_range && percents.len() <= MARKS_MAX {
            return Ok(Self(percents));
        }
        let fact = format!("marks are up to {MARKS_MAX} ascending percentages, as in 80,90,95");
        Err(Error::with(ErrorKind::Invalid, fact))
    }
}

impl FromStr for Marks {
    type Err = Error;

    /// `80,90,95`, or `none`.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let percents: Result<Vec<u8>, _> = text.split(',').map(str::parse).collect();
        // What is no number is refused as what is out of range.
        Self::try_from(percents.unwrap_or_else(|_| vec![0]))
    }
}

/// How much of the space for data is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    used: u64,
    room: u64,
}

impl Use {
    /// That of a pool. What the next checkpoint gives back counts as free, what is kept back for metadata not at all.
    pub(crate) fn of(status: &PoolStatus) -> Self {
        let room = (status.used_bytes)
            .saturating_add(status.pending_bytes)
            .saturating_add(status.free_bytes);
        Self {
            used: status.used_bytes,
            room,
        }
    }

    /// In percent, rounded down.
    pub(crate) fn percent(self) -> u64 {
        let percent = u128::from(self.used) * 100 / u128::from(self.room.max(1));
        u64::try_from(percent).unwrap_or(100)
    }

    fn reaches(self, percent: u8) -> bool {
        u128::from(self.used) * 100 >= u128::from(self.room) * u128::from(percent)
    }
}

impl Marks {
    /// The highest mark that is reached.
    pub(crate) fn reached(&self, used: Use) -> Option<u8> {
        self.0
            .iter()
            .rev()
            .find(|mark| used.reaches(**mark))
            .copied()
    }

    /// What `pool status` and the log say above a mark.
    pub(crate) fn warning(&self, status: &PoolStatus) -> Option<String> {
        let used = Use::of(status);
        self.reached(used).map(|mark| {
            format!(
                "{}% of the space is used, above the mark of {mark}%; {} are free",
                used.percent(),
                size::human(status.free_bytes)
            )
        })
    }
}

/// A mark that was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Which.
    pub(crate) mark: u8,
    /// Whether upwards.
    pub(crate) is_up: bool,
}

/// How many of a pool's marks count as passed.
#[derive(Debug, Default)]
pub(crate) struct Level {
    marks: Marks,
    passed: usize,
}

impl Level {
    /// The marks that are passed with this use, in order. Other marks than the last time are all looked at anew.
    pub(crate) fn observe(&mut self, marks: &Marks, used: Use) -> Vec<Passed> {
        if self.marks != *marks {
            (self.marks, self.passed) = (marks.clone(), 0);
        }
        let mut passed = Vec::new();
        while let Some(&mark) = self.marks.0.get(self.passed)
            && used.reaches(mark)
        {
            self.passed += 1;
            passed.push(Passed { mark, is_up: true });
        }
        while let Some(&mark) = (self.passed.checked_sub(1)).and_then(|last| self.marks.0.get(last))
            && !used.reaches(mark.saturating_sub(SLACK_PERCENT))
        {
            self.passed -= 1;
            passed.push(Passed { mark, is_up: false });
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(text: &str) -> Marks {
        text.parse().unwrap()
    }

    fn percent(used: u64) -> Use {
        Use { used, room: 100 }
    }

    #[test]
    fn marks_are_ascending_percentages() {
        assert_eq!(marks("80,90,95"), Marks::default());
        assert_eq!(marks("none"), Marks(Vec::new()));
        for text in [
            "",
            "0",
            "101",
            "80,80",
            "90,80",
            "80,",
            "a",
            "300",
            "80 ,90",
            "1,2,3,4,5,6,7,8,9",
        ] {
            assert_eq!(
                text.parse::<Marks>().unwrap_err().kind(),
                ErrorKind::Invalid,
                "{text}"
            );
        }
        assert!(serde_json::from_str::<Marks>("[90,80]").is_err());
    }

    #[test]
    fn the_highest_mark_that_is_reached_counts() {
        let marks = Marks::default();
        for (used, mark) in [
            (0, None),
            (79, None),
            (80, Some(80)),
            (94, Some(90)),
            (100, Some(95)),
        ] {
            assert_eq!(marks.reached(percent(used)), mark, "{used}");
        }
        assert_eq!(
            marks.reached(Use { used: 0, room: 0 }),
            Some(95),
            "nothing has room"
        );
    }

    #[test]
    fn a_pool_at_a_mark_says_so_once() {
        let marks = Marks::default();
        let mut level = Level::default();
        let mut observe = |used| -> Vec<(u8, bool)> {
            let passed = level.observe(&marks, percent(used)).into_iter();
            passed.map(|passed| (passed.mark, passed.is_up)).collect()
        };
        assert_eq!(observe(79), []);
        assert_eq!(observe(80), [(80, true)]);
        for used in [79, 80, 78, 81] {
            assert_eq!(observe(used), [], "{used}");
        }
        assert_eq!(observe(77), [(80, false)]);
        assert_eq!(observe(79), []);
        assert_eq!(observe(96), [(80, true), (90, true), (95, true)]);
        assert_eq!(observe(92), [(95, false)]);
        assert_eq!(observe(10), [(90, false), (80, false)]);
    }

    #[test]
    fn other_marks_are_looked_at_anew() {
        let mut level = Level::default();
        assert_eq!(level.observe(&marks("50"), percent(60)).len(), 1);
        assert_eq!(level.observe(&marks("50"), percent(60)), []);
        let passed = level.observe(&marks("40,70"), percent(60));
        assert_eq!(
            passed,
            [Passed {
                mark: 40,
                is_up: true
            }]
        );
        assert_eq!(level.observe(&marks("none"), percent(100)), []);
    }
}
