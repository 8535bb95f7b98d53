//! `prune`: removes the snapshots that no rule keeps, or shows what it would do.

use super::{ask, unexpected};
use crate::cli::{PathTarget, Prune};
use crate::output::{self, Align, Format, Table};
use crate::protocol::{Judged, Pruned, Reply, Request};
use crate::retention::{Policy, utc};
use blockfork::error::Result;
use blockfork::name::{Name, VolumePath};
use blockfork::units::Timestamp;
use serde::Serialize;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    /// Oldest first.
    snapshots: Vec<ShownSnapshot<'a>>,
    /// How many go.
    removed: u64,
    /// Bytes that come back; only a dry run tells.
    freed_bytes: Option<u64>,
    /// Whether nothing was done.
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct ShownSnapshot<'a> {
    name: String,
    kept: bool,
    #[serde(flatten)]
    judged: &'a Judged,
}

pub(super) fn prune(options: &Prune) -> Result<()> {
    let PathTarget { pool, path } = &options.volume;
    let dry_run = options.dry_run;
    let request = Request::Prune {
        volume: path.volume.clone(),
        policy: Policy {
            last: options.keep_last.unwrap_or(0),
            hourly: options.keep_hourly.unwrap_or(0),
            daily: options.keep_daily.unwrap_or(0),
            weekly: options.keep_weekly.unwrap_or(0),
            monthly: options.keep_monthly.unwrap_or(0),
            yearly: options.keep_yearly.unwrap_or(0),
        },
        dry_run,
    };
    let Reply::Pruned(pruned) = ask(pool, &request, "returning space")? else {
        return Err(unexpected());
    };
    let goes = pruned.snapshots.iter().filter(|judged| !judged.is_kept());
    let removed = goes.count() as u64;
    if let Some(line) = warning(pool, path, &pruned.snapshots) {
        output::say(&line);
    }
    if options.format.json {
        let shown = |judged| ShownSnapshot {
            name: name(pool, judged),
            kept: judged.is_kept(),
            judged,
        };
        return output::json(&Shown {
            snapshots: pruned.snapshots.iter().map(shown).collect(),
            removed,
            freed_bytes: pruned.freed_bytes,
            dry_run,
        });
    }
    if dry_run {
        return show(pool, &pruned, removed, options.format);
    }
    output::text(&format!(
        "{pool}/{path}: removed {removed} of {} snapshots\n",
        pruned.snapshots.len()
    ))
}

fn show(pool: &Name, pruned: &Pruned, removed: u64, format: Format) -> Result<()> {
    let left = Align::Left;
    let mut table = Table::new([
        ("snapshot", left),
        ("created", left),
        ("action", left),
        ("why", left),
    ]);
    for judged in &pruned.snapshots {
        table.row(vec![
            name(pool, judged),
            moment(judged.created, format),
            if judged.is_kept() { "keep" } else { "remove" }.to_owned(),
            why(judged),
        ]);
    }
    table.print(format)?;
    // Scripts find this in --json; between rows it would be no row.
    if format.no_header {
        return Ok(());
    }
    output::text(&format!(
        "would remove {removed} of {} snapshots and free {}\n",
        pruned.snapshots.len(),
        format.size(pruned.freed_bytes.unwrap_or_default())
    ))
}

fn name(pool: &Name, judged: &Judged) -> String {
    format!("{pool}/{}", judged.path)
}

/// The moment to the second: the rules look at the calendar, not at ages.
fn moment(at: Timestamp, format: Format) -> String {
    if format.parsable {
        (at.0 / 1_000_000_000).to_string()
    } else {
        utc(at).strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
    }
}

/// The most snapshots that the warning names; `-n` shows all of them.
const NAMED_MAX: usize = 16;

/// The warning that names the snapshots that no rule looked at, if there are any.
fn warning(pool: &Name, volume: &VolumePath, snapshots: &[Judged]) -> Option<String> {
    let in_future: Vec<&Judged> = snapshots.iter().filter(|judged| judged.in_future).collect();
    let dated = |judged: &&Judged| {
        let date = moment(judged.created, Format::default());
        format!("{} ({date})", name(pool, judged))
    };
    let mut named: Vec<String> = in_future.iter().take(NAMED_MAX).map(dated).collect();
    if in_future.len() > NAMED_MAX {
        named.push(format!("and {} more", in_future.len() - NAMED_MAX));
    }
    let line = || {
        format!(
            "{pool}/{volume}: snapshots are dated in the future, so no rule counts them and they are kept: {}; \
             the clock was wrong when they were taken, or is wrong now; `ublkctl rm` removes them",
            named.join(", ")
        )
    };
    (!in_future.is_empty()).then(line)
}

fn why(judged: &Judged) -> String {
    let rules = judged.rules.iter().map(ToString::to_string);
    let holds = judged.holds.iter().map(|tag| format!("held by {tag}"));
    let attached = judged.attached.then(|| "attached".to_owned());
    let in_future = judged.in_future.then(|| "dated in the future".to_owned());
    rules
        .chain(holds)
        .chain(attached)
        .chain(in_future)
        .collect::<Vec<_>>()
        .join(", ")
}
