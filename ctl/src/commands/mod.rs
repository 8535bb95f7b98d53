//! One file for each kind of thing that commands are about. A command checks what was typed, asks the pool, and prints.

mod device;
mod doctor;
mod list;
mod nbd;
mod pool;
mod prune;
mod repair;
mod set;
mod shell;
mod stats;
mod trial;
mod volume;
mod watch;

use crate::claim;
use crate::cli::{Command, PathTarget};
use crate::client;
use crate::daemon;
use crate::exit_code::OK;
use crate::output;
use crate::progress::Bar;
use crate::protocol::{Reply, Request};
use crate::quiesce;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};

/// Runs a command; its exit code.
pub(crate) fn run(command: Command) -> Result<u8> {
    match command {
        Command::Pool { command } => return pool::run(command),
        Command::Create(options) => volume::create(&options),
        Command::Set(options) => set::set(&options),
        Command::Resize(options) => volume::resize(&options),
        Command::Rename { from, to } => volume::rename(&from, &to),
        Command::Rm(options) => volume::remove(&options),
        Command::Snapshot(options) => volume::snapshot(&options),
        Command::Clone { snapshot, volume } => volume::clone(&snapshot, &volume),
        Command::Rollback { snapshot } => volume::rollback(&snapshot),
        Command::Hold(options) => volume::hold(&options),
        Command::Release(options) => volume::release(&options),
        Command::Prune(options) => prune::prune(&options),
        Command::Tree(options) => list::tree(&options),
        Command::Attach(options) => device::attach(&options),
        Command::ServeNbd(options) => nbd::serve(&options),
        Command::Detach(options) => device::detach(&options),
        Command::Recover { pool } => return device::recover(&pool),
        Command::List(options) => return list::list(&options),
        Command::Diff(options) => list::diff(&options),
        Command::Stats(options) => return stats::stats(&options),
        Command::Serve {
            pool,
            detached,
            metadata_cache,
        } => daemon::serve(&pool, detached, metadata_cache),
        Command::Watch { pool, json: _ } => watch::watch(&pool),
        Command::Guard => quiesce::guard(),
        Command::Doctor { format } => return doctor::doctor(format),
        Command::Completions { shell } => shell::completions(shell),
        Command::ClaimDevice { dev_id } => claim::serve(dev_id),
        Command::Man { directory } => shell::man(&directory),
    }
    .map(|()| OK)
}

/// Asks a pool, with a progress bar for what takes long.
fn ask(pool: &Name, request: &Request, what: &'static str) -> Result<Reply> {
    let bar = Bar::new(what);
    client::call(pool, request, &mut |done, total| bar.show(done, total))
}

/// Asks a pool for a change that has nothing to tell.
fn change(pool: &Name, request: &Request) -> Result<()> {
    let Reply::Done = ask(pool, request, "working")? else {
        return Err(unexpected());
    };
    Ok(())
}

/// Tells that something is served for reading although it was not asked for so: a pool that can only be read.
fn warn_read_only(pool: &Name, path: &VolumePath) {
    output::say(&format!(
        "{pool}/{path}: read-only, because the pool is damaged and cannot be written to; see `ublkctl pool check {pool}`"
    ));
}

/// The error of an answer to another question.
fn unexpected() -> Error {
    Error::with(
        ErrorKind::Unsupported,
        "the daemon answered something else than it was asked; is it of another version?",
    )
}

/// The one pool of several targets, and their paths.
fn one_pool(targets: &[PathTarget]) -> Result<(&Name, Vec<VolumePath>)> {
    let Some(first) = targets.first() else {
        return Err(Error::with(ErrorKind::Invalid, "no target was named"));
    };
    if let Some(other) = targets.iter().find(|target| target.pool != first.pool) {
        return Err(Error::with(
            ErrorKind::Invalid,
            format!(
                "{}/{} and {}/{} are in two pools; name those of one pool at a time",
                first.pool, first.path, other.pool, other.path
            ),
        ));
    }
    Ok((
        &first.pool,
        targets.iter().map(|target| target.path.clone()).collect(),
    ))
}
