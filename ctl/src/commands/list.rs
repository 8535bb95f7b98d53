//! `list`, `tree` and `diff`: what is in the pools.

use super::device::devices_of;
use super::{ask, unexpected};
use crate::cli::{Column, Diff, List, Tree};
use crate::client;
use crate::exit_code::{OK, one_line};
use crate::lineage::Lineage;
use crate::output::{self, Align, Format, Table};
use crate::protocol::{Reply, Request, Row};
use crate::quiesce;
use crate::state::{BadEntry, Registry};
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, Target, VolumePath};
use blockfork::pool::{DiffKind, EntryKind};
use blockfork::units::Timestamp;
use serde::Serialize;
use std::collections::BTreeSet;

const COLUMNS: [Column; 8] = [
    Column::Name,
    Column::Type,
    Column::Size,
    Column::Used,
    Column::Unique,
    Column::Shared,
    Column::Device,
    Column::Created,
];

/// A row with its pool, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    pool: Name,
    #[serde(flatten)]
    row: Row,
}

pub(super) fn list(options: &List) -> Result<u8> {
    let registry = Registry::from_env()?;
    let mut rows = Vec::new();
    let mut pools = BTreeSet::new();
    let mut code = OK;
    if options.targets.is_empty() {
        for found in registry.all()? {
            // A pool or an entry that cannot be read does not hide the others.
            let name = match found {
                Ok(entry) => entry.name,
                Err(BadEntry { error, .. }) => {
                    output::say(&one_line(&error));
                    code = error.kind().exit_code();
                    continue;
                }
            };
            match rows_of(&name) {
                Ok(found) => {
                    rows.extend(found);
                    pools.insert(name);
                }
                Err(e) => {
                    output::say(&one_line(&e));
                    code = e.kind().exit_code();
                }
            }
        }
    }
    for target in &options.targets {
        let found = rows_of(&target.pool)?;
        pools.insert(target.pool.clone());
        let before = rows.len();
        rows.extend(
            found
                .into_iter()
                .filter(|listed| is_meant(target, &listed.row.entry.path)),
        );
        if rows.len() == before && target.path.is_some() {
            return Err(Error::with(
                ErrorKind::NotFound,
                format!(
                    "{target}: not found; `ublkctl list {}` shows what is there",
                    target.pool
                ),
            ));
        }
    }
    if options.format.json {
        output::json(&rows)?;
        return Ok(code);
    }
    let columns = if options.columns.is_empty() {
        &COLUMNS[..]
    } else {
        &options.columns
    };
    table(&rows, columns, options.format).print(options.format)?;
    if !options.format.no_header {
        for pool in &pools {
            say_backlog(pool, options.format)?;
        }
    }
    Ok(code)
}

/// Tells people why a pool has less room than its list lets them think. Without a daemon nothing is on its way.
fn say_backlog(pool: &Name, format: Format) -> Result<()> {
    if !client::is_served(pool)? {
        return Ok(());
    }
    let Reply::Status(status) = ask(pool, &Request::Status, "looking")? else {
        return Err(unexpected());
    };
    if let Some(line) = backlog_line(pool, status.pool.backlog_bytes, format) {
        output::say(&line);
    }
    Ok(())
}

fn backlog_line(pool: &Name, bytes: u64, format: Format) -> Option<String> {
    let line = || {
        format!(
            "{pool}: the space of what was removed is being returned, at most {} more",
            format.size(bytes)
        )
    };
    (bytes > 0).then(line)
}

/// A volume stands for its snapshots too.
fn is_meant(target: &Target, path: &VolumePath) -> bool {
    match &target.path {
        None => true,
        Some(wanted) => {
            wanted == path || (wanted.snapshot.is_none() && wanted.volume == path.volume)
        }
    }
}

fn rows_of(pool: &Name) -> Result<Vec<Listed>> {
    let Reply::List(rows) = ask(pool, &Request::List, "counting")? else {
        return Err(unexpected());
    };
    let listed = |row: Row| Listed {
        name: format!("{pool}/{}", row.entry.path),
        pool: pool.clone(),
        row,
    };
    Ok(rows.into_iter().map(listed).collect())
}

fn table(rows: &[Listed], columns: &[Column], format: Format) -> Table {
    let now = SystemClock::new().now();
    let mut table = Table::new(columns.iter().map(|&column| header(column)));
    for listed in rows {
        table.row(
            columns
                .iter()
                .map(|&column| cell(listed, column, format, now))
                .collect(),
        );
    }
    table
}

fn header(column: Column) -> (&'static str, Align) {
    match column {
        Column::Name => ("name", Align::Left),
        Column::Type => ("type", Align::Left),
        Column::Size => ("size", Align::Right),
        Column::Used => ("used", Align::Right),
        Column::Unique => ("unique", Align::Right),
        Column::Shared => ("shared", Align::Right),
        Column::Device => ("device", Align::Left),
        Column::Created => ("created", Align::Right),
        Column::Origin => ("origin", Align::Left),
        Column::Sector => ("sector", Align::Right),
        Column::Holds => ("holds", Align::Left),
        Column::Quota => ("quota", Align::Right),
        Column::Reserve => ("reserve", Align::Right),
    }
}

fn cell(listed: &Listed, column: Column, format: Format, now: Timestamp) -> String {
    let Listed { name, pool, row } = listed;
    let entry = &row.entry;
    match column {
        Column::Name => name.clone(),
        Column::Type => match entry.kind {
            EntryKind::Volume => "volume".to_owned(),
            EntryKind::Snapshot => "snapshot".to_owned(),
        },
        Column::Size => format.size(entry.size_bytes),
        Column::Used => format.size(entry.used_bytes),
        Column::Unique => format.size(entry.unique_bytes),
        Column::Shared => format.size(entry.shared_bytes),
        Column::Device => match &row.device {
            // People should see that nothing answers there; scripts want the path.
            Some(device) if !row.served && !format.no_header => format!("{device} (not served)"),
            Some(device) => device.clone(),
            None => String::new(),
        },
        Column::Created => format.moment(entry.created, now),
        Column::Origin => entry
            .origin
            .as_ref()
            .map_or_else(String::new, |origin| format!("{pool}/{origin}")),
        Column::Sector => entry.sector_bytes.to_string(),
        Column::Holds => {
            let tags: Vec<&str> = entry.holds.iter().map(Name::as_str).collect();
            tags.join(",")
        }
        Column::Quota => limit(entry.limits.quota_bytes, format),
        Column::Reserve => limit(entry.limits.reserve_bytes, format),
    }
}

fn limit(bytes: Option<u64>, format: Format) -> String {
    bytes.map_or_else(String::new, |bytes| format.size(bytes))
}

pub(super) fn tree(options: &Tree) -> Result<()> {
    let Target { pool, path } = &options.target;
    let Reply::Outline(entries) = ask(pool, &Request::Outline, "looking")? else {
        return Err(unexpected());
    };
    let lineage = Lineage::new(pool, &entries);
    let roots = lineage.roots(path.as_ref().map(|path| &path.volume));
    if let Some(path) = path
        && roots.is_empty()
    {
        return Err(Error::with(
            ErrorKind::NotFound,
            format!("{pool}/{path}: no such volume"),
        ));
    }
    if options.json {
        return output::text(&lineage.json(&roots)?);
    }
    output::text(&lineage.draw(&roots))
}

pub(super) fn diff(options: &Diff) -> Result<()> {
    let Diff {
        from, to, format, ..
    } = options;
    if from.pool != to.pool {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "{}/{} and {}/{} are in two pools",
                from.pool, from.path, to.pool, to.path
            ),
        ));
    }
    if to.path.snapshot.is_none() && !options.no_sync {
        let volumes = BTreeSet::from([to.path.volume.clone()]);
        quiesce::Targets::new(&to.pool, volumes, &devices_of(&to.pool)?)?.flush()?;
    }
    let request = Request::Diff {
        from: from.path.clone(),
        to: to.path.clone(),
    };
    let Reply::Diff(extents) = ask(&from.pool, &request, "comparing")? else {
        return Err(unexpected());
    };
    if format.json {
        return output::json(&extents);
    }
    let mut table = Table::new([
        ("offset", Align::Right),
        ("length", Align::Right),
        ("type", Align::Left),
    ]);
    for extent in extents {
        let kind = match extent.kind {
            DiffKind::Data => "data",
            DiffKind::Zero => "zero",
        };
        // An offset is an address: rounded for people it would be of no use to them either.
        table.row(vec![
            extent.offset.to_string(),
            extent.length.to_string(),
            kind.to_owned(),
        ]);
    }
    table.print(*format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_is_told_with_its_bound() {
        let pool = "p0".parse().unwrap();
        let format = Format::default();
        let line = backlog_line(&pool, 3 << 30, format).unwrap();
        assert!(
            line.starts_with("p0: ") && line.ends_with("at most 3G more"),
            "{line}"
        );
        assert_eq!(backlog_line(&pool, 0, format), None);
    }
}
