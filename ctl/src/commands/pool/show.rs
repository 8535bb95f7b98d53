//! `pool list` and `pool status`.

use crate::client;
use crate::commands::unexpected;
use crate::exit_code::{FAILED, OK, one_line};
use crate::output::{self, Align, Format, Table};
use crate::progress::Bar;
use crate::protocol::{Reply, Request, Status};
use crate::state::{BadEntry, PoolEntry, Registry};
use blockfork::clock::{Clock, SystemClock};
use blockfork::error::Result;
use blockfork::name::Name;
use std::path::PathBuf;

pub(super) fn status_of(entry: &PoolEntry) -> Result<Status> {
    let bar = Bar::new("looking");
    let mut progress = |done, total| bar.show(done, total);
    let Reply::Status(status) = client::call_entry(entry, &Request::Status, &mut progress)? else {
        return Err(unexpected());
    };
    Ok(status)
}

/// A pool in `pool list`, or the entry of one that cannot be read.
#[derive(Debug, serde::Serialize)]
struct Listed {
    name: Name,
    path: Option<PathBuf>,
    id: Option<String>,
    status: Option<Status>,
    error: Option<String>,
}

impl Listed {
    fn new(found: Result<PoolEntry, BadEntry>) -> Self {
        match found {
            Ok(entry) => {
                let status = status_of(&entry);
                Self {
                    error: status.as_ref().err().map(one_line),
                    status: status.ok(),
                    name: entry.name,
                    path: Some(entry.path),
                    id: Some(entry.id),
                }
            }
            Err(BadEntry { name, error }) => Self {
                error: Some(one_line(&error)),
                status: None,
                name,
                path: None,
                id: None,
            },
        }
    }
}

pub(super) fn list(format: Format) -> Result<u8> {
    let found = Registry::from_env()?.all()?;
    let code = if found.iter().any(Result::is_err) {
        FAILED
    } else {
        OK
    };
    let pools: Vec<Listed> = found.into_iter().map(Listed::new).collect();
    print_list(&pools, format).map(|()| code)
}

fn print_list(pools: &[Listed], format: Format) -> Result<()> {
    if format.json {
        return output::json(&pools);
    }
    let (left, right) = (Align::Left, Align::Right);
    let mut table = Table::new([
        ("name", left),
        ("size", right),
        ("used", right),
        ("free", right),
        ("volumes", right),
        ("snapshots", right),
        ("devices", right),
        ("state", left),
        ("path", left),
    ]);
    for Listed {
        name,
        path,
        status,
        error,
        id: _,
    } in pools
    {
        let figures = status.as_ref().map(|Status { pool, devices, .. }| {
            let sizes =
                [pool.size_bytes, pool.used_bytes, pool.free_bytes].map(|bytes| format.size(bytes));
            let counts = [pool.volumes, pool.snapshots, *devices].map(|count| count.to_string());
            sizes.into_iter().chain(counts).collect()
        });
        let mut row = vec![name.to_string()];
        row.extend(figures.unwrap_or_else(|| vec![String::new(); 6]));
        let state = status.as_ref().map_or("", state_word);
        row.push(error.as_deref().unwrap_or(state).to_owned());
        let path = path.as_ref().map(|path| path.display().to_string());
        row.push(path.unwrap_or_default());
        table.row(row);
    }
    table.print(format)
}

fn state_word(status: &Status) -> &'static str {
    match status {
        Status { pool, .. } if pool.poisoned => "poisoned",
        Status {
            misplaced: true, ..
        } => "served, its file is gone",
        Status {
            read_only: true, ..
        } => "served read-only",
        Status {
            daemon_pid: Some(_),
            ..
        } => "served",
        Status { devices: 1.., .. } => "needs recovery",
        Status { .. } => "closed",
    }
}

/// A bound; scripts want the number.
fn at_most(bytes: u64, format: Format) -> String {
    if bytes == 0 || format.parsable {
        format.size(bytes)
    } else {
        format!("at most {}", format.size(bytes))
    }
}

pub(super) fn status(name: &Name, format: Format) -> Result<()> {
    let entry = Registry::from_env()?.find(name)?;
    let status = status_of(&entry)?;
    if format.json {
        return output::json(&status);
    }
    let pool = &status.pool;
    let now = SystemClock::new().now();
    let daemon = status
        .daemon_pid
        .map_or_else(|| "none".to_owned(), |pid| format!("process {pid}"));
    let mut properties = vec![
        ("name", pool.name.to_string()),
        ("id", pool.id.clone()),
        ("path", entry.path.display().to_string()),
        ("state", state_word(&status).to_owned()),
        ("daemon", daemon),
        ("devices", status.devices.to_string()),
        ("over NBD", status.exports.to_string()),
        ("size", format.size(pool.size_bytes)),
        ("used", format.size(pool.used_bytes)),
        ("free", format.size(pool.free_bytes)),
        ("pending", format.size(pool.pending_bytes)),
        ("reserve", format.size(pool.reserve_bytes)),
        ("set aside", format.size(pool.set_aside_bytes)),
        (
            "overcommit",
            if pool.overcommit { "yes" } else { "no" }.to_owned(),
        ),
        ("volumes", pool.volumes.to_string()),
        ("snapshots", pool.snapshots.to_string()),
        ("reclaiming", pool.reclaiming.to_string()),
        ("backlog", at_most(pool.backlog_bytes, format)),
        ("generation", pool.generation.to_string()),
        (
            "io",
            if status.direct_io {
                "direct"
            } else {
                "buffered"
            }
            .to_owned(),
        ),
        ("created", format.moment(pool.created, now)),
    ];
    properties.extend(
        pool.warnings
            .iter()
            .map(|warning| ("warning", warning.clone())),
    );
    output::properties(format, &properties)
}
