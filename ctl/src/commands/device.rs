//! Block devices: attach, detach, and take back those of a daemon that died.

use super::{ask, unexpected, warn_read_only};
use crate::claim::{self, Patience, Subject};
use crate::cli::{Attach, Detach, path_target};
use crate::client;
use crate::devices::{Devices, Slot};
use crate::exit_code::{FAILED, OK, one_line, printable};
use crate::output;
use crate::protocol::{DeviceRow, Reply, Request, Selection};
use crate::state::{self, PoolEntry, Registry, Runtime, pools_with_devices};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::ublk;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

/// The most queues that are made unasked.
const QUEUES_MAX_UNASKED: u16 = 4;

/// Refuses where no device can be made at all, before a daemon is started for it.
fn refuse_without_driver() -> Result<()> {
    const CONTROL: &str = "/dev/ublk-control";
    if Path::new(CONTROL).exists() {
        return Ok(());
    }
    Err(Error::with(
        ErrorKind::Unsupported,
        format!(
            "{CONTROL}: not there, this kernel has no ublk driver loaded; run `modprobe ublk_drv`, and see `ublkctl doctor`"
        ),
    ))
}

pub(super) fn attach(options: &Attach) -> Result<()> {
    let (pool, path) = (&options.target.pool, &options.target.path);
    Registry::from_env()?.find(pool)?;
    refuse_without_driver()?;
    let request = Request::Attach {
        path: path.clone(),
        read_only: options.read_only,
        queues: options.queues.unwrap_or_else(queues),
        depth: options.depth,
        metadata_cache: options.metadata_cache,
        on_full: options.on_full,
    };
    let Reply::Devices(rows) = client::call_daemon(pool, &request, &mut |_, _| {})? else {
        return Err(unexpected());
    };
    if rows.iter().any(|row| row.read_only) && !options.read_only && path.snapshot.is_none() {
        warn_read_only(pool, path);
    }
    rows.iter()
        .try_for_each(|row| output::text(&format!("{}\n", row.device)))
}

fn queues() -> u16 {
    let processors = available_parallelism().map_or(1, usize::from);
    u16::try_from(processors)
        .unwrap_or(QUEUES_MAX_UNASKED)
        .min(QUEUES_MAX_UNASKED)
}

pub(super) fn detach(options: &Detach) -> Result<()> {
    let mut chosen: BTreeMap<Name, Selection> = BTreeMap::new();
    if options.all {
        let mut pools = Vec::new();
        for text in &options.targets {
            pools.push(text.parse()?);
        }
        if pools.is_empty() {
            pools = pools_with_devices()?;
        }
        chosen.extend(pools.into_iter().map(|pool| (pool, Selection::All)));
    } else {
        for text in &options.targets {
            if options.force && forget_stray(text)? {
                continue;
            }
            let (pool, path) = target(text)?;
            match chosen
                .entry(pool)
                .or_insert_with(|| Selection::Paths(Vec::new()))
            {
                Selection::Paths(paths) if !paths.contains(&path) => paths.push(path),
                Selection::Paths(_) | Selection::All => {}
            }
        }
    }
    for (pool, devices) in chosen {
        detach_in(&pool, devices, options.force)?;
    }
    Ok(())
}

fn detach_in(pool: &Name, devices: Selection, force: bool) -> Result<()> {
    let entry = Registry::from_env()?.find(pool)?;
    if !client::is_served(pool)? {
        let waiting = waiting(&entry)?;
        if let Selection::Paths(paths) = &devices
            && let Some(path) = paths.iter().find(|path| waiting.find(path).is_none())
        {
            return Err(Error::with(
                ErrorKind::NotFound,
                format!("{pool}/{path}: not attached"),
            ));
        }
        if waiting.is_empty() {
            return Ok(());
        }
        // What the kernel still holds back for such a device needs a daemon to be written.
        match client::ensure_daemon(pool) {
            Err(e) if force => {
                output::say(&format!(
                    "{}; taking its devices away all the same",
                    one_line(&e)
                ));
                return forget(pool, waiting, &devices);
            }
            started => {
                started?;
            }
        }
    }
    let Reply::Devices(_) = ask(pool, &Request::Detach { devices, force }, "detaching")? else {
        return Err(unexpected());
    };
    Ok(())
}

/// The devices of a pool that no daemon serves. The pool may be beyond opening, so its own file is not asked.
fn waiting(entry: &PoolEntry) -> Result<Devices> {
    let runtime = Runtime::of(&entry.name)?;
    Devices::load(&runtime, &entry.name, entry.id.clone(), state::boot_id()?)
}

/// Removes devices from the kernel that no daemon can take back.
fn forget(pool: &Name, mut devices: Devices, selection: &Selection) -> Result<()> {
    let paths = match selection {
        Selection::All => devices
            .slots()
            .iter()
            .map(|slot| slot.entry.path.clone())
            .collect(),
        Selection::Paths(paths) => paths.clone(),
    };
    for path in paths {
        if let Some(slot) = devices.take(&path) {
            forget_device(format!("{pool}/{path}"), slot.entry.state.dev_id)?;
            devices.unlink(&slot.entry);
            devices.save()?;
        }
    }
    Ok(())
}

/// Removes a device from the kernel, unless somebody uses it.
fn forget_device(name: String, dev_id: u32) -> Result<()> {
    let subject = Subject { name, dev_id };
    let patience = Patience::default();
    loop {
        let claims = claim::claim(std::slice::from_ref(&subject), "detach", &patience)?;
        let Some(mut claim) = claims.into_iter().next().flatten() else {
            return ublk::forget(dev_id, || Ok(()));
        };
        match claim::seal(&mut claim, &subject, "detach") {
            Ok(()) => return ublk::forget(dev_id, || claim.release()),
            Err(e) if e.kind() == ErrorKind::Busy && !patience.is_over() => claim.release()?,
            Err(e) => return Err(e),
        }
    }
}

/// The devices of a pool, also those that wait for a daemon.
pub(super) fn devices_of(pool: &Name) -> Result<Vec<DeviceRow>> {
    if !client::is_served(pool)? {
        let entry = Registry::from_env()?.find(pool)?;
        return Ok(waiting(&entry)?.slots().iter().map(Slot::row).collect());
    }
    let Reply::Devices(rows) = ask(pool, &Request::Devices, "looking")? else {
        return Err(unexpected());
    };
    Ok(rows)
}

/// What a word on the command line names: a volume or snapshot, or the device of one.
fn target(text: &str) -> Result<(Name, VolumePath)> {
    if !text.starts_with('/') {
        let target = path_target(text)?;
        return Ok((target.pool, target.path));
    }
    // A link by name, or another node of the same number, leads to the device too.
    let identity = |path: &str| fs::metadata(path).map(|found| state::identity(&found)).ok();
    let wanted = identity(text);
    let is_meant = |row: &DeviceRow| {
        row.device == text || (wanted.is_some() && identity(&row.device) == wanted)
    };
    for pool in pools_with_devices()? {
        if let Some(row) = devices_of(&pool)?.into_iter().find(is_meant) {
            return Ok((pool, row.path));
        }
    }
    let shown = printable(text);
    Err(Error::with(
        ErrorKind::NotFound,
        format!(
            "{shown}: not a device that ublkctl attached; `ublkctl list -o name,device` shows those"
        ),
    ))
}

/// Devices that ublkctl made, that no process serves and no pool knows.
pub(super) fn strays() -> Result<Vec<String>> {
    let mut strays: Vec<String> = Vec::new();
    for orphan in ublk::orphans()? {
        strays.push(format!("/dev/ublkb{}", orphan.state.dev_id));
    }
    for pool in pools_with_devices()? {
        let known = devices_of(&pool)?;
        strays.retain(|stray| known.iter().all(|row| row.device != *stray));
    }
    Ok(strays)
}

/// Gives up a stray device; false if it is none.
fn forget_stray(text: &str) -> Result<bool> {
    let is_stray = text.starts_with('/') && strays()?.iter().any(|stray| stray == text);
    let number = text
        .strip_prefix("/dev/ublkb")
        .and_then(|number| number.parse().ok());
    match number {
        Some(number) if is_stray => {
            forget_device("a device of no pool".to_owned(), number).map(|()| true)
        }
        _ => Ok(false),
    }
}

pub(super) fn recover(pool: &Name) -> Result<u8> {
    Registry::from_env()?.find(pool)?;
    // Nothing to take back is no reason to start a daemon.
    if !client::is_served(pool)? && devices_of(pool)?.is_empty() {
        output::say(&format!("{pool}: no device is waiting for a daemon"));
        return Ok(OK);
    }
    refuse_without_driver()?;
    // A daemon that starts recovers them by itself; one that runs already tries again.
    let rows = if client::ensure_daemon(pool)? {
        devices_of(pool)?
    } else {
        let Reply::Devices(rows) = ask(pool, &Request::Recover, "recovering")? else {
            return Err(unexpected());
        };
        rows
    };
    let mut code = OK;
    for row in &rows {
        if row.served {
            output::text(&format!("{}\t{pool}/{}\n", row.device, row.path))?;
        } else {
            let fault = row.fault.as_deref().unwrap_or("nothing serves it");
            output::say(&format!(
                "{pool}/{}: {} is not back: {fault}",
                row.path, row.device
            ));
            code = FAILED;
        }
    }
    Ok(code)
}
