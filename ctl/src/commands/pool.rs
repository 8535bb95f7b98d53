//! Pools: create, import, export, list, status, grow, check, destroy.

use super::repair::{self, Consent};
use super::{change, unexpected};
use crate::cli::PoolCommand;
use crate::client;
use crate::devices::Devices;
use crate::exit_code::{OK, about, one_line, printable};
use crate::output::{self, Align, Format, Table};
use crate::progress::Bar;
use crate::protocol::{Reply, Request, Status};
use crate::signature;
use crate::size;
use crate::state::{self, PoolEntry, Registry, Runtime};
use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, BlockBuf, Device, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::{POOL_BLOCKS_MAX, POOL_BLOCKS_MIN};
use blockfork::name::Name;
use blockfork::pool::{CheckReport, CreateOptions, OpenOptions, Pool, RepairOptions, RingPlace};
use blockfork::units::{BLOCK_BYTES, PoolId};
use futures_lite::future::block_on;
use std::fs::{self, File, OpenOptions as FileOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
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
        } => create(&name, &path, size, force),
        PoolCommand::Import { path } => import(&path),
        PoolCommand::Export { name, force } => export(&name, force),
        PoolCommand::List { format } => list(format),
        PoolCommand::Status { name, format } => status(&name, format),
        PoolCommand::Grow { name, size } => {
            check_size(size)?;
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
            let entry = known(&pool)?;
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
        PoolCommand::Check { pool, format, .. } => return check(&pool, format),
        PoolCommand::Destroy {
            name,
            force: _,
            dry_run,
        } => destroy(&name, dry_run),
    }
    .map(|()| OK)
}

/// Refuses a size that no pool can have.
fn check_size(bytes: u64) -> Result<()> {
    let (min, max) = (POOL_BLOCKS_MIN * BLOCK_BYTES, POOL_BLOCKS_MAX * BLOCK_BYTES);
    if !(min..=max).contains(&bytes) {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "size {bytes}: a pool has at least {} and at most {}",
                size::human(min),
                size::human(max)
            ),
        ));
    }
    if !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("size {bytes}: is not a multiple of {BLOCK_BYTES}"),
        ));
    }
    Ok(())
}

fn create(name: &Name, path: &Path, size: Option<u64>, force: bool) -> Result<()> {
    let registry = Registry::from_env()?;
    refuse_known(&registry, name, path)?;
    size.map_or(Ok(()), check_size)?;
    registry.prepare()?;
    let is_new = make_file(path, size)?;
    let created = create_in(name, path, size, is_new || force);
    if created.is_err() && is_new {
        state::remove_file(path)?;
    }
    registry.add(&created?)
}

fn refuse_known(registry: &Registry, name: &Name, path: &Path) -> Result<()> {
    if registry.has(name) {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "pool {name}: exists already; choose another name, or see `ublkctl pool status {name}`"
            ),
        ));
    }
    match registry.at_path(path)? {
        Some(entry) => Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "{}: is pool {} already; destroy or export that first",
                path.display(),
                entry.name
            ),
        )),
        None => Ok(()),
    }
}

/// Makes the pool's file if nothing is there; true if it did.
fn make_file(path: &Path, size: Option<u64>) -> Result<bool> {
    let shown = path.display();
    if fs::symlink_metadata(path).is_ok() {
        return Ok(false);
    }
    let Some(size) = size else {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!("{shown}: is not there; give --size to make a file of that size"),
        ));
    };
    let failed = |e| Error::io(e, format!("{shown}: cannot be created"));
    let file = FileOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    if let Err(e) = file.set_len(size).and_then(|()| file.sync_all()) {
        state::remove_file(path)?;
        return Err(failed(e));
    }
    Ok(true)
}

fn create_in(name: &Name, path: &Path, size: Option<u64>, force: bool) -> Result<PoolEntry> {
    let access = Access {
        write: true,
        lock_wait_ms: 0,
    };
    let mut file = PoolFile::open(path, access)?;
    let path = absolute(path)?;
    let shown = path.display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be read"));
    let held = file.bytes();
    // Reopened by its descriptor, so it is the same file, and without O_DIRECT: signatures stand at odd places.
    let reopen = format!("/proc/self/fd/{}", file.as_raw_fd());
    let plain = FileOptions::new()
        .read(true)
        .write(true)
        .open(reopen)
        .map_err(failed)?;
    let found = signature::probe(&plain, held).map_err(failed)?;
    if !force {
        refuse_content(&file, &plain, &found)?;
    }
    let bytes = size.unwrap_or(held - held % BLOCK_BYTES);
    check_size(bytes).map_err(|e| Error::with(e.kind(), format!("{shown}: {e}")))?;
    if bytes > held {
        if file.is_block_device() {
            return Err(Error::with(
                ErrorKind::Invalid,
                format!("{shown}: the device holds {held} bytes, less than --size"),
            ));
        }
        file.set_bytes(bytes)?;
    }
    signature::wipe(&plain, held, &found)
        .map_err(|e| Error::io(e, format!("{shown}: cannot be written")))?;
    drop(plain);
    if !file.is_direct() {
        output::say(&format!(
            "{shown}: the file system refuses O_DIRECT; I/O will be buffered"
        ));
    }
    let id = draw_id()?;
    let options = CreateOptions {
        name: name.clone(),
        id,
        blocks: bytes / BLOCK_BYTES,
        created: SystemClock::new().now(),
    };
    block_on(Pool::create(&FileDevice::new(Arc::new(file)), options))?;
    Ok(PoolEntry {
        name: name.clone(),
        path,
        id: id.to_string(),
    })
}

/// Refuses what holds anything that somebody may miss.
fn refuse_content(file: &PoolFile, plain: &File, found: &[signature::Found]) -> Result<()> {
    let shown = file.path().display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be read"));
    let fact = match found.first() {
        Some(first) => first.name,
        // A file full of data is somebody's; a device is never empty, and only what is recognised counts there.
        None if !file.is_block_device()
            && signature::has_data(plain, file.bytes()).map_err(failed)? =>
        {
            "data"
        }
        None => return Ok(()),
    };
    Err(Error::with(
        ErrorKind::AlreadyExists,
        format!("{shown}: holds {fact}; choose another path, or overwrite it with --force"),
    ))
}

/// A version 4 UUID.
fn draw_id() -> Result<PoolId> {
    const SOURCE: &str = "/dev/urandom";
    let mut id = [0; 16];
    let drawn = File::open(SOURCE).and_then(|mut source| source.read_exact(&mut id));
    drawn.map_err(|e| Error::io(e, format!("{SOURCE}: cannot be read")))?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(PoolId(id))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|e| Error::io(e, format!("{}: cannot be found", path.display())))
}

fn import(path: &Path) -> Result<()> {
    let registry = Registry::from_env()?;
    if let Some(entry) = registry.at_path(path)? {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "{}: is known already, as pool {}",
                path.display(),
                entry.name
            ),
        ));
    }
    let file = open_for_reading(path)?;
    let blocks = file.blocks();
    let label = block_on(Pool::label(&FileDevice::new(Arc::new(file)), blocks))
        .map_err(|e| about(path, &e))?;
    if registry.has(&label.name) {
        return Err(Error::with(
            ErrorKind::AlreadyExists,
            format!(
                "{}: holds pool {}, and this machine has another of that name; export that first",
                path.display(),
                label.name
            ),
        ));
    }
    registry.add(&PoolEntry {
        name: label.name.clone(),
        path: absolute(path)?,
        id: label.id.to_string(),
    })?;
    output::text(&format!("{}\n", label.name))
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
            return registry.remove(name);
        }
        Err(e) => return Err(e),
    };
    // Opening it for writing brings home what a killed daemon left in the ring, which does not travel with the pool.
    let mut closed = change(name, &Request::Stop).and_then(|()| wait_for_lock(&entry));
    if closed.is_ok() && Runtime::of(name)?.ring().exists() {
        // Its daemon could only read it, so what the ring holds is nowhere else yet.
        closed = change(name, &Request::Stop);
    }
    match closed {
        Err(e) if force && e.kind() != ErrorKind::Busy => {
            output::say(&format!("{}; forgotten all the same", one_line(&e)));
        }
        closed => closed?,
    }
    Runtime::of(name)?.clear()?;
    registry.remove(name)
}

/// Waits until a daemon that was told to stop has let go of the pool.
fn wait_for_lock(entry: &PoolEntry) -> Result<()> {
    let access = Access {
        write: true,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    PoolFile::open(&entry.path, access).map(drop)
}

fn status_of(entry: &PoolEntry) -> Result<Status> {
    let bar = Bar::new("looking");
    let mut progress = |done, total| bar.show(done, total);
    let Reply::Status(status) = client::call_entry(entry, &Request::Status, &mut progress)? else {
        return Err(unexpected());
    };
    Ok(status)
}

/// A pool in `pool list`.
#[derive(Debug, serde::Serialize)]
struct Listed {
    #[serde(flatten)]
    entry: PoolEntry,
    status: Option<Status>,
    error: Option<String>,
}

fn list(format: Format) -> Result<()> {
    let look = |entry: PoolEntry| {
        let status = status_of(&entry);
        Listed {
            error: status.as_ref().err().map(one_line),
            status: status.ok(),
            entry,
        }
    };
    let pools: Vec<Listed> = Registry::from_env()?.all()?.into_iter().map(look).collect();
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
        entry,
        status,
        error,
    } in pools
    {
        let figures = status.as_ref().map(|Status { pool, devices, .. }| {
            let sizes =
                [pool.size_bytes, pool.used_bytes, pool.free_bytes].map(|bytes| format.size(bytes));
            let counts = [pool.volumes, pool.snapshots, *devices].map(|count| count.to_string());
            sizes.into_iter().chain(counts).collect()
        });
        let mut row = vec![entry.name.to_string()];
        row.extend(figures.unwrap_or_else(|| vec![String::new(); 6]));
        row.push(error.unwrap_or_else(|| status.as_ref().map_or("", state_word).to_owned()));
        row.push(entry.path.display().to_string());
        table.row(row);
    }
    table.print(format)
}

fn state_word(status: &Status) -> &'static str {
    match status {
        Status { pool, .. } if pool.poisoned => "poisoned",
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

fn status(name: &Name, format: Format) -> Result<()> {
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
        ("volumes", pool.volumes.to_string()),
        ("snapshots", pool.snapshots.to_string()),
        ("reclaiming", pool.reclaiming.to_string()),
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

fn check(pool: &str, format: Format) -> Result<u8> {
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
fn known(pool: &str) -> Result<Option<PoolEntry>> {
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

pub(super) fn print_report(report: &CheckReport, format: Format) -> Result<()> {
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

fn destroy(name: &Name, dry_run: bool) -> Result<()> {
    let registry = Registry::from_env()?;
    let entry = registry.find(name)?;
    let runtime = Runtime::of(name)?;
    if dry_run {
        return would_destroy(&entry);
    }
    if client::is_served(name)? {
        // Refused while a device is attached; otherwise the daemon lets go.
        change(name, &Request::Stop)?;
    }
    let access = Access {
        write: true,
        lock_wait_ms: LOCK_WAIT_MS,
    };
    let file = PoolFile::open(&entry.path, access)?;
    let devices = Devices::load(&runtime, name, entry.id.clone(), state::boot_id()?)?;
    devices.refuse("destroy", devices.slots().iter())?;
    wipe(&entry, file)?;
    runtime.clear()?;
    registry.remove(name)
}

fn would_destroy(entry: &PoolEntry) -> Result<()> {
    let Status { pool, devices, .. } = status_of(entry)?;
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
    output::text(&text)
}

/// Overwrites both superblocks, if they are this pool's: another may live there by now.
fn wipe(entry: &PoolEntry, file: PoolFile) -> Result<()> {
    let blocks = file.blocks();
    let device = FileDevice::new(Arc::new(file));
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
