//! Pools: create, import, rename, export, list, status, grow, check, destroy.

mod check;
mod create;
mod identity;
mod show;

pub(super) use check::print_report;

use super::repair::{self, Consent};
use super::{change, unexpected};
use crate::cli::PoolCommand;
use crate::devices::Devices;
use crate::exit_code::{OK, about, one_line, printable};
use crate::host::Role;
use crate::output;
use crate::protocol::{Reply, Request, Status};
use crate::state::{self, PoolEntry, Registry, Runtime};
use crate::{client, size};
use blockfork::device::{Access, BlockBuf, Device, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use blockfork::pool::{OutlineEntry, Pool, RepairOptions};
use futures_lite::future::block_on;
use std::path::Path;
use std::sync::Arc;

/// The blocks from the start that hold both copies of the superblock, with room to spare.
const WIPED_BLOCKS: usize = 16;
/// How long to wait for a lock whose owner died with I/O under way.
const LOCK_WAIT_MS: u64 = 5000;

/// Runs a command on pools; its exit code.
pub(super) fn run(command: PoolCommand) -> Result<u8> {
    match command {
        PoolCommand::Create {
            name,
            path,
            size,
            force,
            no_overcommit,
        } => create::create(&name, &path, size, force, !no_overcommit),
        PoolCommand::Import { path, name, new_id } => {
            if name.is_some() || new_id {
                identity::change_at(&path, name, new_id)?;
            }
            import(&path)
        }
        PoolCommand::Rename { from, to } => identity::rename(&from, &to),
        PoolCommand::Export { name, force } => export(&name, force),
        PoolCommand::List { format } => return show::list(format),
        PoolCommand::Status { name, format } => show::status(&name, format),
        PoolCommand::Grow { name, size } => {
            create::check_size(size)?;
            change(&name, &Request::Grow { bytes: size })
        }
        PoolCommand::Check {
            pool,
            repair: true,
            dry_run,
            yes,
            discard_journal,
            format,
        } => {
            let entry = check::known(&pool)?;
            let options = RepairOptions {
                discards_journal: discard_journal,
            };
            let consent = match (dry_run, yes) {
                (true, _) => Consent::DryRun,
                (false, true) => Consent::Given,
                (false, false) => Consent::Ask,
            };
            return repair::run(entry.as_ref(), Path::new(&pool), options, consent, format);
        }
        PoolCommand::Check { pool, format, .. } => return check::check(&pool, format),
        PoolCommand::Destroy {
            name,
            force: _,
            dry_run,
        } => destroy(&name, dry_run),
    }
    .map(|()| OK)
}

fn import(path: &Path) -> Result<()> {
    let registry = Registry::from_env()?;
    refuse_known(&registry, path)?;
    // Its lock is held to the end, so that the pool is what its label says.
    let file = open_for_reading(path)?;
    let blocks = file.blocks();
    let label = block_on(Pool::label(&FileDevice::new(Arc::new(file)), blocks))
        .map_err(|e| about(path, &e))?;
    let entry = PoolEntry {
        name: label.name,
        path: state::absolute(path)?,
        id: label.id.to_string(),
    };
    let registry = registry.lock()?;
    refuse_known(&registry, path)?;
    if registry.has(&entry.name) {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "{}: holds pool {}, and this machine has another of that name; export that first",
                path.display(),
                entry.name
            ),
        ));
    }
    identity::refuse_twin(&registry, &entry.id, path)?;
    registry.add(&entry)?;
    output::text(&format!("{}\n", entry.name))
}

fn refuse_known(registry: &Registry, path: &Path) -> Result<()> {
    let Some(entry) = registry.at_path(path)? else {
        return Ok(());
    };
    Err(Error::with(
        ErrorKind::AlreadyExists,
        format!(
            "{}: is known already, as pool {}",
            path.display(),
            entry.name
        ),
    ))
}

fn open_for_reading(path: &Path) -> Result<PoolFile> {
    let access = Access {
        write: false,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    PoolFile::open(path, access)
}

fn export(name: &Name, force: bool) -> Result<()> {
    let registry = Registry::from_env()?;
    let entry = match registry.find(name) {
        Ok(entry) => entry,
        // An entry that cannot be read can still be forgotten.
        Err(e) if force && registry.has(name) => {
            output::say(&one_line(&e));
            return forget_unreadable(registry, name);
        }
        Err(e) => return Err(e),
    };
    // Opening it for writing brings home what a killed daemon left in the ring, which does not travel with the pool.
    let runtime = Runtime::of(name)?;
    let mut closed = close(&entry);
    if closed.is_ok() && runtime.ring().exists() {
        // Its daemon could only read it, so what the ring holds is nowhere else yet.
        drop(closed);
        closed = close(&entry);
    }
    // The lock stays to the end: a daemon that starts waits for it, and then finds that the pool is not known any more.
    let _lock = match closed {
        Err(e) if force && e.kind() != ErrorKind::Busy => {
            output::say(&format!("{}; forgotten all the same", one_line(&e)));
            None
        }
        closed => {
            let lock = closed?;
            // Another command may have attached something before the lock was taken, and its daemon may be dead.
            let devices = Devices::load(&runtime, name, entry.id.clone(), state::boot_id()?)?;
            devices.refuse("export", devices.slots().iter())?;
            Some(lock)
        }
    };
    let registry = registry.lock()?;
    registry.refuse_changed(&entry)?;
    runtime.clear()?;
    registry.remove(&entry)
}

/// Forgets a pool whose entry cannot be read, and which nobody serves.
fn forget_unreadable(registry: Registry, name: &Name) -> Result<()> {
    if let Some(pid) = client::daemon_of(name)? {
        return Err(Error::with(
            ErrorKind::Busy,
            format!(
                "pool {name}: process {pid} serves it; unmount its devices and end it with `kill {pid}`, then try again"
            ),
        ));
    }
    let registry = registry.lock()?;
    if registry.find(name).is_ok() {
        return Err(Error::with(
            ErrorKind::Busy,
            format!("pool {name}: its entry has just been replaced; look at it again"),
        ));
    }
    registry.forget(name)
}

/// Closes a pool, and ends its daemon if there is one. Whoever has the lock that is returned has the pool alone.
fn close(entry: &PoolEntry) -> Result<PoolFile> {
    let access = Access {
        write: true,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let closed = change(&entry.name, &Request::Stop);
    match closed.and_then(|()| PoolFile::open(&entry.path, access)) {
        Err(e) if e.kind() == ErrorKind::ReadOnly => close_read_only(entry),
        closed => closed,
    }
}

/// What [`close`] does for a pool on a medium that takes no writes: there is nothing to write back, as long as the journal
/// has everything that the ring of a killed daemon has.
fn close_read_only(entry: &PoolEntry) -> Result<PoolFile> {
    let runtime = Runtime::of(&entry.name)?;
    let file = Arc::new(open_for_reading(&entry.path)?);
    let host = client::open(entry, &runtime, file, true, Role::Command)?;
    // Refused while a device of a killed daemon waits.
    host.handle(Request::Stop, &mut |_, _| {})?;
    let lost = host.pool().records_only_in_ring();
    if lost > 0 {
        return Err(Error::with(
            ErrorKind::ReadOnly,
            format!(
                "pool {}: {} is on a read-only medium, and {lost} changes that a killed daemon acknowledged are in {} alone; make the medium writable first",
                entry.name,
                entry.path.display(),
                runtime.ring().display()
            ),
        ));
    }
    open_for_reading(&entry.path)
}

fn destroy(name: &Name, dry_run: bool) -> Result<()> {
    let registry = Registry::from_env()?;
    let entry = registry.find(name)?;
    let runtime = Runtime::of(name)?;
    if dry_run {
        return would_destroy(&entry);
    }
    // Before the daemon is asked to let go.
    refuse_held(
        name,
        client::call_entry(&entry, &Request::Outline, &mut |_, _| {}),
    )?;
    if client::is_served(name)? {
        // Refused while a device is attached; otherwise the daemon lets go.
        change(name, &Request::Stop)?;
    }
    let access = Access {
        write: true,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let file = Arc::new(PoolFile::open(&entry.path, access)?);
    let devices = Devices::load(&runtime, name, entry.id.clone(), state::boot_id()?)?;
    devices.refuse("destroy", devices.slots().iter())?;
    // Again, now that nobody else can put a hold on anything.
    let opened = client::open(&entry, &runtime, file.clone(), true, Role::Command);
    let outline = opened.and_then(|host| host.handle(Request::Outline, &mut |_, _| {}));
    refuse_held(name, outline)?;
    // Before anything is overwritten: another command may have destroyed or exported it, and the name may be another
    // pool's by now.
    let registry = registry.lock()?;
    registry.refuse_changed(&entry)?;
    wipe(&entry, file.clone())?;
    runtime.clear()?;
    registry.remove(&entry)
}

/// An error that names every hold in a pool, of which `outline` tells. What is not there or damaged can be destroyed.
fn refuse_held(pool: &Name, outline: Result<Reply>) -> Result<()> {
    let held = match outline {
        Ok(Reply::Outline(entries)) => held(pool, &entries),
        Ok(_) => return Err(unexpected()),
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => return Ok(()),
        Err(e) => return Err(e),
    };
    if held.is_empty() {
        return Ok(());
    }
    Err(Error::with(
        ErrorKind::Busy,
        format!(
            "pool {pool}: cannot be destroyed: {}; `ublkctl release` takes a hold away",
            held.join(", ")
        ),
    ))
}

/// Every hold, with its snapshot.
fn held(pool: &Name, entries: &[OutlineEntry]) -> Vec<String> {
    let of = |entry: &OutlineEntry| {
        let path = entry.path.clone();
        let tags = entry.holds.clone().into_iter();
        tags.map(move |tag| format!("{pool}/{path} is held by {tag}"))
    };
    entries.iter().flat_map(of).collect()
}

fn would_destroy(entry: &PoolEntry) -> Result<()> {
    let Status { pool, devices, .. } = show::status_of(entry)?;
    let mut text = format!(
        "would destroy pool {}, {}: {} volumes and {} snapshots, {} in use\n",
        entry.name,
        printable(&entry.path.display().to_string()),
        pool.volumes,
        pool.snapshots,
        size::human(pool.used_bytes)
    );
    if devices > 0 {
        text.push_str("would be refused: devices are attached\n");
    }
    let outline = client::call_entry(entry, &Request::Outline, &mut |_, _| {})?;
    let Reply::Outline(entries) = outline else {
        return Err(unexpected());
    };
    for hold in held(&entry.name, &entries) {
        text.extend(["would be refused: ", &hold, "\n"]);
    }
    output::text(&text)
}

/// Overwrites both superblocks, if they are this pool's: another may live there by now.
fn wipe(entry: &PoolEntry, file: Arc<PoolFile>) -> Result<()> {
    let blocks = file.blocks();
    let device = FileDevice::new(file);
    match block_on(Pool::label(&device, blocks)) {
        Ok(label) if label.id.to_string() != entry.id => {
            return Err(Error::with(
                ErrorKind::NotFound,
                format!(
                    "pool {}: {} holds another pool now, {}; forget this one with `ublkctl pool export --force {}`",
                    entry.name,
                    entry.path.display(),
                    label.name,
                    entry.name
                ),
            ));
        }
        Ok(_) => {}
        // Whatever is there now is not this pool, and not ours to overwrite.
        Err(e) if e.kind() == ErrorKind::NotFound => {
            output::say(&one_line(&about(&entry.path, &e)));
            return Ok(());
        }
        // A damaged pool is destroyed like a whole one.
        Err(e) if e.kind() == ErrorKind::Corrupt => output::say(&one_line(&e)),
        Err(e) => return Err(e),
    }
    let zeros = BlockBuf::zeroed(WIPED_BLOCKS);
    block_on(device.write(0, &zeros))?;
    block_on(device.flush())
}
