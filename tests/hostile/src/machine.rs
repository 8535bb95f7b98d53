//! A machine of its own for a series of cases: a state folder, a pool that goes back to what it was, and the program.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes in the pool: the smallest there can be.
pub(crate) const POOL_BYTES: u64 = 16 << 20;
/// A command that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
/// Where a superblock has its two copies.
pub(crate) const SUPERBLOCKS: [usize; 2] = [0, 8 * BLOCK];

/// The machine.
pub(crate) struct Machine {
    folder: tempfile::TempDir,
    program: PathBuf,
    /// The pool's blocks that are not zeros, as every case finds them.
    blocks: Vec<(u64, Vec<u8>)>,
    /// What every case finds in the registry.
    registry: Vec<(PathBuf, Vec<u8>)>,
    is_as_made: bool,
}

/// What a command answered.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// All that a refused command must leave alone.
#[derive(PartialEq, Eq)]
pub(crate) struct Sight {
    pool: (u64, i64, i64, i64, i64),
    files: Vec<(PathBuf, u64, i64, i64)>,
}

impl Machine {
    /// A machine with the pool `p0`, the volumes `v` and `w`, and the snapshots `v@s` and `v@t`.
    pub(crate) fn new(program: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        let mut machine = Self {
            folder,
            program: program.to_owned(),
            blocks: Vec::new(),
            registry: Vec::new(),
            is_as_made: true,
        };
        let pool = machine.pool_path().display().to_string();
        for words in [
            &["pool", "create", "p0", &pool, "--size", "16M"][..],
            &["create", "p0/v", "--size", "4M"],
            &["snapshot", "p0/v@s"],
            &["create", "p0/w", "--size", "1M"],
            &["snapshot", "p0/v@t"],
        ] {
            let said = machine.run(words);
            assert_eq!(said.code, Some(0), "{words:?}: {said:?}");
        }
        let bytes = fs::read(machine.pool_path()).unwrap();
        let blocks = bytes.chunks_exact(BLOCK).zip(0..);
        machine.blocks = blocks
            .filter(|(block, _)| block.iter().any(|byte| *byte != 0))
            .map(|(block, number)| (number, block.to_vec()))
            .collect();
        let pools = machine.path("state/pools");
        for entry in fs::read_dir(pools).unwrap() {
            let path = entry.unwrap().path();
            machine
                .registry
                .push((path.clone(), fs::read(path).unwrap()));
        }
        machine
    }

    /// A path on the machine.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where `p0` lives.
    pub(crate) fn pool_path(&self) -> PathBuf {
        self.path("p0.pool")
    }

    /// Where the daemon of `p0` listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/p0.sock")
    }

    /// The pool's bytes as every case finds them.
    pub(crate) fn image(&self) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(POOL_BYTES).unwrap()];
        for (number, block) in &self.blocks {
            let at = usize::try_from(*number).unwrap() * BLOCK;
            image[at..at + BLOCK].copy_from_slice(block);
        }
        image
    }

    /// Makes the pool, as it was made, into this image, which differs from [`Machine::image`] in used blocks only.
    pub(crate) fn put(&self, image: &[u8]) {
        let file = File::options().write(true).open(self.pool_path()).unwrap();
        for number in self.used() {
            let at = usize::try_from(number).unwrap() * BLOCK;
            let block = &image[at..at + BLOCK];
            file.write_all_at(block, number * BLOCK as u64).unwrap();
        }
    }

    /// The numbers of the blocks with content.
    pub(crate) fn used(&self) -> Vec<u64> {
        self.blocks.iter().map(|(number, _)| *number).collect()
    }

    /// Says that the pool or the registry was changed, so that the next case gets them anew.
    pub(crate) fn spoil(&mut self) {
        self.is_as_made = false;
    }

    /// Puts everything back as it was made.
    pub(crate) fn restore(&mut self) {
        if self.is_as_made {
            return;
        }
        let pool = self.pool_path();
        fs::remove_file(&pool).ok();
        let file = File::create(&pool).unwrap();
        fs::set_permissions(&pool, fs::Permissions::from_mode(0o600)).unwrap();
        file.set_len(POOL_BYTES).unwrap();
        for (number, block) in &self.blocks {
            file.write_all_at(block, number * BLOCK as u64).unwrap();
        }
        for folder in ["state/pools", "run", "work"] {
            for entry in fs::read_dir(self.path(folder)).into_iter().flatten() {
                let path = entry.unwrap().path();
                fs::remove_file(&path)
                    .or_else(|_| fs::remove_dir_all(&path))
                    .ok();
            }
        }
        for (path, bytes) in &self.registry {
            fs::write(path, bytes).unwrap();
        }
        self.is_as_made = true;
    }

    /// The command with its environment.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).stdin(Stdio::null());
        command.current_dir(self.path("work"));
        command.env("UBLKCTL_STATE_DIR", self.path("state"));
        command.env("UBLKCTL_RUNTIME_DIR", self.path("run"));
        command.env("COLUMNS", "100");
        command
    }

    /// Runs a command.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Said {
        run(&mut self.command(words))
    }

    /// Runs a command as nobody.
    pub(crate) fn run_as_nobody(&self, words: &[&str]) -> Said {
        run(self.command(words).uid(65_534).gid(65_534))
    }

    /// What a refused command must not change.
    pub(crate) fn sight(&self) -> Sight {
        let pool = fs::metadata(self.pool_path()).unwrap();
        let mut files = Vec::new();
        for folder in ["state/pools", "run", "work"] {
            for entry in fs::read_dir(self.path(folder)).into_iter().flatten() {
                let entry = entry.unwrap();
                let about = entry.path().symlink_metadata().unwrap();
                files.push((
                    entry.path(),
                    about.size(),
                    about.mtime(),
                    about.mtime_nsec(),
                ));
            }
        }
        files.sort();
        Sight {
            pool: (
                pool.size(),
                pool.mtime(),
                pool.mtime_nsec(),
                pool.ctime(),
                pool.ctime_nsec(),
            ),
            files,
        }
    }

    /// The part of [`Machine::sight`] that a daemon does not change while it works.
    pub(crate) fn files(&self) -> impl PartialEq {
        let run = self.path("run");
        let mut files = self.sight().files;
        files.retain(|(path, ..)| !path.starts_with(&run));
        files
    }

    /// Starts `serve p0` and waits until it answers.
    pub(crate) fn serve(&self) -> Server {
        let log = File::create(self.path("serve.log")).unwrap();
        let mut command = self.command(&["serve", "p0"]);
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let daemon = Server(child);
        for _ in 0..3000 {
            if std::os::unix::net::UnixStream::connect(self.socket()).is_ok() {
                return daemon;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let log = fs::read_to_string(self.path("serve.log")).unwrap();
        panic!("no daemon: {log}");
    }

    /// Starts `serve-nbd` of a volume: the process, and the socket that it serves on.
    pub(crate) fn serve_nbd(&self, target: &str) -> (Server, PathBuf) {
        let log = File::create(self.path("serve-nbd.log")).unwrap();
        let mut command = self.command(&["serve-nbd", target]);
        let child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut server = Server(child);
        let mut uri = String::new();
        let stdout = server.0.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut uri).unwrap();
        let Some((_, socket)) = uri.trim_end().split_once("?socket=") else {
            let log = fs::read_to_string(self.path("serve-nbd.log")).unwrap();
            panic!("{target} is not served: {log}");
        };
        (server, socket.into())
    }

    /// What is left when nobody serves any more: a pool without damage, and no process.
    pub(crate) fn is_sound(&self) -> Result<(), String> {
        let said = self.run(&["pool", "check", "p0"]);
        if said.code != Some(0) {
            return Err(format!("the pool is not clean afterwards: {said:?}"));
        }
        self.nothing_left_behind()
    }

    /// No process of this machine still runs.
    pub(crate) fn nothing_left_behind(&self) -> Result<(), String> {
        let folder = format!("{}/", self.folder.path().display());
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains(&folder) {
                return Err(format!("process {:?} was left behind", entry.file_name()));
            }
        }
        Ok(())
    }
}

/// A process that serves, and dies with this value.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Runs a command to its end, or to the end of patience.
pub(crate) fn run(command: &mut Command) -> Said {
    let started = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(e) => {
            return Said {
                code: None,
                signal: None,
                stdout: String::new(),
                stderr: format!("cannot be started: {e}"),
            };
        }
    };
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = move |from: &mut dyn Read| {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let errors = thread::spawn(move || read(&mut err));
    let output = thread::spawn(move || read(&mut out));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        thread::sleep(Duration::from_millis(1));
    };
    Said {
        code: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        stdout: output.join().unwrap(),
        stderr: errors.join().unwrap(),
    }
}

impl Said {
    /// Whether it ended as documented: a known exit code, and for a refusal one line that is fit for a terminal.
    pub(crate) fn is_documented(&self, codes: &[i32]) -> Result<(), String> {
        let fault = |fact: &str| Err(format!("{fact}: {self:.600?}"));
        let Some(code) = self.code else {
            return fault(if self.signal.is_some() {
                "ended by a signal"
            } else {
                "hangs, or does not start"
            });
        };
        if !codes.contains(&code) {
            return fault("an exit code that is not documented here");
        }
        if code == 0 {
            return Ok(());
        }
        // Help for what was left out; a report that a finding is part of.
        if self.stderr.contains("Usage:") || (self.stderr.is_empty() && !self.stdout.is_empty()) {
            return Ok(());
        }
        let line = self.stderr.strip_suffix('\n').unwrap_or(&self.stderr);
        if !line.starts_with("ublkctl: ") || line.contains(char::is_control) {
            return fault("not one clear line");
        }
        if line.len() > 10_000 {
            return fault("a line that nobody can read");
        }
        Ok(())
    }
}

/// Makes the checksum of a metadata block right.
pub(crate) fn seal(block: &mut [u8]) {
    let at = if block.starts_with(b"BLKFORK\0") {
        12
    } else {
        4
    };
    block[at..at + 4].fill(0);
    let crc = crc32fast::hash(block);
    block[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}
