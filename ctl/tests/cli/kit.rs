//! A machine of its own for a test: directories that go with it, and the real binary.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "they are a test's assertions"
)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

/// Bytes in a test's pool.
pub(crate) const POOL_BYTES: u64 = 64 << 20;

/// State, runtime files and pools of a test.
pub(crate) struct Machine {
    folder: tempfile::TempDir,
}

/// What a command answered.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Machine {
    /// A machine without pools.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a directory for the test");
        Self { folder }
    }

    /// A machine with the pool `p0`.
    pub(crate) fn with_pool() -> Self {
        let machine = Self::new();
        machine.ok(&[
            "pool",
            "create",
            "p0",
            &machine.pool_path(),
            "--size",
            "64M",
        ]);
        machine
    }

    /// A path on the machine.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where `p0` lives.
    pub(crate) fn pool_path(&self) -> String {
        self.path("p0.pool").display().to_string()
    }

    /// The bytes of `p0`.
    pub(crate) fn pool_bytes(&self) -> Vec<u8> {
        fs::read(self.pool_path()).expect("the pool's file")
    }

    /// The command with its environment.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublkctl"));
        command.args(words).stdin(Stdio::null());
        command.env("UBLKCTL_STATE_DIR", self.path("state"));
        command.env("UBLKCTL_RUNTIME_DIR", self.path("run"));
        command
    }

    /// The command as a shell starts it after `setup`, which changes what the command inherits.
    pub(crate) fn command_after(&self, setup: &str, words: &[&str]) -> Command {
        let command = self.command(words);
        let mut shell = Command::new("/bin/sh");
        let line = format!("{setup}; exec \"$@\"");
        shell.args(["-c", &line, "sh"]).arg(command.get_program());
        shell.args(command.get_args()).stdin(Stdio::null());
        for (variable, value) in command.get_envs() {
            shell.env(variable, value.unwrap_or_default());
        }
        shell
    }

    /// Runs a command.
    pub(crate) fn run(&self, words: &[&str]) -> Said {
        said(&self.command(words).output().expect("ublkctl starts"))
    }

    /// Runs a command that must succeed; its stdout.
    #[track_caller]
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let said = self.run(words);
        assert_eq!(said.code, 0, "ublkctl {}: {}", words.join(" "), said.stderr);
        said.stdout
    }

    /// Runs a command that must succeed; its stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self, words: &[&str]) -> serde_json::Value {
        let text = self.ok(words);
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("ublkctl {}: {e}: {text}", words.join(" ")))
    }

    /// Runs a command that must fail with this code and one line on stderr, which is returned.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str]) -> String {
        one_line(&self.run(words), code, words)
    }

    /// What [`Machine::refused`] does, and `p0` is byte for byte what it was.
    #[track_caller]
    pub(crate) fn refused_untouched(&self, code: i32, words: &[&str]) -> String {
        let before = self.pool_bytes();
        let line = self.refused(code, words);
        assert!(
            before == self.pool_bytes(),
            "ublkctl {} changed the pool",
            words.join(" ")
        );
        line
    }

    /// The names in `list`, one a line.
    #[track_caller]
    pub(crate) fn names(&self) -> Vec<String> {
        let text = self.ok(&["list", "-H", "-o", "name", "p0"]);
        text.lines().map(str::to_owned).collect()
    }

    /// Starts `serve p0` in the foreground and waits until it answers.
    #[track_caller]
    pub(crate) fn serve(&self) -> Daemon {
        self.serve_pool("p0")
    }

    /// Starts `serve` of a pool in the foreground and waits until it answers.
    #[track_caller]
    pub(crate) fn serve_pool(&self, pool: &str) -> Daemon {
        self.serve_with(pool, &[])
    }

    /// The same, with options.
    #[track_caller]
    pub(crate) fn serve_with(&self, pool: &str, options: &[&str]) -> Daemon {
        let mut command = self.command(&["serve", pool]);
        command.args(options);
        self.serve_by(pool, command)
    }

    /// Starts a daemon with this command and waits until it answers.
    #[track_caller]
    pub(crate) fn serve_by(&self, pool: &str, command: Command) -> Daemon {
        let log = fs::File::create(self.path("serve.log")).expect("a log");
        self.serve_logging(pool, command, log)
    }

    /// The same, with its log elsewhere.
    #[track_caller]
    pub(crate) fn serve_logging(&self, pool: &str, mut command: Command, log: fs::File) -> Daemon {
        let child = command
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("ublkctl starts");
        let daemon = Daemon { child };
        for _ in 0..500 {
            // A killed daemon's socket is still there, but nobody listens behind it.
            if UnixStream::connect(self.path(&format!("run/{pool}.sock"))).is_ok() {
                return daemon;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!(
            "no daemon: {}",
            fs::read_to_string(self.path("serve.log")).expect("the log")
        );
    }

    /// Waits until a pool's daemon, which ends with what it served, is gone.
    #[track_caller]
    pub(crate) fn is_left_alone(&self, pool: &str) {
        let socket = self.path(&format!("run/{pool}.sock"));
        for _ in 0..500 {
            if UnixStream::connect(&socket).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("{pool} is still served");
    }

    /// The daemon's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/p0.sock")
    }
}

/// A daemon that dies with its test.
pub(crate) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it as `kill` does; its exit code.
    #[track_caller]
    pub(crate) fn terminate(mut self) -> Option<i32> {
        let pid = self.pid().to_string();
        assert!(
            Command::new("kill")
                .arg(pid)
                .status()
                .expect("kill starts")
                .success()
        );
        self.child.wait().expect("the daemon ends").code()
    }

    /// Ends it as `kill -9` does.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("the daemon ends");
    }

    /// Waits until it ends by itself.
    pub(crate) fn ends(mut self) -> Option<i32> {
        self.child.wait().expect("the daemon ends").code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().expect("the daemon can be killed");
            self.child.wait().expect("the daemon ends");
        }
    }
}

/// What a process answered.
pub(crate) fn said(output: &Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The one line of a refusal.
#[track_caller]
pub(crate) fn one_line(said: &Said, code: i32, words: &[&str]) -> String {
    let words = words.join(" ");
    assert_eq!(said.code, code, "ublkctl {words}: {said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "ublkctl {words}: {said:?}");
    assert!(
        said.stderr.starts_with("ublkctl: ") && said.stderr.ends_with('\n'),
        "{said:?}"
    );
    assert_eq!(said.stdout, "", "ublkctl {words}");
    said.stderr.trim_end().to_owned()
}

/// Bytes in a superblock.
const SUPERBLOCK_BYTES: usize = 4096;
/// Where a superblock's two copies are.
pub(crate) const SUPERBLOCKS: [usize; 2] = [0, 8 * 4096];

/// Writes `value` at `at` in both superblocks, under a checksum that is right.
pub(crate) fn restate(path: &Path, at: usize, value: &[u8]) {
    let mut bytes = fs::read(path).expect("the file");
    for copy in SUPERBLOCKS {
        let block = &mut bytes[copy..copy + SUPERBLOCK_BYTES];
        block[at..at + value.len()].copy_from_slice(value);
        block[12..16].fill(0);
        let crc = crc32fast::hash(block);
        block[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(path, bytes).expect("the file");
}

/// Flips bits in a file.
pub(crate) fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("the file");
    bytes[at] ^= 0x10;
    fs::write(path, bytes).expect("the file");
}

/// Gives a changed page of metadata a checksum that is right.
pub(crate) fn reseal(page: &mut [u8]) {
    page[4..8].fill(0);
    let crc = crc32fast::hash(page);
    page[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Where the younger of two slots of the count tree begins.
fn younger(bytes: &[u8], slots: [u64; 2]) -> usize {
    let at = slots.map(|block| usize::try_from(block * 4096).expect("a small pool"));
    let generation = |at: usize| match &bytes[at..at + 4] {
        b"BFpg" => u64::from_le_bytes(bytes[at + 32..at + 40].try_into().expect("8 bytes")),
        _ => 0,
    };
    *at.iter()
        .max_by_key(|at| generation(**at))
        .expect("two slots")
}

/// Changes the count of a block of a closed pool, and what the index says of it; the count it has then.
#[track_caller]
pub(crate) fn recount(machine: &Machine, block: u64, by: i16) -> u16 {
    const REGION_BLOCKS: u64 = 1984;
    let mut bytes = machine.pool_bytes();
    let (region, offset) = (block / REGION_BLOCKS, block % REGION_BLOCKS);
    let page = younger(&bytes, [16 + region * 4, 16 + region * 4 + 2]);
    let at = page + 64 + 2 * usize::try_from(offset).expect("a region");
    let before = u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    let count = before.checked_add_signed(by).expect("a count");
    bytes[at..at + 2].copy_from_slice(&count.to_le_bytes());
    reseal(&mut bytes[page..page + 4096]);
    let index = younger(&bytes, [1024, 1025]);
    let at = index + 64 + 16 * usize::try_from(region).expect("a region") + 8;
    let free = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let free = free + u64::from(count == 0) - u64::from(before == 0);
    bytes[at..at + 8].copy_from_slice(&free.to_le_bytes());
    reseal(&mut bytes[index..index + 4096]);
    fs::write(machine.pool_path(), bytes).expect("the pool");
    count
}

/// Bytes of a slot of the catalog.
const SLOT_BYTES: usize = 256;

/// Changes the occupied slots of a closed pool's catalog, which is one page; how many there are.
#[track_caller]
pub(crate) fn restate_slots(machine: &Machine, mut change: impl FnMut(&mut [u8])) -> usize {
    let mut bytes = machine.pool_bytes();
    let is_catalog = |at: &usize| bytes[*at..at + 4] == *b"BFpg" && bytes[at + 40] == 5;
    let generation = |at: &usize| -> u64 {
        let field = bytes[at + 32..at + 40].try_into().expect("8 bytes");
        u64::from_le_bytes(field)
    };
    // Those of earlier checkpoints may still be there.
    let pages = (0..bytes.len()).step_by(4096).filter(is_catalog);
    let page = pages.max_by_key(generation).expect("a catalog page");
    let slots = bytes[page + 64..page + 64 + 15 * SLOT_BYTES].chunks_exact_mut(SLOT_BYTES);
    let mut occupied = 0;
    for slot in slots.filter(|slot| slot[0] != 0) {
        change(slot);
        occupied += 1;
    }
    reseal(&mut bytes[page..page + 4096]);
    fs::write(machine.pool_path(), bytes).expect("the pool");
    occupied
}

/// The name in a slot of the catalog.
pub(crate) fn slot_name(slot: &[u8]) -> &str {
    std::str::from_utf8(&slot[64..64 + usize::from(slot[3])]).expect("a name")
}
