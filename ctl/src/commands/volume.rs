//! Volumes and snapshots: create, resize, rename, remove, snapshot, clone, roll back, hold, release.

use super::device::devices_of;
use super::{ask, change, one_pool, unexpected};
use crate::cli::{Create, Hold, PathTarget, Redirect, Resize, Rm, Snapshot};
use crate::output;
use crate::progress::Bar;
use crate::protocol::{Reply, Request, Resized};
use crate::quiesce;
use crate::size;
use crate::state::PoolEntry;
use crate::{client, state};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::VOLUME_BYTES_MAX;
use blockfork::name::Name;
use blockfork::pool::{self, Backlog, Limits, VolumeOptions};
use blockfork::units::VolumeId;
use std::fmt::Write;
use std::thread;
use std::time::Duration;

/// How often to look whether the space has come back.
const LOOK: Duration = Duration::from_millis(200);
/// Numbers in one question about it: as many as a request line has room for.
const IDS_MAX: usize = 40_000;

pub(super) fn create(options: &Create) -> Result<()> {
    let PathTarget { pool, path } = &options.volume;
    check_size(options.size, options.sector_size)?;
    change(
        pool,
        &Request::Create {
            volume: path.volume.clone(),
            options: VolumeOptions {
                bytes: options.size,
                sector_bytes: options.sector_size,
                redirect: match options.redirect {
                    Redirect::Shared => pool::Redirect::Shared,
                    Redirect::Always => pool::Redirect::Always,
                },
            },
            limits: Limits {
                quota_bytes: options.quota,
                reserve_bytes: options.reserve,
            },
        },
    )
}

/// Refuses a size that no volume can have, before the pool is opened.
fn check_size(bytes: u64, sector_bytes: u32) -> Result<()> {
    let refuse = |fact: String| {
        Err(Error::with(
            ErrorKind::Invalid,
            format!("size {bytes}: {fact}"),
        ))
    };
    if bytes > VOLUME_BYTES_MAX {
        return refuse(format!(
            "is beyond the limit of {}",
            size::human(VOLUME_BYTES_MAX)
        ));
    }
    if !bytes.is_multiple_of(u64::from(sector_bytes)) {
        return refuse(format!(
            "is not a multiple of the sector size, {sector_bytes}"
        ));
    }
    Ok(())
}

pub(super) fn resize(options: &Resize) -> Result<()> {
    let PathTarget { pool, path } = &options.volume;
    // The volume's sector is the engine's to know; 512 is the least.
    check_size(options.size, 512)?;
    let request = Request::Resize {
        volume: path.volume.clone(),
        bytes: options.size,
        allow_shrink: options.allow_shrink,
    };
    let Reply::Resized(resized) = ask(pool, &request, "working")? else {
        return Err(unexpected());
    };
    if let Resized::Later(why) = resized {
        output::say(&format!("{pool}/{path}: has its new size; {why}"));
    }
    Ok(())
}

pub(super) fn rename(from: &PathTarget, to: &PathTarget) -> Result<()> {
    let refuse = |fact: &str| {
        Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "{}/{} cannot become {}/{}: {fact}",
                from.pool, from.path, to.pool, to.path
            ),
        ))
    };
    if from.pool != to.pool {
        return refuse("a volume stays in its pool");
    }
    match (&from.path.snapshot, &to.path.snapshot) {
        (Some(_), Some(_)) if from.path.volume != to.path.volume => {
            return refuse("a snapshot stays with its volume");
        }
        (Some(_), None) => {
            return refuse("a snapshot stays one; `ublkctl clone` makes a volume of it");
        }
        (None, Some(_)) => {
            return refuse("a volume stays one; `ublkctl snapshot` makes a snapshot of it");
        }
        (Some(_), Some(_)) | (None, None) => {}
    }
    let request = Request::Rename {
        from: from.path.clone(),
        to: to.path.clone(),
    };
    change(&from.pool, &request)
}

pub(super) fn snapshot(options: &Snapshot) -> Result<()> {
    let (pool, targets) = one_pool(&options.targets)?;
    let volumes = targets.iter().map(|path| path.volume.clone()).collect();
    let take = || change(pool, &Request::Snapshot { targets });
    if options.no_sync {
        return take();
    }
    let attached = quiesce::Targets::new(pool, volumes, &devices_of(pool)?)?;
    match options.freeze {
        None => attached.flush().and_then(|()| take()),
        Some(seconds) => attached.freeze(seconds, take),
    }
}

pub(super) fn clone(snapshot: &PathTarget, volume: &PathTarget) -> Result<()> {
    if snapshot.pool != volume.pool {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "{}/{}: a clone lives in its snapshot's pool, {}",
                volume.pool, volume.path, snapshot.pool
            ),
        ));
    }
    let request = Request::Clone {
        snapshot: snapshot.path.clone(),
        volume: volume.path.volume.clone(),
    };
    change(&snapshot.pool, &request)
}

pub(super) fn rollback(snapshot: &PathTarget) -> Result<()> {
    let request = Request::Rollback {
        snapshot: snapshot.path.clone(),
    };
    change(&snapshot.pool, &request)
}

pub(super) fn hold(options: &Hold) -> Result<()> {
    let (pool, snapshots) = one_pool(&options.targets)?;
    let tag = options.tag.clone();
    change(pool, &Request::Hold { tag, snapshots })
}

pub(super) fn release(options: &Hold) -> Result<()> {
    let (pool, snapshots) = one_pool(&options.targets)?;
    let tag = options.tag.clone();
    change(pool, &Request::Release { tag, snapshots })
}

pub(super) fn remove(options: &Rm) -> Result<()> {
    let (pool, targets) = one_pool(&options.targets)?;
    let request = Request::Remove {
        targets,
        recursive: options.recursive,
        dry_run: options.dry_run,
    };
    let Reply::Removal(removal) = ask(pool, &request, "returning space")? else {
        return Err(unexpected());
    };
    if options.dry_run {
        let mut out = String::new();
        for path in &removal.targets {
            writeln!(out, "would remove {pool}/{path}")
                .map_err(|e| Error::io(std::io::Error::other(e), "text"))?;
        }
        let freed = size::human(removal.freed_bytes.unwrap_or_default());
        writeln!(out, "would free {freed}")
            .map_err(|e| Error::io(std::io::Error::other(e), "text"))?;
        return output::text(&out);
    }
    if options.wait {
        wait_for_space(pool, &removal.ids)
    } else {
        Ok(())
    }
}

/// Waits until a daemon has returned the space of what was removed. Without a daemon that has happened already.
fn wait_for_space(pool: &Name, ids: &[VolumeId]) -> Result<()> {
    let bar = Bar::of_bytes("returning space");
    let entry = state::Registry::from_env()?.find(pool)?;
    let mut most = 0;
    while client::is_served(pool)? {
        let left = backlog(&entry, ids)?;
        if left.trees > 0 && left.trees == left.unreadable {
            return Err(Error::corrupt(format!(
                "pool {pool}: {} of what was removed cannot be read, so that its space does not come back; see `ublkctl pool check --repair {pool}`",
                left.trees
            )));
        }
        if left.trees == 0 && left.is_settled {
            break;
        }
        most = most.max(left.bytes);
        bar.show(most - left.bytes, most);
        thread::sleep(LOOK);
    }
    Ok(())
}

/// What of so many still holds space, asked in lines that a daemon takes.
fn backlog(entry: &PoolEntry, ids: &[VolumeId]) -> Result<Backlog> {
    let mut all = Backlog {
        is_settled: true,
        ..Backlog::default()
    };
    for ids in ids.chunks(IDS_MAX) {
        let request = Request::Backlog { ids: ids.to_vec() };
        let Reply::Backlog(some) = client::call_entry(entry, &request, &mut |_, _| {})? else {
            return Err(unexpected());
        };
        all.trees += some.trees;
        all.unreadable += some.unreadable;
        all.bytes += some.bytes;
        all.is_settled &= some.is_settled;
    }
    Ok(all)
}
