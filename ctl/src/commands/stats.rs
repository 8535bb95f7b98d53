//! `stats`: what the pools and the attached volumes have been doing.

use super::{ask, unexpected};
use crate::cli::Stats;
use crate::exit_code::{OK, one_line};
use crate::output::{self, Align, Format, Table};
use crate::protocol::{Reply, Request};
use crate::state::{BadEntry, Registry};
use blockfork::error::{Error, Result};
use blockfork::name::Name;
use blockfork::pool::{Latency, PoolStats, VolumeStats};
use serde::Serialize;
use std::thread;
use std::time::Duration;

/// A pool's counters as `--json` shows them.
#[derive(Debug, Serialize)]
struct Counted {
    pool: Name,
    #[serde(flatten)]
    stats: PoolStats,
}

pub(super) fn stats(options: &Stats) -> Result<u8> {
    let mut code = OK;
    let mut counted = if options.pools.is_empty() {
        let (counted, faults) = count_all()?;
        for error in faults {
            output::say(&one_line(&error));
            code = error.kind().exit_code();
        }
        counted
    } else {
        options.pools.iter().map(count).collect::<Result<_>>()?
    };
    if let Some(seconds) = options.interval {
        thread::sleep(Duration::from_secs(seconds));
        for before in &mut counted {
            *before = since(before, count(&before.pool)?);
        }
    }
    print(&counted, options).map(|()| code)
}

/// The counters of every pool, and why some have none: a pool or an entry that cannot be read does not hide the others.
fn count_all() -> Result<(Vec<Counted>, Vec<Error>)> {
    let (mut counted, mut faults) = (Vec::new(), Vec::new());
    for found in Registry::from_env()?.all()? {
        let one = match found {
            Ok(entry) => count(&entry.name),
            Err(BadEntry { error, .. }) => Err(error),
        };
        match one {
            Ok(one) => counted.push(one),
            Err(error) => faults.push(error),
        }
    }
    Ok((counted, faults))
}

fn print(counted: &[Counted], options: &Stats) -> Result<()> {
    if options.format.json {
        return output::json(&counted);
    }
    pool_table(counted, options.format).print(options.format)?;
    if counted
        .iter()
        .all(|counted| counted.stats.volumes.is_empty())
    {
        return Ok(());
    }
    if !options.format.no_header {
        output::text("\n")?;
    }
    volume_table(counted, options.format).print(options.format)
}

fn count(pool: &Name) -> Result<Counted> {
    let Reply::Stats(stats) = ask(pool, &Request::Stats, "counting")? else {
        return Err(unexpected());
    };
    Ok(Counted {
        pool: pool.clone(),
        stats,
    })
}

/// What was counted between two moments. Latencies are distributions and stay as they are.
fn since(before: &Counted, mut after: Counted) -> Counted {
    for volume in &mut after.stats.volumes {
        let earlier = before
            .stats
            .volumes
            .iter()
            .find(|earlier| earlier.path == volume.path);
        // Counters that went back are those of another attachment.
        let Some(earlier) = earlier.filter(|earlier| earlier.attached_ns <= volume.attached_ns)
        else {
            continue;
        };
        volume.attached_ns -= earlier.attached_ns;
        for (now, then) in [
            (&mut volume.reads, earlier.reads),
            (&mut volume.read_bytes, earlier.read_bytes),
            (&mut volume.writes, earlier.writes),
            (&mut volume.written_bytes, earlier.written_bytes),
            (&mut volume.flushes, earlier.flushes),
            (&mut volume.discards, earlier.discards),
            (&mut volume.redirected_blocks, earlier.redirected_blocks),
            (&mut volume.in_place_blocks, earlier.in_place_blocks),
        ] {
            *now = now.saturating_sub(then);
        }
    }
    after
}

fn pool_table(counted: &[Counted], format: Format) -> Table {
    let names = [
        "free",
        "pending",
        "journal",
        "commits",
        "checkpoints",
        "checkpoint",
        "reclaiming",
        "backlog",
        "reclaimed",
        "metadata",
    ];
    let columns = names.into_iter().map(|name| (name, Align::Right));
    let mut table = Table::new(std::iter::once(("pool", Align::Left)).chain(columns));
    for Counted { pool, stats } in counted {
        table.row(vec![
            pool.to_string(),
            format.size(stats.free_bytes),
            format.size(stats.pending_bytes),
            format!(
                "{}/{}",
                format.size(stats.journal_used_bytes),
                format.size(stats.journal_bytes)
            ),
            stats.commits.to_string(),
            stats.checkpoints.to_string(),
            format.duration(stats.checkpoint_ns),
            stats.reclaiming.to_string(),
            format.size(stats.backlog_bytes),
            format.size(stats.reclaimed_blocks * blockfork::units::BLOCK_BYTES),
            format.size(stats.metadata_bytes),
        ]);
    }
    table
}

fn volume_table(counted: &[Counted], format: Format) -> Table {
    let names = [
        "reads/s",
        "read/s",
        "writes/s",
        "written/s",
        "flushes",
        "discards",
        "read p50/p99/p99.9",
        "write p50/p99/p99.9",
        "redirected",
        "in place",
        "pause max",
    ];
    let columns = names.into_iter().map(|name| (name, Align::Right));
    let mut table = Table::new(std::iter::once(("volume", Align::Left)).chain(columns));
    for Counted { pool, stats } in counted {
        for volume in &stats.volumes {
            table.row(volume_row(pool, volume, format));
        }
    }
    table
}

fn volume_row(pool: &Name, volume: &VolumeStats, format: Format) -> Vec<String> {
    let rate = |count| per_second(count, volume.attached_ns);
    vec![
        format!("{pool}/{}", volume.path),
        rate(volume.reads).to_string(),
        format.size(rate(volume.read_bytes)),
        rate(volume.writes).to_string(),
        format.size(rate(volume.written_bytes)),
        volume.flushes.to_string(),
        volume.discards.to_string(),
        percentiles(&volume.read_latency, format),
        percentiles(&volume.write_latency, format),
        volume.redirected_blocks.to_string(),
        volume.in_place_blocks.to_string(),
        format.duration(volume.snapshot_pause.max_ns),
    ]
}

fn percentiles(latency: &Latency, format: Format) -> String {
    if latency.count == 0 {
        return String::new();
    }
    [latency.p50_ns, latency.p99_ns, latency.p999_ns]
        .map(|ns| format.duration(ns))
        .join("/")
}

fn per_second(count: u64, ns: u64) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / u128::from(ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_do_not_overflow() {
        assert_eq!(per_second(10, 2_000_000_000), 5);
        assert_eq!(per_second(u64::MAX, 0), u64::MAX);
    }
}
