//! `pool check --repair`: says what is wrong and what will be done, asks, and does it. Offline: nothing may have the
//! pool open meanwhile.

use super::pool::print_report;
use crate::client;
use crate::devices::Devices;
use crate::exit_code::{OK, about};
use crate::output::{self, Align, Format, Table};
use crate::progress::Bar;
use crate::state::{self, PoolEntry, Runtime};
use blockfork::clock::SystemClock;
use blockfork::device::{Access, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::pool::{CheckReport, OpenOptions, Pool, RepairOptions, RepairPlan, RingPlace};
use futures_lite::future::block_on;
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;

/// How long to wait for a lock whose owner died with I/O under way.
const LOCK_WAIT_MS: u64 = 5000;
/// The exit code of a dry run that found something.
const CORRUPT: u8 = 4;

/// Whether the plan may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Consent {
    /// Only shown.
    DryRun,
    /// Asked for on the terminal.
    Ask,
    /// Given with the command.
    Given,
}

/// What `--json` prints.
#[derive(Debug, serde::Serialize)]
struct Repaired {
    #[serde(flatten)]
    plan: RepairPlan,
    /// Whether it was carried out.
    done: bool,
    /// A check of the pool after that.
    after: Option<CheckReport>,
}

/// Repairs a known pool, or the one at `path`; the exit code.
pub(super) fn run(
    entry: Option<&PoolEntry>,
    path: &Path,
    repair: RepairOptions,
    consent: Consent,
    format: Format,
) -> Result<u8> {
    let path = entry.map_or(path, |entry| &entry.path);
    if let Some(entry) = entry {
        refuse_served(entry)?;
    }
    let access = Access {
        write: consent != Consent::DryRun,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let file = Arc::new(PoolFile::open(path, access)?);
    let options = OpenOptions {
        read_only: false,
        device_blocks: file.blocks(),
        ring: entry.map_or(Ok(RingPlace::Nowhere), refuse_attached)?,
        clock: Arc::new(SystemClock::new()),
    };
    let device = FileDevice::new(file);
    let plan = {
        let bar = Bar::new("checking");
        let mut told = |done, total| bar.show(done, total);
        block_on(Pool::plan_repair(&device, &options, repair, &mut told))
            .map_err(|e| about(path, &e))?
    };
    if !format.json {
        show(&plan, format)?;
    }
    let goes_on = plan.mends_something()
        && match consent {
            Consent::DryRun => false,
            Consent::Given => true,
            Consent::Ask => ask(format)?,
        };
    if goes_on {
        let bar = Bar::new("repairing");
        let mut told = |done, total| bar.show(done, total);
        block_on(Pool::repair(&device, options.clone(), repair, &mut told))
            .map_err(|e| about(path, &e))?;
    }
    if consent == Consent::DryRun {
        if format.json {
            output::json(&Repaired {
                done: false,
                after: None,
                plan: plan.clone(),
            })?;
        }
        return Ok(if plan.steps.is_empty() { OK } else { CORRUPT });
    }
    let after = check(&device, options).map_err(|e| about(path, &e))?;
    let code = after.exit_code();
    if format.json {
        output::json(&Repaired {
            plan,
            done: goes_on,
            after: Some(after),
        })?;
    } else {
        print_report(&after, format)?;
    }
    Ok(code)
}

fn refuse_served(entry: &PoolEntry) -> Result<()> {
    let name = &entry.name;
    if client::is_served(name)? {
        return Err(Error::with(
            ErrorKind::Busy,
            format!(
                "pool {name}: a daemon serves it; unmount and detach everything with `ublkctl detach --all {name}`, which ends the daemon, and stop `ublkctl serve` if it runs"
            ),
        ));
    }
    Ok(())
}

/// Refuses while devices wait for a daemon; otherwise where a killed daemon left its last records.
fn refuse_attached(entry: &PoolEntry) -> Result<RingPlace> {
    let (runtime, boot_id) = (Runtime::of(&entry.name)?, state::boot_id()?);
    let devices = Devices::load(&runtime, &entry.name, entry.id.clone(), boot_id)?;
    devices.refuse("repair", devices.slots().iter())?;
    let path = runtime.ring();
    Ok(if path.exists() {
        RingPlace::File { path, boot_id }
    } else {
        RingPlace::Nowhere
    })
}

fn show(plan: &RepairPlan, format: Format) -> Result<()> {
    if plan.steps.is_empty() {
        return output::text("nothing to repair\n");
    }
    let left = Align::Left;
    let mut table = Table::new([("where", left), ("what", left), ("what is done", left)]);
    for step in &plan.steps {
        table.row(vec![
            step.place.clone(),
            step.what.clone(),
            step.action.clone(),
        ]);
    }
    table.print(format)
}

fn ask(format: Format) -> Result<bool> {
    let input = std::io::stdin();
    // Nobody is asked about what was not shown.
    if format.json || !input.is_terminal() {
        return Err(Error::with(
            ErrorKind::Invalid,
            "nobody to ask; look with --dry-run, then repair with --yes",
        ));
    }
    let failed = |e| Error::io(e, "the terminal cannot be used");
    let mut out = std::io::stderr();
    write!(out, "Repair it? [y/N] ").map_err(failed)?;
    out.flush().map_err(failed)?;
    let mut answer = String::new();
    input.lock().read_line(&mut answer).map_err(failed)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(true);
    }
    Err(Error::with(ErrorKind::Invalid, "not repaired"))
}

fn check(device: &FileDevice, options: OpenOptions) -> Result<CheckReport> {
    let options = OpenOptions {
        read_only: true,
        ..options
    };
    let bar = Bar::new("checking");
    let pool = block_on(Pool::open(device, options))?;
    block_on(pool.check(device, &mut |done, total| bar.show(done, total)))
}
