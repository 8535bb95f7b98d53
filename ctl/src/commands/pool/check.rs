//! `pool check`.

use super::open_for_reading;
use crate::client;
use crate::commands::unexpected;
use crate::exit_code::about;
use crate::output::{self, Format};
use crate::progress::Bar;
use crate::protocol::{Reply, Request};
use crate::state::{PoolEntry, Registry};
use blockfork::clock::SystemClock;
use blockfork::device::FileDevice;
use blockfork::error::Result;
use blockfork::name::Name;
use blockfork::pool::{CheckReport, OpenOptions, Pool, RingPlace};
use futures_lite::future::block_on;
use std::path::Path;
use std::sync::Arc;

pub(super) fn check(pool: &str, format: Format) -> Result<u8> {
    let report = match known(pool)? {
        Some(entry) => {
            let bar = Bar::new("checking");
            let mut progress = |done, total| bar.show(done, total);
            let Reply::Check(report) = client::call_entry(&entry, &Request::Check, &mut progress)?
            else {
                return Err(unexpected());
            };
            report
        }
        None => check_path(Path::new(pool))?,
    };
    if format.json {
        output::json(&report)?;
    } else {
        print_report(&report, format)?;
    }
    Ok(report.exit_code())
}

/// The known pool of this name, or at this path. A word that can be neither is an error that says what is wrong.
pub(super) fn known(pool: &str) -> Result<Option<PoolEntry>> {
    let registry = Registry::from_env()?;
    let is_path = pool.contains('/') || Path::new(pool).exists();
    match pool.parse::<Name>() {
        Ok(name) if registry.has(&name) || !is_path => registry.find(&name).map(Some),
        Err(e) if !is_path => Err(e),
        _ => registry.at_path(Path::new(pool)),
    }
}

fn check_path(path: &Path) -> Result<CheckReport> {
    let file = Arc::new(open_for_reading(path)?);
    let options = OpenOptions {
        read_only: true,
        device_blocks: file.blocks(),
        ring: RingPlace::Nowhere,
        clock: Arc::new(SystemClock::new()),
    };
    let device = FileDevice::new(file);
    let bar = Bar::new("checking");
    let pool = block_on(Pool::open(&device, options)).map_err(|e| about(path, &e))?;
    block_on(pool.check(&device, &mut |done, total| bar.show(done, total)))
}

pub(in crate::commands) fn print_report(report: &CheckReport, format: Format) -> Result<()> {
    let verdict = match report.exit_code() {
        0 => "clean",
        5 => "blocks are lost, nothing is damaged",
        _ => "corrupt",
    };
    let mut properties = vec![
        ("result", verdict.to_owned()),
        ("metadata pages", report.pages.to_string()),
        ("data blocks", report.data_blocks.to_string()),
        ("leaked blocks", report.leaked_blocks.to_string()),
    ];
    properties.extend(
        report
            .damage
            .iter()
            .map(|damage| ("damage", damage.clone())),
    );
    properties.extend(report.unreadable.iter().map(|unreadable| {
        let name = unreadable.path.as_ref().map_or_else(
            || format!("removed volume number {}", unreadable.id.0),
            ToString::to_string,
        );
        let bytes: u64 = unreadable.ranges.iter().map(|range| range.length).sum();
        let ranges = unreadable
            .ranges
            .iter()
            .map(|range| format!("{}+{}", range.offset, range.length));
        let mut ranges: Vec<String> = ranges.collect();
        if bytes < unreadable.bytes {
            ranges.push("more".to_owned());
        }
        let line = format!(
            "{name}: {} of it, {}: {}",
            format.size(unreadable.bytes),
            unreadable.reason,
            ranges.join(", ")
        );
        ("unreadable", line)
    }));
    output::properties(format, &properties)
}
