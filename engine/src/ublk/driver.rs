//! What this machine's kernel offers: the checks behind `doctor`.

use super::command::CONTROL_PATH;
use super::control::Ask;
use super::{params, sysfs};
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::path::Path;

/// Whether this machine can serve block devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Driver {
    /// The kernel's release.
    pub kernel_release: String,
    /// The driver's feature bits, where it could be asked.
    pub features: Option<u64>,
    /// The names of the features.
    pub feature_names: Vec<String>,
    /// The driver's limit for devices.
    pub devices_max: Option<u32>,
    /// Devices that exist, of all programs.
    pub devices: usize,
    /// What was checked, in the order in which to put it right.
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub fact: String,
    /// What to do, where it is not.
    pub way_out: Option<String>,
}

impl Driver {
    /// Whether nothing is amiss.
    pub fn is_able(&self) -> bool {
        self.checks.iter().all(|check| check.ok)
    }
}

/// Looks at the kernel, the driver and this process's rights. Asks the driver, within the time limit of its commands.
pub fn driver() -> Driver {
    let kernel_release = read("/proc/sys/kernel/osrelease");
    let asked = Ask::about(CONTROL_PATH, "GET_FEATURES").run(|commands| {
        let features = commands.features();
        features.map_err(super::control::cannot_control)
    });
    let features = asked.as_ref().ok().copied().flatten();
    let devices = sysfs::devices().len();
    let devices_max = sysfs::devices_max();
    let answer = match &asked {
        Ok(Some(_)) => Ok(String::from("answers")),
        Ok(None) => Ok(String::from("answers, but is too old to say what it can")),
        Err(error) => Err(error.to_string()),
    };
    Driver {
        checks: vec![
            kernel(&kernel_release),
            io_uring(),
            module(),
            control_file(),
            Check::answered(
                "ublk driver",
                answer,
                "see the lines above, and the kernel's log",
            ),
            recovery(features),
            capabilities(),
            room(devices, devices_max),
            open_files(),
        ],
        feature_names: features.map_or(Vec::new(), names),
        kernel_release,
        features,
        devices_max,
        devices,
    }
}

impl Check {
    fn new(name: &str, ok: bool, fact: impl Into<String>, way_out: &str) -> Self {
        Self {
            name: name.to_owned(),
            ok,
            fact: fact.into(),
            way_out: (!ok).then(|| way_out.to_owned()),
        }
    }

    fn answered(name: &str, fact: Result<String, String>, way_out: &str) -> Self {
        let ok = fact.is_ok();
        Self::new(name, ok, fact.unwrap_or_else(|e| e), way_out)
    }
}

/// The driver's features by bit.
const FEATURES: [&str; 20] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
];

/// The names of feature bits; a bit without a name by its number.
fn names(features: u64) -> Vec<String> {
    let name = |bit: usize| {
        FEATURES
            .get(bit)
            .map_or_else(|| format!("bit {bit}"), |name| (*name).to_owned())
    };
    (0..64)
        .filter(|bit| features >> bit & 1 == 1)
        .map(name)
        .collect()
}

fn kernel(release: &str) -> Check {
    let is_broken = ["6.18.4", "6.18.5"].iter().any(|broken| {
        let rest = release.strip_prefix(broken);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    let is_old = version(release).is_some_and(|version| version < (6, 0));
    let fact = match (is_broken, is_old) {
        (true, _) => format!("{release}, which crashes when a ublk device is added"),
        (_, true) => format!("{release}, which has no ublk"),
        (false, false) => release.to_owned(),
    };
    Check::new(
        "kernel",
        !is_broken && !is_old,
        fact,
        "boot another kernel: 6.12, or 6.18.6 or later",
    )
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn io_uring() -> Check {
    // Absent before 6.6, where io_uring could not be disabled.
    let (ok, fact) = match read("/proc/sys/kernel/io_uring_disabled").as_str() {
        "" | "0" => (true, "enabled"),
        "1" => (true, "enabled for root and one group"),
        _ => (false, "disabled"),
    };
    Check::new(
        "io_uring",
        ok,
        fact,
        "run `sysctl kernel.io_uring_disabled=0`",
    )
}

fn module() -> Check {
    let ok = Path::new("/sys/module/ublk_drv").exists() || Path::new(CONTROL_PATH).exists();
    let fact = if ok { "loaded" } else { "not loaded" };
    let way_out = "run `modprobe ublk_drv`; where there is no such module, install the kernel's package of further modules \
                   (Ubuntu: linux-modules-extra-$(uname -r)) or another kernel";
    Check::new("module ublk_drv", ok, fact, way_out)
}

fn control_file() -> Check {
    let opened = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
    let fact = opened
        .map(|_| String::from("can be opened"))
        .map_err(|e| e.to_string());
    Check::answered(
        CONTROL_PATH,
        fact,
        "run as root; in a container, pass the file and /dev/ublkb* in",
    )
}

fn recovery(features: Option<u64>) -> Check {
    let features = features.unwrap_or(0);
    let missing = params::WANTED.iter().filter(|(bit, _)| features & bit == 0);
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    let ok = features & params::RECOVERY == params::RECOVERY;
    let fact = match (ok, missing.as_slice()) {
        (true, []) => String::from("devices outlive their daemon and can be resized"),
        (true, missing) => format!(
            "devices outlive their daemon; missing: {}",
            missing.join(", ")
        ),
        (false, _) => String::from("devices do not outlive their daemon"),
    };
    Check::new(
        "features",
        ok,
        fact,
        "boot kernel 6.5 or later; devices work, but a killed daemon takes them along",
    )
}

/// Bits of `linux/capability.h` that serving needs, and what for.
const CAPABILITIES: [(u32, &str); 2] = [(21, "CAP_SYS_ADMIN"), (24, "CAP_SYS_RESOURCE")];

fn capabilities() -> Check {
    let status = read("/proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing = CAPABILITIES.iter().filter(|(bit, _)| held >> bit & 1 == 0);
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    let fact = if missing.is_empty() {
        String::from("sufficient")
    } else {
        format!("missing: {}", missing.join(", "))
    };
    Check::new(
        "rights",
        missing.is_empty(),
        fact,
        "run as root, outside of a user namespace",
    )
}

fn room(devices: usize, max: Option<u32>) -> Check {
    let is_room = max.is_none_or(|max| u32::try_from(devices).is_ok_and(|devices| devices < max));
    let fact = max.map_or(format!("{devices} in use"), |max| {
        format!("{devices} of {max} in use")
    });
    let way_out = format!("raise {}", sysfs::DEVICES_MAX_PATH);
    Check::new("ublk devices", is_room, fact, &way_out)
}

/// Descriptors that a daemon with many devices needs.
const OPEN_FILES_MIN: u64 = 1024;

fn open_files() -> Check {
    let limits = read("/proc/self/limits");
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line
        .and_then(|line| line.split_whitespace().next())
        .unwrap_or("unknown");
    let ok = soft
        .parse::<u64>()
        .map_or(true, |soft| soft >= OPEN_FILES_MIN);
    Check::new(
        "open files",
        ok,
        soft,
        "raise the limit: `ulimit -n 4096`, or LimitNOFILE= in a service",
    )
}

fn read(path: &str) -> String {
    fs::read_to_string(path).map_or(String::new(), |text| text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_crash_are_named() {
        assert!(!kernel("6.18.5-generic").ok);
        assert!(!kernel("5.15.0").ok);
        assert!(kernel("6.18.50").ok);
        assert!(kernel("7.2.13").ok);
    }

    #[test]
    fn features_have_names_as_far_as_they_are_known() {
        assert_eq!(names(0b11000), ["USER_RECOVERY", "USER_RECOVERY_REISSUE"]);
        assert_eq!(names(1 << 40), ["bit 40"]);
    }
}
