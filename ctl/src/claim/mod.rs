//! Devices for oneself, before they are taken away or rolled back: nobody may have them mounted, open or mapped.
//!
//! Programs that have a device open only for a moment are waited for: udev looks at a device after each change.

mod process;

pub(crate) use process::{Claim, await_partitions, serve};

use blockfork::clock::{Clock, SystemClock};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::ublk::Holder;
use process::Taken;
use std::fs;
use std::thread;
use std::time::Duration;
use tracing::debug;

/// How long brief users are waited for.
const PATIENCE_NS: u64 = 5_000_000_000;
const POLL: Duration = Duration::from_millis(50);

/// The time for which a command waits for brief users, however often it tries.
#[derive(Debug, Default)]
pub(crate) struct Patience(SystemClock);

impl Patience {
    /// Whether nobody is waited for any more.
    pub(crate) fn is_over(&self) -> bool {
        self.0.monotonic_ns() >= PATIENCE_NS
    }
}

/// A device that shall be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    /// What it is called in a refusal: `POOL/VOLUME`.
    pub(crate) name: String,
    /// The N of `/dev/ublkbN`.
    pub(crate) dev_id: u32,
}

/// Claims all of these devices, or none and an error that names whoever has one. Waits for brief users, so the caller
/// should hold no lock. A device that does not exist has no claim.
pub(crate) fn claim(
    subjects: &[Subject],
    action: &str,
    patience: &Patience,
) -> Result<Vec<Option<Claim>>> {
    loop {
        // Asked before the look, so that the last look comes after the time is up.
        let is_over = patience.is_over();
        let held = match claim_once(subjects)? {
            Ok(claims) => return Ok(claims),
            Err(held) => held,
        };
        let are_brief = held
            .iter()
            .all(|(_, holders)| holders.iter().all(Holder::may_be_brief));
        if is_over || !are_brief {
            return Err(refusal(&held, action));
        }
        thread::sleep(POLL);
    }
}

/// Devices of others, with who has them.
type Held<'a> = Vec<(&'a Subject, Vec<Holder>)>;

fn claim_once(subjects: &[Subject]) -> Result<std::result::Result<Vec<Option<Claim>>, Held<'_>>> {
    let mut claims = Vec::new();
    let mut held = Vec::new();
    for subject in subjects {
        match Claim::take(subject.dev_id)? {
            Taken::Claim(claim) => claims.push(Some(claim)),
            Taken::Gone => claims.push(None),
            Taken::Held(holders) => held.push((subject, holders)),
        }
    }
    if held.is_empty() {
        return Ok(Ok(claims));
    }
    // Not by dropping them: whoever hears the refusal may mount the devices at once.
    for claim in claims.into_iter().flatten() {
        if let Err(e) = claim.release() {
            debug!("a claim is given back late: {e}");
        }
    }
    Ok(Err(held))
}

/// Makes sure that nobody has a claimed device, and that nobody gets it until the claim is unsealed or given back. An
/// error of kind `Busy` names whoever came since the claim: then all begins anew.
pub(crate) fn seal(claim: &mut Claim, subject: &Subject, action: &str) -> Result<()> {
    let holders = claim.seal_unless_held()?;
    if holders.is_empty() {
        return Ok(());
    }
    Err(refusal(&[(subject, holders)], action))
}

fn refusal(held: &[(&Subject, Vec<Holder>)], action: &str) -> Error {
    let named = held.iter().map(|(subject, holders)| {
        let holders: Vec<String> = holders.iter().map(said_of).collect();
        format!(
            "{}: /dev/ublkb{} is {}",
            subject.name,
            subject.dev_id,
            holders.join(", ")
        )
    });
    let named: Vec<String> = named.collect();
    Error::with(
        ErrorKind::Busy,
        format!(
            "{}; cannot {action} it, unmount or close it first",
            named.join("; ")
        ),
    )
}

/// Who holds a device. Who sees its mount is worth saying only where that is not the machine's own mount namespace,
/// where everybody looks first.
fn said_of(holder: &Holder) -> String {
    let mounts_of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    match holder {
        Holder::Mount {
            at,
            seen_by: Some(process),
        } if mounts_of(process.pid) == mounts_of(1) => format!("mounted on {at}"),
        Holder::Mount { .. }
        | Holder::Swap
        | Holder::Device { .. }
        | Holder::Process(_)
        | Holder::Mapping(_)
        | Holder::File(_)
        | Holder::Hidden
        | Holder::Unseen(_) => holder.to_string(),
    }
}
