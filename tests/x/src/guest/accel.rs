//! How qemu runs the guest's instructions: KVM where that works, otherwise in software.
//!
//! `/dev/kvm` may exist and still not run a stock kernel, so one boot is tried and its result remembered.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Go, Job, Kernel};
use crate::paths;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accel {
    Kvm,
    Software,
    /// In software, with a clock that counts instructions.
    Instructions,
}

impl Accel {
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm"],
            Self::Software => &["-accel", "tcg,thread=multi"],
            Self::Instructions => &[
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=1,sleep=off",
            ],
        }
    }
}

/// The fastest way that boots here.
pub(super) fn best() -> Result<Accel> {
    let remembered = paths::guest_cache().join("accel");
    if let Ok(word) = fs::read_to_string(&remembered) {
        return Ok(if word.trim() == "kvm" {
            Accel::Kvm
        } else {
            Accel::Software
        });
    }
    let accel = if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
        && kvm_boots()
    {
        Accel::Kvm
    } else {
        Accel::Software
    };
    let word = if accel == Accel::Kvm {
        "kvm\n"
    } else {
        "tcg\n"
    };
    fs::create_dir_all(paths::guest_cache()).context("cannot make the guest's folder")?;
    fs::write(&remembered, word)
        .with_context(|| format!("cannot write {}", remembered.display()))?;
    Ok(accel)
}

fn kvm_boots() -> bool {
    eprintln!("x: trying whether /dev/kvm runs the guest (once)");
    let mut job = Job::new(Kernel::New, "true", Duration::from_secs(20));
    job.silent = true;
    let works = job
        .run_with(Accel::Kvm, &mut |_| Go::On)
        .is_ok_and(|outcome| outcome.status == 0);
    eprintln!(
        "x: {}",
        if works {
            "it does"
        } else {
            "it does not: the guest runs in software emulation"
        }
    );
    works
}
