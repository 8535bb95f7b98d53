//! The kit of the suites that need udev: a udevd for one test, with the rules of a Debian release and ours.
//!
//! It runs in a tree of its own, `$BLOCKFORK_UDEV/RELEASE`, so that each release's udev finds its own libraries and rules,
//! and this machine's are left alone. The other suites run without udev.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::guest::{eventually, shell, try_shell};

/// Where udev's trees are.
const FOLDER: &str = "BLOCKFORK_UDEV";
/// The rules that a package will install.
const RULES: &str = include_str!("../../ctl/udev/60-blockfork.rules");
/// Where a test's rules are; read together with the release's, by name.
const RULES_FOLDER: &str = "/run/udev/rules.d";

/// A Debian release with a udev of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12: systemd 252, which does not know ublk's devices.
    Bookworm,
    /// Debian 13: systemd 257, which does.
    Trixie,
}

impl Release {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Trixie];
}

/// A running udevd. Dropping it ends it, and removes what it left in /dev and /run.
#[derive(Debug)]
pub struct Udev {
    root: PathBuf,
    daemon: Option<Child>,
}

impl Udev {
    /// A udevd with blockfork's rules; none, with a line that says so, where the tests were given no udev.
    #[track_caller]
    pub fn start(release: Release) -> Option<Self> {
        Self::with_rules(release, &[("60-blockfork.rules", RULES)])
    }

    /// The same with other rules: name and content of each file.
    #[track_caller]
    pub fn with_rules(release: Release, rules: &[(&str, &str)]) -> Option<Self> {
        let Some(folder) = std::env::var_os(FOLDER) else {
            println!("skipped: {FOLDER} does not say where udev is");
            return None;
        };
        assert!(
            !Path::new("/run/udev/control").exists(),
            "a udevd runs here already"
        );
        let name = match release {
            Release::Bookworm => "bookworm",
            Release::Trixie => "trixie",
        };
        let mut udev = Self {
            root: Path::new(&folder).join(name),
            daemon: None,
        };
        udev.prepare();
        fs::create_dir_all(RULES_FOLDER).expect("a folder for the rules");
        for (name, text) in rules {
            fs::write(Path::new(RULES_FOLDER).join(name), text).expect("the rules can be written");
        }
        let mut daemon = udev.command("/usr/lib/systemd/systemd-udevd");
        // It complains of groups and modes that the guest has no other use for.
        daemon.stdout(Stdio::null()).stderr(Stdio::null());
        udev.daemon = Some(daemon.spawn().expect("chroot starts"));
        eventually("udevd listens", || {
            try_shell("test -S /run/udev/control").status.success()
        });
        Some(udev)
    }

    /// Blockfork's rules, to start with others beside them.
    pub fn rules() -> (&'static str, &'static str) {
        ("60-blockfork.rules", RULES)
    }

    /// Waits until every event so far is handled.
    #[track_caller]
    pub fn settle(&self) {
        self.udevadm(&["settle", "--timeout=60"]);
    }

    /// Lets udev handle a device again, and waits for that.
    #[track_caller]
    pub fn trigger(&self, node: &str) {
        let device = format!("/sys/class/block/{}", node.trim_start_matches("/dev/"));
        self.udevadm(&["trigger", "--action=change", &device]);
        self.settle();
    }

    /// What udev knows of a device, a KEY=VALUE a line.
    #[track_caller]
    pub fn properties(&self, node: &str) -> String {
        self.settle();
        self.udevadm(&["info", "--query=property", &format!("--name={node}")])
    }

    #[track_caller]
    fn udevadm(&self, words: &[&str]) -> String {
        let output = self.command("/usr/bin/udevadm").args(words).output();
        let output = output.expect("chroot starts");
        assert!(
            output.status.success(),
            "udevadm {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(&self.root)
            .arg(program)
            // udevadm does nothing in a changed root otherwise.
            .env("SYSTEMD_IGNORE_CHROOT", "1")
            .stdin(Stdio::null());
        command
    }

    /// Makes the tree one to change root into.
    fn prepare(&self) {
        let root = self.root.display();
        shell(&format!(
            "cd {root} && mkdir -p etc && cp /etc/passwd /etc/group etc/"
        ));
        for folder in ["dev", "proc", "sys", "run"] {
            shell(&format!(
                "mkdir -p {root}/{folder} && mount --bind /{folder} {root}/{folder}"
            ));
        }
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            drop(daemon.kill());
            drop(daemon.wait());
        }
        let root = self.root.display();
        for folder in ["dev", "proc", "sys", "run"] {
            drop(try_shell(&format!(
                "umount {root}/{folder} || umount -l {root}/{folder}"
            )));
        }
        drop(try_shell("rm -rf /run/udev /dev/disk"));
    }
}

/// Where a link leads; none if it is not there.
pub fn link(path: &str) -> Option<String> {
    let to = fs::canonicalize(path).ok()?;
    Some(to.display().to_string())
}
