//! Which snapshots of a volume a retention policy keeps: a pure rule over when they were made.
//!
//! Time is cut into buckets: hours, days, ISO weeks (from Monday), months and years of the UTC calendar. Of each bucket
//! the newest snapshot stands for it. A rule keeps those that stand for the most recent buckets that have any, as many
//! as it says; buckets without a snapshot do not count. `last` keeps the newest snapshots themselves. What any rule
//! keeps is kept.

use blockfork::units::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How many snapshots each rule keeps; 0 switches it off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    /// The newest.
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

/// For each snapshot, given by when it was made, the rules that keep it; one that has none may go. Of snapshots that
/// were made in the same moment, those named later are the newer ones.
pub(crate) fn kept_by(policy: Policy, created: &[Timestamp]) -> Vec<Vec<Rule>> {
    let mut newest_first: Vec<(Timestamp, usize)> = created.iter().copied().zip(0..).collect();
    newest_first.sort_unstable_by(|a, b| b.cmp(a));
    let mut kept = vec![Vec::new(); created.len()];
    for (rule, count) in policy.rules() {
        let mut left = count;
        let mut before = None;
        for (at, index) in &newest_first {
            if left == 0 {
                break;
            }
            let bucket = bucket(rule, *at, *index);
            // They come in the order of time, so a bucket's snapshots stand together, its newest first.
            if before.replace(bucket) == Some(bucket) {
                continue;
            }
            left -= 1;
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

/// What names the bucket of a snapshot, among those of one rule.
fn bucket(rule: Rule, at: Timestamp, index: usize) -> (i64, i64) {
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
    use std::collections::BTreeMap;

    const SECOND: u64 = 1_000_000_000;
    const HOUR: u64 = 3600 * SECOND;
    const DAY: u64 = 24 * HOUR;

    fn at(text: &str) -> Timestamp {
        let moment: jiff::Timestamp = text.parse().unwrap();
        Timestamp(u64::try_from(moment.as_nanosecond()).unwrap())
    }

    /// The snapshots, oldest first, and what keeps each: `2026-01-31T10:00:00Z` and so on.
    fn told(policy: Policy, created: &[&str]) -> Vec<String> {
        let moments: Vec<Timestamp> = created.iter().map(|text| at(text)).collect();
        let words = |rules: Vec<Rule>| {
            let words: Vec<String> = rules.iter().map(ToString::to_string).collect();
            words.join(",")
        };
        kept_by(policy, &moments).into_iter().map(words).collect()
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
    fn the_order_in_which_snapshots_are_named_decides_only_within_a_moment() {
        let policy = Policy {
            last: 1,
            ..Policy::default()
        };
        let (early, late) = ("2026-03-01T10:00:00Z", "2026-03-01T11:00:00Z");
        assert_eq!(told(policy, &[late, early]), ["last", ""]);
        assert_eq!(told(policy, &[late, late]), ["", "last"]);
        assert!(kept_by(policy, &[]).is_empty());
        assert!(Policy::default().rules().iter().all(|(_, n)| *n == 0));
        assert!(policy.keeps_something() && !Policy::default().keeps_something());
        assert_eq!(told(Policy::default(), &[early, late]), ["", ""]);
    }

    #[test]
    fn every_moment_that_a_snapshot_can_have_is_in_the_calendar() {
        assert_eq!(utc(Timestamp(0)).to_string(), "1970-01-01T00:00:00");
        assert_eq!(utc(Timestamp(u64::MAX)).year(), 2554);
        let policy = Policy {
            weekly: 2,
            ..Policy::default()
        };
        let kept = kept_by(policy, &[Timestamp(0), Timestamp(u64::MAX)]);
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
            Rule::Last => at,
            Rule::Hourly => at / HOUR,
            Rule::Daily => at / DAY,
            // 1970 began on a Thursday.
            Rule::Weekly => (at / DAY + 3) / 7,
            Rule::Monthly => year * 12 + month as u64,
            Rule::Yearly => year,
        }
    }

    /// Which moments are kept, by the words of the manual: all buckets, then the most recent of them.
    fn naive(policy: Policy, created: &[u64]) -> Vec<Vec<Rule>> {
        let mut kept = vec![Vec::new(); created.len()];
        for (rule, count) in policy.rules() {
            let mut buckets: BTreeMap<u64, usize> = BTreeMap::new();
            for (index, at) in created.iter().enumerate() {
                let newest = buckets.entry(naive_bucket(rule, *at)).or_insert(index);
                if created[*newest] < *at {
                    *newest = index;
                }
            }
            for index in buckets.values().rev().take(count as usize) {
                kept[*index].push(rule);
            }
        }
        kept
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
            created.sort_unstable();
            created.dedup();
            rng.shuffle(&mut created);
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
            let (found, expected) = (kept_by(policy, &moments), naive(policy, &created));
            assert_eq!(found, expected, "seed {seed}: {policy:?} {created:?}");
        }
    }
}
