//! The kit of the suites that need a real ublk device: pools, devices and mounts that clean up after themselves.
//!
//! Everything runs as a process, as users run it: `ublkctl`, `fio`, `mkfs`, `mount`.

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// The RAM disk that most pools lie on: it takes `O_DIRECT`, as a real disk does.
pub const RAM_DISK: &str = "/dev/ram0";
/// One MiB.
pub const MIB: u64 = 1 << 20;

/// A pool with its own state and runtime folders. Dropping it detaches, stops its daemon and forgets it.
#[derive(Debug)]
pub struct Pool {
    name: &'static str,
    folder: PathBuf,
}

impl Pool {
    /// A pool that fills the RAM disk.
    pub fn on_ram_disk(name: &'static str) -> Self {
        Self::on_device(name, RAM_DISK)
    }

    /// A pool that fills a block device.
    pub fn on_device(name: &'static str, device: &str) -> Self {
        shell(&format!(
            "dd if=/dev/zero of={device} bs=1M count=8 conv=fsync status=none"
        ));
        let pool = Self::prepare(name);
        pool.ctl(&["pool", "create", name, device, "--force"]);
        pool
    }

    /// A pool in a sparse file of this size, in this folder.
    pub fn in_folder(name: &'static str, folder: &str, size: &str) -> Self {
        let pool = Self::prepare(name);
        let path = format!("{folder}/pool");
        pool.ctl(&["pool", "create", name, &path, "--size", size]);
        pool
    }

    /// A pool in a file of this size, on a tmpfs.
    pub fn in_file(name: &'static str, size: &str) -> Self {
        let pool = Self::prepare(name);
        pool.ctl(&["pool", "create", name, &pool.path(), "--size", size]);
        pool
    }

    /// A pool of this name that lies in a file already.
    pub fn imported(name: &'static str, path: &str) -> Self {
        let pool = Self::prepare(name);
        pool.ctl(&["pool", "import", path]);
        pool
    }

    fn prepare(name: &'static str) -> Self {
        let folder = PathBuf::from(format!("/run/blockfork-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("run")).expect("a folder for the pool");
        Self { name, folder }
    }

    /// Where a pool in a file lies.
    pub fn path(&self) -> String {
        self.folder.join("pool").display().to_string()
    }

    /// `VOLUME` or `VOLUME@SNAPSHOT`, with the pool's name before it.
    pub fn target(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }

    /// Runs ublkctl, which must succeed; returns its stdout without the last newline.
    #[track_caller]
    pub fn ctl(&self, words: &[&str]) -> String {
        let output = self.try_ctl(words);
        assert!(
            output.status.success(),
            "ublkctl {}: {}\n{}",
            words.join(" "),
            output.status,
            complaints(&output)
        );
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// The pool's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Runs ublkctl, which must fail with this exit code and say why in one line; returns that line.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) -> String {
        let output = self.try_ctl(words);
        let said = complaints(&output);
        assert_eq!(
            output.status.code(),
            Some(code),
            "ublkctl {}: {said}",
            words.join(" ")
        );
        assert_eq!(
            said.lines().count(),
            1,
            "ublkctl {}: {said}",
            words.join(" ")
        );
        said
    }

    /// Runs ublkctl, which must succeed within so many seconds.
    #[track_caller]
    pub fn ctl_within(&self, seconds: u64, words: &[&str]) -> String {
        let mut command = self.prepared("timeout");
        command.arg(seconds.to_string()).arg("ublkctl").args(words);
        let output = command.output().expect("timeout starts");
        assert!(
            output.status.success(),
            "ublkctl {} within {seconds} s: {}\n{}",
            words.join(" "),
            output.status,
            complaints(&output)
        );
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// Runs ublkctl.
    pub fn try_ctl(&self, words: &[&str]) -> Output {
        let mut command = self.prepared("ublkctl");
        command.args(words).output().expect("ublkctl starts")
    }

    /// Runs ublkctl in a mount namespace of its own, in which a shell did `setup` before.
    pub fn in_mounts_of_its_own(&self, setup: &str, words: &[&str]) -> Output {
        let mut command = self.prepared("unshare");
        let line = format!("({setup}) || exit 99; exec ublkctl \"$@\"");
        let shell = ["-m", "--", "/bin/sh", "-c", &line, "sh"];
        let output = command.args(shell).args(words).output();
        output.expect("unshare starts")
    }

    /// Runs ublkctl, which must succeed, from a shell that did `setup` before, which changes what ublkctl inherits.
    #[track_caller]
    pub fn ctl_after(&self, setup: &str, words: &[&str]) -> String {
        let mut command = self.prepared("/bin/sh");
        let line = format!("{setup}; exec ublkctl \"$@\"");
        let output = command.args(["-c", &line, "sh"]).args(words).output();
        let output = output.expect("sh starts");
        assert!(
            output.status.success(),
            "{setup}; ublkctl {}: {}\n{}",
            words.join(" "),
            output.status,
            complaints(&output)
        );
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// Runs a shell line that calls ublkctl, which must succeed.
    #[track_caller]
    pub fn shell(&self, line: &str) {
        let output = self.prepared("/bin/sh").args(["-c", line]).output();
        let output = output.expect("sh starts");
        assert!(
            output.status.success(),
            "{line}: {}\n{}",
            output.status,
            complaints(&output)
        );
    }

    /// Starts ublkctl beside the test.
    pub fn start_ctl(&self, words: &[&str]) -> Background {
        let mut command = self.prepared("ublkctl");
        command
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Background(command.spawn().expect("ublkctl starts"))
    }

    /// Starts `watch`, and waits until it has begun.
    #[track_caller]
    pub fn watch(&self) -> Watch {
        let path = self.folder.join("events");
        let mut command = self.prepared("ublkctl");
        command
            .args(["watch", self.name])
            .stdout(File::create(&path).expect("a file of events"))
            .stderr(Stdio::null());
        let running = Background(command.spawn().expect("ublkctl starts"));
        let watch = Watch {
            path,
            _running: running,
        };
        eventually("somebody watches", || !watch.read().is_empty());
        watch
    }

    /// The folder with the daemon's socket.
    pub fn runtime(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// A program that finds this pool.
    pub fn prepared(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .env("UBLKCTL_STATE_DIR", self.folder.join("state"))
            .env("UBLKCTL_RUNTIME_DIR", self.folder.join("run"));
        command
    }

    /// Creates a volume.
    #[track_caller]
    pub fn create(&self, volume: &str, size: &str) {
        self.ctl(&["create", &self.target(volume), "--size", size]);
    }

    /// Takes a snapshot, `VOLUME@SNAPSHOT`.
    #[track_caller]
    pub fn snapshot(&self, name: &str) {
        self.ctl(&["snapshot", &self.target(name)]);
    }

    /// Attaches a volume or a snapshot.
    #[track_caller]
    pub fn attach(&self, name: &str) -> Device {
        self.attach_with(name, &[])
    }

    /// The same with options.
    #[track_caller]
    pub fn attach_with(&self, name: &str, options: &[&str]) -> Device {
        let target = self.target(name);
        let path = self.ctl(&[&["attach", &target], options].concat());
        assert!(path.starts_with("/dev/ublkb"), "attach printed {path}");
        assert!(
            Path::new(&path).exists(),
            "{path} is not there although attach returned"
        );
        Device { path }
    }

    /// Detaches a volume or a snapshot.
    #[track_caller]
    pub fn detach(&self, name: &str) {
        self.ctl(&["detach", &self.target(name)]);
    }

    /// Creates a volume and attaches it.
    #[track_caller]
    pub fn volume(&self, name: &str, size: &str) -> Device {
        self.create(name, size);
        self.attach(name)
    }

    /// Ends the daemon as nothing else does: without a chance to write anything.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.daemon().expect("the daemon has a pid file");
        shell(&format!("kill -9 {pid}"));
        self.await_end(&pid);
    }

    /// The daemon's process number, as its pid file has it.
    pub fn daemon(&self) -> Option<String> {
        self.daemon_of(self.name)
    }

    /// That of another pool that the same state directory knows.
    pub fn daemon_of(&self, pool: &str) -> Option<String> {
        let file = self.runtime_folder().join(format!("{pool}.pid"));
        Some(fs::read_to_string(file).ok()?.trim().to_owned())
    }

    /// A file of the daemon's.
    pub fn runtime_file(&self, suffix: &str) -> PathBuf {
        self.runtime_folder()
            .join(format!("{}.{suffix}", self.name))
    }

    /// The folder of the daemon's files.
    pub fn runtime_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The number of a process that serves the pool, or is about to: it may have no pid file yet.
    pub fn serving(&self) -> Option<String> {
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let pids = processes.filter_map(|entry| entry.file_name().into_string().ok());
        pids.filter(|pid| !is_zombie(pid)).find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.next().is_some_and(|word| word.ends_with(b"ublkctl"))
                && words.next() == Some(b"serve")
                && words.any(|word| word == self.name.as_bytes())
        })
    }

    /// Waits for the end of a process that was killed.
    #[track_caller]
    pub fn await_end(&self, pid: &str) {
        eventually("the daemon is gone", || {
            !Path::new("/proc").join(pid).exists() || is_zombie(pid)
        });
    }

    /// Brings the devices back after [`Self::kill_daemon`].
    #[track_caller]
    pub fn recover(&self) {
        self.ctl(&["recover", self.name]);
    }

    /// Detaches everything and lets the checker look at all of the pool.
    #[track_caller]
    pub fn check(&self) {
        self.ctl(&["detach", "--all", self.name]);
        self.ctl(&["pool", "check", self.name]);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A failed test leaves things in any state: each step is tried, and none must hide the first failure.
        drop(self.try_ctl(&["detach", "--all", self.name]));
        drop(self.try_ctl(&["pool", "export", self.name]));
        if let Ok(pid) =
            fs::read_to_string(self.folder.join("run").join(format!("{}.pid", self.name)))
        {
            drop(try_shell(&format!(
                "kill {0}; sleep 1; kill -9 {0}",
                pid.trim()
            )));
        }
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// An attached block device.
#[derive(Clone, Debug)]
pub struct Device {
    /// `/dev/ublkbN`
    pub path: String,
}

impl Device {
    /// Writes bytes that depend on the seed and on nothing else, and flushes them.
    #[track_caller]
    pub fn fill(&self, offset: u64, length: u64, seed: u64) {
        let mut file = File::options()
            .write(true)
            .open(&self.path)
            .expect("the device opens for writing");
        file.seek(SeekFrom::Start(offset))
            .expect("the device seeks");
        file.write_all(&pattern(length, seed))
            .expect("the device takes the write");
        file.sync_all().expect("the device flushes");
    }

    /// Whether it holds what [`Self::fill`] wrote with this seed.
    #[track_caller]
    pub fn holds(&self, offset: u64, length: u64, seed: u64) -> bool {
        self.bytes(offset, length) == pattern(length, seed)
    }

    /// How many blocks of a range cannot be read; the others must hold what [`Self::fill`] wrote with this seed.
    #[track_caller]
    pub fn unreadable_blocks(&self, offset: u64, length: u64, seed: u64) -> u64 {
        shell(&format!("blockdev --flushbufs {}", self.path));
        let file = File::open(&self.path).expect("the device opens");
        let mut unreadable = 0;
        let mut block = [0; 4096];
        for (at, expected) in (offset..)
            .step_by(block.len())
            .zip(pattern(length, seed).chunks(4096))
        {
            if file.read_exact_at(&mut block, at).is_err() {
                unreadable += 1;
            } else {
                assert!(block == *expected, "byte {at} and on: something else");
            }
        }
        unreadable
    }

    /// Whether a range reads as zeros.
    #[track_caller]
    pub fn is_zero(&self, offset: u64, length: u64) -> bool {
        self.bytes(offset, length).iter().all(|byte| *byte == 0)
    }

    /// What the device itself holds, past the kernel's page cache.
    #[track_caller]
    pub fn bytes(&self, offset: u64, length: u64) -> Vec<u8> {
        shell(&format!("blockdev --flushbufs {}", self.path));
        let mut file = File::open(&self.path).expect("the device opens");
        file.seek(SeekFrom::Start(offset))
            .expect("the device seeks");
        let mut bytes = vec![0; usize::try_from(length).expect("a length that fits")];
        file.read_exact(&mut bytes).expect("the device reads");
        bytes
    }

    /// A file of its folder below /sys/block.
    #[track_caller]
    pub fn attribute(&self, name: &str) -> String {
        let device = self.path.trim_start_matches("/dev/");
        let path = format!("/sys/block/{device}/{name}");
        fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
            .trim()
            .to_owned()
    }

    /// Its size in bytes.
    #[track_caller]
    pub fn size(&self) -> u64 {
        shell(&format!("blockdev --getsize64 {}", self.path))
            .parse()
            .expect("a size")
    }

    /// Mounts it.
    #[track_caller]
    pub fn mount(&self, options: &str) -> Mount {
        let path = format!("/mnt/{}", self.path.trim_start_matches("/dev/"));
        fs::create_dir_all(&path).expect("a folder to mount on");
        shell(&format!("mount -o {options} {} {path}", self.path));
        Mount { path }
    }

    /// A fio command line for this device; every read is checked against what fio wrote.
    pub fn fio(&self, options: &str) -> String {
        format!(
            "fio --name=job --filename={} --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 \
             --eta=never --minimal {options}",
            self.path
        )
    }
}

/// A mounted file system, unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    /// Where it is mounted.
    pub path: String,
}

impl Mount {
    /// A new file system in memory, of this size.
    #[track_caller]
    pub fn tmpfs(name: &str, size: &str) -> Self {
        let path = format!("/run/{name}");
        shell(&format!(
            "mkdir -p {path} && mount -t tmpfs -o size={size} {name} {path}"
        ));
        Self { path }
    }

    /// Unmounts it, which must succeed.
    #[track_caller]
    pub fn unmount(self) {
        shell(&format!("umount {}", self.path));
        std::mem::forget(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(try_shell(&format!(
            "umount {0} || umount -l {0}",
            self.path
        )));
    }
}

/// A device of the device mapper over the RAM disk, removed when dropped.
#[derive(Debug)]
pub struct Mapped {
    name: &'static str,
    sectors: u64,
}

impl Mapped {
    /// So many bytes of the RAM disk as they are; none, with a line that says so, where the kernel has no `module`.
    #[track_caller]
    pub fn whole(name: &'static str, module: &str, bytes: u64) -> Option<Self> {
        drop(try_shell(&format!("modprobe -a dm-mod {module}")));
        let target = module.trim_start_matches("dm-");
        let targets = try_shell("dmsetup targets").stdout;
        let targets = String::from_utf8_lossy(&targets).into_owned();
        if target != "mod" && !targets.lines().any(|line| line.starts_with(target)) {
            println!("skipped: this kernel has no {module}");
            return None;
        }
        let mapped = Self {
            name,
            sectors: bytes / 512,
        };
        shell(&format!(
            "DM_DISABLE_UDEV=1 dmsetup create {name} --table '0 {} linear {RAM_DISK} 0'",
            mapped.sectors
        ));
        Some(mapped)
    }

    /// `/dev/mapper/NAME`
    pub fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// The device below it.
    pub fn lower(&self) -> &'static str {
        RAM_DISK
    }

    /// Makes all of it be this target.
    #[track_caller]
    pub fn load(&self, target: &str) {
        self.load_table(&format!("0 {} {target}", self.sectors));
    }

    /// Gives it another table, while it is used.
    #[track_caller]
    pub fn load_table(&self, table: &str) {
        shell(&format!(
            "export DM_DISABLE_UDEV=1; dmsetup suspend --nolockfs {0} && dmsetup load {0} --table '{table}' && dmsetup resume {0}",
            self.name
        ));
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        drop(try_shell(&format!(
            "DM_DISABLE_UDEV=1 dmsetup remove --retry {}",
            self.name
        )));
    }
}

/// Threads that the kernel does not run until this is dropped, or until the test has ended.
#[derive(Debug)]
pub struct StoppedThreads(Vec<Pid>);

impl StoppedThreads {
    /// Stops the threads of a process whose name begins so.
    #[track_caller]
    pub fn of(pid: &str, name: &str) -> Self {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
        let mut stopped = Vec::new();
        for thread in threads.flatten() {
            let called = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            if !called.starts_with(name) {
                continue;
            }
            let id = thread.file_name().to_string_lossy().parse();
            let id = Pid::from_raw(id.expect("a thread's number"));
            ptrace::seize(id, ptrace::Options::empty()).expect("the thread can be traced");
            ptrace::interrupt(id).expect("the thread can be stopped");
            waitpid(id, Some(WaitPidFlag::__WALL)).expect("the thread stops");
            stopped.push(id);
        }
        assert!(!stopped.is_empty(), "no thread is called {name}...");
        Self(stopped)
    }
}

impl Drop for StoppedThreads {
    fn drop(&mut self) {
        for id in &self.0 {
            // A thread that has ended meanwhile is no harm.
            let _ended = ptrace::detach(*id, None);
        }
    }
}

/// A command that runs beside the test; killed when dropped.
#[derive(Debug)]
pub struct Background(Child);

impl Background {
    /// Starts a shell line.
    pub fn start(line: &str) -> Self {
        // exec: killing the shell must kill the command.
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("exec {line}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Self(child.expect("sh starts"))
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Waits for its end; whether that was a success.
    pub fn ends(mut self) -> bool {
        self.0.wait().is_ok_and(|status| status.success())
    }

    /// Waits for its end, which must be a success.
    #[track_caller]
    pub fn succeeds(mut self) {
        let status = self.0.wait().expect("the command can be waited for");
        assert!(
            status.success(),
            "the command beside the test failed: {status}"
        );
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A `ublkctl watch` that runs beside the test.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    _running: Background,
}

impl Watch {
    /// All that it has said, one event a line.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.path).expect("the events can be read")
    }
}

/// Runs a shell line, which must succeed; returns its stdout without the last newline.
#[track_caller]
pub fn shell(line: &str) -> String {
    let output = try_shell(line);
    assert!(
        output.status.success(),
        "{line}: {}\n{}",
        output.status,
        complaints(&output)
    );
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// Runs a shell line, which must fail; returns what it said.
#[track_caller]
pub fn shell_fails(line: &str) -> String {
    let output = try_shell(line);
    assert!(!output.status.success(), "{line}: this should have failed");
    complaints(&output)
}

/// Runs a shell line.
pub fn try_shell(line: &str) -> Output {
    Command::new("/bin/sh")
        .args(["-c", line])
        .stdin(Stdio::null())
        .output()
        .expect("sh starts")
}

/// A number that the environment sets, or the one of a short run.
pub fn from_environment(variable: &str, short: u64) -> u64 {
    let value = std::env::var(variable).ok();
    value.map_or(short, |value| value.parse().expect("a number"))
}

/// Waits, half a minute at most, until something becomes true.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("half a minute went by, and still not: {what}");
}

fn is_zombie(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

fn complaints(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned()
}

fn pattern(length: u64, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; usize::try_from(length).expect("a length that fits")];
    random.fill(&mut bytes);
    bytes
}
