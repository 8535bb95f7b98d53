//! A shell session that others can read: each command is shown, run, and its output kept below it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::{env, fs};

use anyhow::{Context, Result, bail};

/// The PATH that finds the freshly built ublkctl.
static SEARCH_PATH: OnceLock<OsString> = OnceLock::new();

pub(super) fn set_path(path: OsString) {
    SEARCH_PATH.get_or_init(|| path);
}

#[derive(Debug)]
pub(super) struct Session {
    folder: PathBuf,
    /// Sockets, pid files and rings: on a tmpfs, as ublkctl's own default is.
    runtime: PathBuf,
    held: u32,
}

impl Session {
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let folder = folder
            .canonicalize()
            .with_context(|| format!("cannot find {}", folder.display()))?;
        let runtime = PathBuf::from(format!("/run/ublkctl-demo-{}", std::process::id()));
        fs::create_dir_all(&runtime)
            .with_context(|| format!("cannot make {}", runtime.display()))?;
        println!("$ cd {}", folder.display());
        println!(
            "$ export UBLKCTL_STATE_DIR=$PWD/state UBLKCTL_RUNTIME_DIR={}",
            runtime.display()
        );
        Ok(Self {
            folder,
            runtime,
            held: 0,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// How many checks have held so far.
    pub(super) fn held(&self) -> u32 {
        self.held
    }

    /// What comes next, for the reader.
    #[expect(clippy::unused_self, reason = "reads as part of the session")]
    pub(super) fn chapter(&self, text: &str) {
        println!("\n# {text}");
    }

    /// Runs a line; its failure ends the session. Returns what it wrote on stdout.
    pub(super) fn run(&self, line: &str) -> Result<String> {
        let (succeeded, output) = self.execute(line)?;
        if !succeeded {
            bail!("`{line}` failed");
        }
        Ok(output)
    }

    /// Runs a line that must be refused.
    pub(super) fn refused(&mut self, line: &str, claim: &str) -> Result<()> {
        let (succeeded, _) = self.execute(line)?;
        self.check(claim, !succeeded)
    }

    /// Runs a line whose success shows that a claim holds.
    pub(super) fn shows(&mut self, line: &str, claim: &str) -> Result<()> {
        let (succeeded, _) = self.execute(line)?;
        self.check(claim, succeeded)
    }

    /// Starts a line that runs beside the following ones.
    pub(super) fn start(&self, line: &str) -> Result<Background> {
        println!("$ {line} &");
        let child = self.shell(line).spawn().context("cannot start sh")?;
        Ok(Background {
            line: line.to_owned(),
            child,
        })
    }

    /// Notes whether a claim held; the first that did not ends the session.
    pub(super) fn check(&mut self, claim: &str, holds: bool) -> Result<()> {
        if !holds {
            bail!("it does not hold that {claim}");
        }
        println!("  ok: {claim}");
        self.held += 1;
        Ok(())
    }

    /// Leaves nothing behind, however far the steps came.
    pub(super) fn clean_up(&self) {
        let lines = "for place in copy snap mnt; do mountpoint -q $place && umount $place; done
            ublkctl list demo -H -o device 2>/dev/null | while read device; do
                case $device in /dev/*) ublkctl detach $device ;; esac
            done
            pid=$(cat $UBLKCTL_RUNTIME_DIR/demo.pid 2>/dev/null) && kill $pid && sleep 1
            true";
        let mut shell = self.shell(lines);
        shell.stdout(Stdio::null()).stderr(Stdio::null());
        if let Err(error) = shell.status() {
            eprintln!("x: cannot clean up: {error}");
        }
        for folder in [&self.folder, &self.runtime] {
            if let Err(error) = fs::remove_dir_all(folder) {
                eprintln!("x: cannot remove {}: {error}", folder.display());
            }
        }
    }

    fn execute(&self, line: &str) -> Result<(bool, String)> {
        println!("$ {line}");
        let mut shell = self.shell(line);
        // One pipe for both, so that the reader sees them in order; stdout alone goes through a file.
        let answer = self.folder.join(".answer");
        let file = fs::File::create(&answer).context("cannot write the answer")?;
        let errors = self.folder.join(".errors");
        let errors_file = fs::File::create(&errors).context("cannot write the errors")?;
        let status = shell
            .stdout(file)
            .stderr(errors_file)
            .status()
            .context("cannot start sh")?;
        let output = fs::read_to_string(&answer).context("cannot read the answer")?;
        let complaints = fs::read_to_string(&errors).context("cannot read the errors")?;
        for line in output.lines().chain(complaints.lines()) {
            println!("  {line}");
        }
        Ok((status.success(), output.trim().to_owned()))
    }

    fn shell(&self, line: &str) -> Command {
        let mut shell = Command::new("/bin/sh");
        shell
            .arg("-c")
            .arg(line)
            .current_dir(&self.folder)
            .stdin(Stdio::null());
        shell.env("UBLKCTL_STATE_DIR", self.folder.join("state"));
        shell.env("UBLKCTL_RUNTIME_DIR", &self.runtime);
        // mkfs and its kin live where not everybody's PATH leads.
        let mut path = SEARCH_PATH
            .get()
            .cloned()
            .or_else(|| env::var_os("PATH"))
            .unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        shell.env("PATH", path);
        shell
    }
}

/// A command that runs beside the session.
#[derive(Debug)]
pub(super) struct Background {
    line: String,
    child: Child,
}

impl Background {
    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub(super) fn succeeds(mut self) -> Result<bool> {
        println!("$ wait");
        let status = self
            .child
            .wait()
            .with_context(|| format!("cannot wait for {}", self.line))?;
        Ok(status.success())
    }
}
