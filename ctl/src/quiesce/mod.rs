//! Flushes, and freezes, what this machine's programs have written to attached volumes, before a command looks at a
//! volume's content.
//!
//! A write to `/dev/ublkbN` without `O_DIRECT`, and every write to a file system on it, stays in this machine's page cache for
//! a while, where the daemon cannot see it. The command flushes, never the daemon: a flush waits for the daemon's answer.
//!
//! The work is done by a process of its own, the guard. A flush can hang in the kernel, and then this command still ends.
//! And if this command is killed while file systems are frozen, the guard thaws them.
//!
//! *Invariant:* between the first freeze and the last thaw this command and the guard write to no file, because that could
//! be on a frozen file system.

mod guard;
mod guarded;
mod kernel;
mod messages;
mod plan;

pub(crate) use guard::run as guard;

use crate::client;
use crate::output;
use crate::protocol::{DeviceRow, Reply, Request};
use crate::state::Registry;
use crate::state::Runtime;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::Name;
use blockfork::ublk::Stack;
use guarded::Guarded;
use plan::Plan;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The attached volumes that a command is about.
#[derive(Debug)]
pub(crate) struct Targets<'a> {
    pool: &'a Name,
    volumes: BTreeSet<Name>,
    /// Those of them whose devices take writes.
    attached: Vec<(Name, u32)>,
}

impl<'a> Targets<'a> {
    /// Picks the devices of these volumes out of the pool's. Refuses if a device waits for a daemon: a flush would wait too.
    pub(crate) fn new(
        pool: &'a Name,
        volumes: BTreeSet<Name>,
        devices: &[DeviceRow],
    ) -> Result<Self> {
        let mut attached = Vec::new();
        for row in devices {
            let is_meant = row.path.snapshot.is_none() && volumes.contains(&row.path.volume);
            if !is_meant || row.read_only {
                continue;
            }
            if !row.served {
                return Err(waiting(pool, row));
            }
            attached.push((row.path.volume.clone(), number(row)?));
        }
        Ok(Self {
            pool,
            volumes,
            attached,
        })
    }

    /// Writes back everything that this machine has cached for the volumes. Returns when their daemon has it.
    pub(crate) fn flush(&self) -> Result<()> {
        if self.attached.is_empty() {
            return Ok(());
        }
        let plan = Plan::of(&self.stack()?)?;
        let notes = plan.notes();
        Guarded::start(self.pool, plan, None)?.ready()?;
        for note in &notes {
            output::say(note);
        }
        Ok(())
    }

    /// Flushes, freezes every file system on the volumes, does `action` and thaws them. An error if they were not frozen
    /// for all of `action`, and then that may have been done.
    pub(crate) fn freeze(&self, seconds: u32, action: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.attached.is_empty() {
            action()?;
            self.say_unfrozen()?;
            return Ok(());
        }
        let stack = self.stack()?;
        let plan = Plan::of(&stack)?;
        plan.refuse_unfreezable()?;
        self.refuse_needed(&stack)?;
        let mut guarded = Guarded::start(self.pool, plan, Some(seconds))?;
        guarded.ready()?;
        let done = action();
        let thawed = guarded.thaw();
        match (done, thawed) {
            (Ok(()), Ok(())) => self.say_unfrozen(),
            (Ok(()), Err(e)) => Err(Error::with(
                e.kind(),
                format!(
                    "{}; the snapshot was taken, but is not one of frozen file systems",
                    crate::exit_code::one_line(&e)
                ),
            )),
            (Err(e), Ok(())) => Err(e),
            (Err(e), Err(thawed)) => {
                output::say(&crate::exit_code::one_line(&thawed));
                Err(e)
            }
        }
    }

    fn stack(&self) -> Result<Stack> {
        let dev_ids: Vec<u32> = self.attached.iter().map(|(_, dev_id)| *dev_id).collect();
        Stack::above(&dev_ids)
    }

    /// Refuses if taking the snapshot would write to a file system that is to be frozen: it would wait for the thaw.
    fn refuse_needed(&self, stack: &Stack) -> Result<()> {
        let runtime = Runtime::of(self.pool)?;
        let mut needed = vec![
            ("its pool", Registry::from_env()?.find(self.pool)?.path),
            ("the daemon's runtime directory", runtime.socket()),
        ];
        if let Reply::Status(status) = client::call(self.pool, &Request::Status, &mut |_, _| {})?
            && let Some(pid) = status.daemon_pid
        {
            for descriptor in 1..=2 {
                let output = PathBuf::from(format!("/proc/{pid}/fd/{descriptor}"));
                if output.exists() {
                    needed.push(("the daemon's log", output));
                }
            }
        }
        for (what, path) in needed {
            if let Some(carrier) = stack.carrier_of(&path)? {
                let volumes: Vec<String> = self.volumes.iter().map(ToString::to_string).collect();
                return Err(Error::with(
                    ErrorKind::Busy,
                    format!(
                        "{}/{}: {carrier} cannot be frozen, because {what} is on it and has to be written to meanwhile; take the snapshot without --freeze",
                        self.pool,
                        volumes.join(", ")
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Says for which volumes a freeze was only a flush.
    fn say_unfrozen(&self) -> Result<()> {
        for volume in &self.volumes {
            let attached = self.attached.iter().find(|(name, _)| name == volume);
            let has_file_system = match attached {
                Some((_, dev_id)) => {
                    let stack = Stack::above(&[*dev_id])?;
                    stack
                        .layers()
                        .iter()
                        .any(|layer| !layer.file_systems.is_empty())
                }
                None => false,
            };
            if !has_file_system {
                output::say(&format!(
                    "{}/{volume}: no file system on it is mounted on this machine, so there was nothing to freeze",
                    self.pool
                ));
            }
        }
        Ok(())
    }
}

fn waiting(pool: &Name, row: &DeviceRow) -> Error {
    let fact = match &row.fault {
        Some(fault) => format!("is not served: {fault}"),
        None => String::from("waits for a daemon"),
    };
    Error::with(
        ErrorKind::Busy,
        format!(
            "{pool}/{}: {} {fact}, so what programs have written to it cannot be flushed; bring it back with `ublkctl recover {pool}`, or use --no-sync to go without",
            row.path, row.device
        ),
    )
}

/// The number in `/dev/ublkbN`.
fn number(row: &DeviceRow) -> Result<u32> {
    let number = row.device.strip_prefix("/dev/ublkb");
    number
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| Error::corrupt(format!("{}: not a device's path", row.device)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockfork::units::VolumeId;

    fn row(path: &str, served: bool, read_only: bool) -> DeviceRow {
        DeviceRow {
            path: path.parse().unwrap(),
            id: VolumeId(1),
            device: String::from("/dev/ublkb3"),
            read_only,
            served,
            fault: None,
        }
    }

    #[test]
    fn only_what_takes_writes_is_flushed() {
        let pool: Name = "p0".parse().unwrap();
        let volumes = || BTreeSet::from(["v".parse().unwrap()]);
        let rows = [
            row("v", true, false),
            row("v@s", true, true),
            row("w", false, false),
        ];
        let targets = Targets::new(&pool, volumes(), &rows).unwrap();
        assert_eq!(targets.attached, [("v".parse().unwrap(), 3)]);
        let targets = Targets::new(&pool, volumes(), &[row("v", false, true)]).unwrap();
        assert!(targets.attached.is_empty());
    }

    #[test]
    fn a_device_without_its_daemon_is_refused_with_both_ways_out() {
        let pool: Name = "p0".parse().unwrap();
        let volumes = BTreeSet::from(["v".parse().unwrap()]);
        let error = Targets::new(&pool, volumes, &[row("v", false, false)]).unwrap_err();
        let said = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            said.contains("`ublkctl recover p0`") && said.contains("--no-sync"),
            "{said}"
        );
    }
}
