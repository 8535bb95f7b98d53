//! Which snapshots of a volume a retention policy keeps: a pure rule over their order and the moments they are dated.
//!
//! Time is cut into buckets: hours, days, ISO weeks (from Monday), months and years of the UTC calendar. In each bucket
//! the snapshot that was taken last stands for the bucket. A rule keeps the snapshots that stand for its most recent
//! buckets, as many as the policy says; buckets without a snapshot do not count. `last` keeps the snapshots that were
//! taken last. A snapshot is kept if any rule keeps it.
//!
//! Invariant: a wrong clock never makes a snapshot go. "Taken last" is the order of creation, not of dates, and no rule
//! counts a snapshot that is dated in the future, because such a snapshot would stand for the most recent bucket for
//! years. The caller keeps those.

use blockfork::units::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// How many snapshots each rule keeps; 0 switches it off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    /// The snapshots that were taken last.
    pub(crate) last: u32,
    /// The newest of an hour.
    pub(crate) hourly: u32,
    /// The newest of a day.
    pub(crate) daily: u32,
    /// The newest of a week.
    pub(crate) weekly: u32,
    /// The newest of a month.
    pub(crate) monthly: u32,
    /// The newest of a year.
    pub(crate) yearly: u32,
}

/// A rule of a [`Policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rule {
    /// `--keep-last`
    Last,
    /// `--keep-hourly`
    Hourly,
    /// `--keep-daily`
    Daily,
    /// `--keep-weekly`
    Weekly,
    /// `--keep-monthly`
    Monthly,
    /// `--keep-yearly`
    Yearly,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        })
    }
}

impl Policy {
    /// The rules with their numbers, in the order in which they are told.
    fn rules(self) -> [(Rule, u32); 6] {
        [
            (Rule::Last, self.last),
            (Rule::Hourly, self.hourly),
            (Rule::Daily, self.daily),
            (Rule::Weekly, self.weekly),
            (Rule::Monthly, self.monthly),
            (Rule::Yearly, self.yearly),
        ]
    }

    /// Whether it keeps anything at all.
    pub(crate) fn keeps_something(self) -> bool {
        self.rules().iter().any(|(_, count)| *count > 0)
    }
}

/// Whether a snapshot carries a date that has not come yet: the clock was wrong when it was taken, or is wrong now.
pub(crate) fn is_in_future(created: Timestamp, now: Timestamp) -> bool {
    created > now
}

/// For each snapshot of a volume, given by its date and in the order of creation, the rules that keep it. No rule keeps
/// or counts a snapshot that is dated in the future.
pub(crate) fn kept_by(policy: Policy, created: &[Timestamp], now: Timestamp) -> Vec<Vec<Rule>> {
    let mut kept = vec![Vec::new(); created.len()];
    for (rule, count) in policy.rules() {
        // A later snapshot takes the place of an earlier one of the same bucket.
        let mut newest_of: BTreeMap<Bucket, usize> = BTreeMap::new();
        for (index, at) in created.iter().enumerate() {
            if !is_in_future(*at, now) {
                newest_of.insert(bucket(rule, *at, index), index);
            }
        }
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for index in newest_of.values().rev().take(count) {
            if let Some(rules) = kept.get_mut(*index) {
                rules.push(rule);
            }
        }
    }
    kept
}

/// The moment in the UTC calendar.
pub(crate) fn utc(at: Timestamp) -> DateTime {
    // Nanoseconds in 64 bits end in the year 2554, which the calendar has.
    let seconds = i64::try_from(at.0 / 1_000_000_000).unwrap_or(i64::MAX);
    let timestamp = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX);
    TimeZone::UTC.to_datetime(timestamp)
}

/// What tells the buckets of one rule apart; a greater one is more recent.
type Bucket = (i64, i64);

/// The bucket of a snapshot. For `last` each snapshot is a bucket of its own.
fn bucket(rule: Rule, at: Timestamp, index: usize) -> Bucket {
    let moment = utc(at);
    let (year, month) = (i64::from(moment.year()), i64::from(moment.month()));
    let day = i64::from(moment.day_of_year());
    match rule {
        Rule::Last => (i64::try_from(index).unwrap_or(i64::MAX), 0),
        Rule::Hourly => (year, day * 24 + i64::from(moment.hour())),
        Rule::Daily => (year, day),
        Rule::Weekly => {
            let week = moment.date().iso_week_date();
            (i64::from(week.year()), i64::from(week.week()))
        }
        Rule::Monthly => (year, month),
        Rule::Yearly => (year, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fastrand::Rng;

    const SECOND: u64 = 1_000_000_000;
    const HOUR: u64 = 3600 * SECOND;
    const DAY: u64 = 24 * HOUR;

    fn at(text: &str) -> Timestamp {
        let moment: jiff::Timestamp = text.parse().unwrap();
        Timestamp(u64::try_from(moment.as_nanosecond()).unwrap())
    }

    /// A moment after every date that the tests use, except the ones that are meant to be in the future.
    const NOW: Timestamp = Timestamp(u64::MAX);

    /// What keeps each of these snapshots, given in the order of creation: `2026-01-31T10:00:00Z` and so on.
    fn told(policy: Policy, created: &[&str]) -> Vec<String> {
        told_at(NOW, policy, created)
    }

    fn told_at(now: Timestamp, policy: Policy, created: &[&str]) -> Vec<String> {
        let moments: Vec<Timestamp> = created.iter().map(|text| at(text)).collect();
        let words = |rules: Vec<Rule>| {
            let words: Vec<String> = rules.iter().map(ToString::to_string).collect();
            words.join(",")
        };
        kept_by(policy, &moments, now)
            .into_iter()
            .map(words)
            .collect()
    }

    #[test]
    fn a_bucket_is_stood_for_by_its_newest_snapshot() {
        let policy = Policy {
            daily: 2,
            ..Policy::default()
        };
        let created = [
            "2026-03-01T23:59:59Z",
            "2026-03-02T00:00:00Z",
            "2026-03-02T23:59:59Z",
            "2026-03-03T00:00:00Z",
            "2026-03-03T12:00:00Z",
        ];
        assert_eq!(told(policy, &created), ["", "", "daily", "", "daily"]);
    }

    #[test]
    fn empty_buckets_do_not_count() {
        let policy = Policy {
            hourly: 3,
            yearly: 3,
            ..Policy::default()
        };
        let created = [
            "1999-12-31T23:59:59Z",
            "2012-06-01T10:59:00Z",
            "2026-03-03T11:00:00Z",
            "2026-03-03T11:59:00Z",
        ];
        let expected = ["hourly,yearly", "hourly,yearly", "", "hourly,yearly"];
        assert_eq!(told(policy, &created), expected);
    }

    #[test]
    fn weeks_begin_on_monday_and_know_no_year() {
        let policy = Policy {
            weekly: 9,
            ..Policy::default()
        };
        // The Monday of week 1 of 2026, New Year's Day, its Sunday, the Monday after.
        let created = [
            "2025-12-28T12:00:00Z",
            "2025-12-29T00:00:00Z",
            "2026-01-01T12:00:00Z",
            "2026-01-04T23:59:59Z",
            "2026-01-05T00:00:00Z",
        ];
        assert_eq!(
            told(policy, &created),
            ["weekly", "", "", "weekly", "weekly"]
        );
        // Both in a week 1, of two years.
        let created = ["2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z"];
        assert_eq!(told(policy, &created), ["weekly", "weekly"]);
    }

    #[test]
    fn months_and_years_are_those_of_the_calendar() {
        let policy = Policy {
            monthly: 3,
            yearly: 2,
            ..Policy::default()
        };
        let created = [
            "2024-02-29T23:00:00Z",
            "2024-12-31T23:59:59Z",
            "2025-02-28T23:00:00Z",
            "2025-03-01T00:00:00Z",
            "2025-03-31T23:59:59Z",
        ];
        let expected = ["", "monthly,yearly", "monthly", "", "monthly,yearly"];
        assert_eq!(told(policy, &created), expected);
    }

    #[test]
    fn what_any_rule_keeps_is_kept_and_rules_do_not_share_their_numbers() {
        let policy = Policy {
            last: 2,
            daily: 1,
            monthly: 1,
            ..Policy::default()
        };
        let created = [
            "2026-03-01T10:00:00Z",
            "2026-03-02T10:00:00Z",
            "2026-03-02T11:00:00Z",
        ];
        assert_eq!(told(policy, &created), ["", "last", "last,daily,monthly"]);
    }

    #[test]
    fn the_order_of_creation_says_which_snapshot_is_the_last() {
        let policy = Policy {
            last: 1,
            daily: 1,
            ..Policy::default()
        };
        let (early, late) = ("2026-03-01T10:00:00Z", "2026-03-01T11:00:00Z");
        // The clock was set back between the two.
        assert_eq!(told(policy, &[late, early]), ["", "last,daily"]);
        assert_eq!(told(policy, &[late, late]), ["", "last,daily"]);
        assert!(kept_by(policy, &[], NOW).is_empty());
        assert!(Policy::default().rules().iter().all(|(_, n)| *n == 0));
        assert!(policy.keeps_something() && !Policy::default().keeps_something());
        assert_eq!(told(Policy::default(), &[early, late]), ["", ""]);
    }

    #[test]
    fn a_snapshot_that_is_dated_in_the_future_counts_for_no_rule() {
        let policy = Policy {
            last: 2,
            hourly: 1,
            daily: 2,
            yearly: 1,
            ..Policy::default()
        };
        let created = [
            "2026-03-01T10:00:00Z",
            "2043-01-01T00:00:00Z",
            "2043-01-02T00:00:00Z",
            "2026-03-02T10:00:00Z",
            "2026-03-03T10:00:00Z",
        ];
        let now = at("2026-03-03T10:00:00Z");
        let expected = ["", "", "", "last,daily", "last,hourly,daily,yearly"];
        assert_eq!(told_at(now, policy, &created), expected);
        // A clock that stands before all of them keeps everything away from the rules.
        assert_eq!(told_at(Timestamp(0), policy, &created), [""; 5]);
        // When their date has come, they are snapshots as any other.
        let later = at("2043-01-02T00:00:00Z");
        let expected = ["", "daily", "hourly,daily,yearly", "last", "last"];
        assert_eq!(told_at(later, policy, &created), expected);
    }

    #[test]
    fn every_moment_that_a_snapshot_can_have_is_in_the_calendar() {
        assert_eq!(utc(Timestamp(0)).to_string(), "1970-01-01T00:00:00");
        assert_eq!(utc(Timestamp(u64::MAX)).year(), 2554);
        let policy = Policy {
            weekly: 2,
            ..Policy::default()
        };
        let kept = kept_by(policy, &[Timestamp(0), Timestamp(u64::MAX)], NOW);
        assert_eq!(kept, [[Rule::Weekly], [Rule::Weekly]]);
    }

    /// The bucket by counting days from 1970, without a calendar's help.
    fn naive_bucket(rule: Rule, at: u64) -> u64 {
        let is_leap = |year: u64| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        let (mut year, mut left) = (1970, at / DAY);
        while left >= 365 + u64::from(is_leap(year)) {
            left -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let days = [
            31,
            28 + u64::from(is_leap(year)),
            31,
            30,
            31,
            30,
            31,
            31,
            30,
            31,
            30,
            31,
        ];
        let mut month = 0;
        while left >= days[month] {
            left -= days[month];
            month += 1;
        }
        match rule {
            Rule::Last => panic!("it has no calendar"),
            Rule::Hourly => at / HOUR,
            Rule::Daily => at / DAY,
            // 1970 began on a Thursday.
            Rule::Weekly => (at / DAY + 3) / 7,
            Rule::Monthly => year * 12 + month as u64,
            Rule::Yearly => year,
        }
    }

    /// Which snapshots are kept, by the words of the manual, one question after the other.
    fn naive(policy: Policy, created: &[u64], now: u64) -> Vec<Vec<Rule>> {
        let counts = |index: &usize| created[*index] <= now;
        let bucket = |rule, index: usize| {
            if rule == Rule::Last {
                return index as u64;
            }
            naive_bucket(rule, created[index])
        };
        let stands = |rule, index: usize| {
            let mut later = (index + 1..created.len()).filter(counts);
            counts(&index) && later.all(|other| bucket(rule, other) != bucket(rule, index))
        };
        let keeps = |rule, count: u32, index: usize| {
            let newer = (0..created.len())
                .filter(|other| stands(rule, *other) && bucket(rule, *other) > bucket(rule, index));
            stands(rule, index) && newer.count() < count as usize
        };
        let rules = policy.rules();
        let kept_by = |index| {
            let keeping = rules
                .iter()
                .filter(|(rule, count)| keeps(*rule, *count, index));
            keeping.map(|(rule, _)| *rule).collect()
        };
        (0..created.len()).map(kept_by).collect()
    }

    #[test]
    fn the_rule_is_what_the_manual_says() {
        for seed in 0..500 {
            let mut rng = Rng::with_seed(seed);
            let spread = [3 * HOUR, 5 * DAY, 60 * DAY, 900 * DAY, 20_000 * DAY][rng.usize(..5)];
            let first = rng.u64(..60_000) * DAY + rng.u64(..DAY);
            let mut created: Vec<u64> = (0..rng.usize(..60))
                .map(|_| first + rng.u64(..spread))
                .collect();
            // Sometimes the clock ran as it should; sometimes it jumped.
            if rng.bool() {
                created.sort_unstable();
            }
            let now = first + rng.u64(..spread + spread / 2);
            let mut count = || [0, 1, 2, 5, 100][rng.usize(..5)];
            let policy = Policy {
                last: count(),
                hourly: count(),
                daily: count(),
                weekly: count(),
                monthly: count(),
                yearly: count(),
            };
            let moments: Vec<Timestamp> = created.iter().copied().map(Timestamp).collect();
            let found = kept_by(policy, &moments, Timestamp(now));
            let expected = naive(policy, &created, now);
            assert_eq!(found, expected, "seed {seed}: {policy:?} {now} {created:?}");
        }
    }
}
