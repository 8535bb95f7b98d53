//! A workload in which one call to the device fails, or all from one on; and what must hold then.

use crate::crash::recover;
use crate::oracle::{Crash, Span};
use crate::script::{Script, Step};
use crate::sim_device::{Fault, FaultKind, Loss, SimDevice};
use crate::witness::{self, Witness};
use blockfork::error::ErrorKind;
use blockfork::pool::RingPlace;
use fastrand::Rng;
use futures_lite::future::block_on;

/// Every way in which calls fail.
pub const KINDS: [FaultKind; 4] = [
    FaultKind::Io,
    FaultKind::NoSpace,
    FaultKind::Short,
    FaultKind::Interrupted,
];

/// Calls to the device that the script makes when none fails, after its prologue.
pub fn calls(script: &Script, seed: u64) -> std::ops::Range<u64> {
    let witness = Witness::new(script, RingPlace::Nowhere);
    let before = witness.device().operations();
    witness.run(&script.phases, &mut Rng::with_seed(seed), || false);
    before..witness.device().operations()
}

/// Errors that a fault may give a client.
fn is_expected(kind: FaultKind, error: ErrorKind) -> bool {
    match error {
        // Small volumes and small pools are full now and then, without any fault.
        ErrorKind::OutOfSpace => true,
        // What came after a failed commit.
        ErrorKind::Poisoned => matches!(
            kind,
            FaultKind::Io | FaultKind::NoSpace | FaultKind::Interrupted
        ),
        ErrorKind::Io => matches!(kind, FaultKind::Io | FaultKind::Interrupted),
        ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::Busy
        | ErrorKind::Invalid
        | ErrorKind::Corrupt
        | ErrorKind::Unsupported
        | ErrorKind::ReadOnly
        | ErrorKind::Permission
        | ErrorKind::OverQuota => false,
    }
}

/// Runs the script with the fault, then without it, then through a power cut.
///
/// # Errors
///
/// What does not hold.
pub fn run(script: &Script, seed: u64, fault: Fault) -> Result<(), String> {
    let witness = Witness::new(script, RingPlace::Nowhere);
    let device = witness.device().clone();
    let mut rng = Rng::with_seed(seed);
    device.fail(fault);
    witness.run(&script.phases, &mut rng, || false);
    device.heal();
    let errors = witness.errors();
    if let Some(error) = errors
        .iter()
        .find(|error| !is_expected(fault.kind, **error))
    {
        return Err(format!("a client got {error:?}"));
    }
    let is_absorbed = match fault.kind {
        FaultKind::Short => true,
        FaultKind::Interrupted => !fault.is_sticky,
        FaultKind::Io | FaultKind::NoSpace => false,
    };
    if is_absorbed && errors.iter().any(|error| *error != ErrorKind::OutOfSpace) {
        return Err(format!(
            "what is to be tried again was an error: {errors:?}"
        ));
    }
    // The fault is gone: a pool that stopped itself is opened again, any other goes on.
    let is_stopped =
        errors.contains(&ErrorKind::Poisoned) || block_on(witness.pool().flush(&device)).is_err();
    let (oracle, touched) = if is_stopped {
        let oracle = witness.into_oracle();
        let touched = oracle.touched();
        (oracle, touched)
    } else {
        let begun = device.tick();
        block_on(witness.pool().flush(&device)).map_err(|e| format!("a flush afterwards: {e}"))?;
        let pool = witness.pool().clone();
        let mut oracle = witness.into_oracle();
        let touched = oracle.touched();
        let now = device.tick();
        let found = witness::find(&device, &pool, &touched).map_err(|e| e.to_string())?;
        // Nobody died: all that was acknowledged is there.
        let judged = oracle.judge(&found, now, Crash::Process);
        judged.map_err(|reason| format!("while it goes on: {reason}"))?;
        oracle.flushed(Span {
            begun,
            ended: now,
            is_certain: true,
        });
        (oracle, touched)
    };
    let loss = [Loss::All, Loss::None, Loss::Some][rng.usize(..3)];
    device.restart(loss, &mut rng);
    let found = recover(&device, &touched)?;
    let judged = oracle.judge(&found, device.tick(), Crash::Power);
    judged.map_err(|reason| format!("after a power cut with loss {loss:?}: {reason}"))?;
    is_usable(&device)
}

/// A pool on which the fault is gone takes new volumes, writes and snapshots, or says that it is full.
fn is_usable(device: &SimDevice) -> Result<(), String> {
    let pool = witness::open(device, RingPlace::Nowhere).map_err(|e| e.to_string())?;
    let full = |error: &blockfork::error::Error| error.kind() == ErrorKind::OutOfSpace;
    let script = Script {
        name: "usable",
        device_blocks: device.blocks(),
        prologue: Vec::new(),
        phases: vec![vec![vec![
            Step::Create("new".to_owned(), 64, false),
            Step::Write("new".to_owned(), 0, 4),
            Step::Snapshot(vec!["new".to_owned()], "s".to_owned()),
            Step::Write("new".to_owned(), 1, 1),
            Step::Flush("new".to_owned()),
        ]]],
    };
    let witness = Witness::on(device.clone(), pool);
    witness.run(&script.phases, &mut Rng::with_seed(1), || false);
    let is_full = |kind: &ErrorKind| *kind == ErrorKind::OutOfSpace;
    if !witness.errors().iter().all(is_full) {
        return Err(format!("not usable afterwards: {:?}", witness.errors()));
    }
    block_on(witness.pool().checkpoint(device))
        .or_else(|error| if full(&error) { Ok(()) } else { Err(error) })
        .map_err(|error| format!("a checkpoint afterwards: {error}"))
}
