//! One run of qemu: start, relay the serial line, recognise the end, and kill it when time is up.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::accel::Accel;

#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) accel: Accel,
    pub(super) processors: u8,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) disks: &'a [PathBuf],
    pub(super) limit: Duration,
    pub(super) silent: bool,
}

/// How the guest's command ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: u8,
    /// What it printed.
    pub output: String,
    /// The kernel that ran, as `uname -r` says it.
    pub kernel: String,
}

/// What is to become of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// It goes on.
    On,
    /// It is killed, as a power cut would.
    Off,
}

/// The memory of a machine.
pub const MEMORY_GIB: usize = 3;
/// How long nobody hears of a machine that says nothing.
const TICK: Duration = Duration::from_millis(10);
/// How often a machine is started whose kernel dies, or stands still, on the way up.
const BOOTS_MAX: u32 = 3;
/// A machine that is not up after this stands still; most take some 10 s, on a busy machine a few times that.
const BOOT_LIMIT: Duration = Duration::from_secs(150);
/// The exit status of a command that was killed with its machine.
const KILLED: u8 = 137;

/// Kills the machine on every way out.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Boots the machine and waits for its end. Where an emulated kernel dies or stands still, as it does now and then, that
/// says nothing of what ran on it, and the machine is started again; but one with disks only while nothing of ours has run.
pub(super) fn boot(
    machine: &Machine<'_>,
    watch: &mut dyn FnMut(Option<&str>) -> Go,
) -> Result<Outcome> {
    for _ in 1..BOOTS_MAX {
        let console = run(machine, watch)?;
        match &console.panic {
            Some(panic) if !console.is_up || machine.disks.is_empty() => eprintln!(
                "x: booting again: the guest's kernel died{}\n{panic}",
                console.before_the_end()
            ),
            _ => return console.outcome(),
        }
    }
    run(machine, watch)?.outcome()
}

/// One boot: what came over the serial line.
fn run(machine: &Machine<'_>, watch: &mut dyn FnMut(Option<&str>) -> Go) -> Result<Console> {
    let mut command = command(machine);
    let mut running = Running(
        command
            .spawn()
            .context("cannot start qemu-system-x86_64: run cargo x setup")?,
    );
    let mut serial = running.0.stdout.take().context("qemu has no output")?;
    let (sender, chunks) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count) = serial.read(&mut buffer) {
            if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    #[expect(clippy::disallowed_methods, reason = "the limit is on real time")]
    let began = Instant::now();
    let mut console = Console {
        silent: machine.silent,
        ..Console::default()
    };
    loop {
        #[expect(clippy::disallowed_methods, reason = "the limit is on real time")]
        let elapsed = Instant::now().saturating_duration_since(began);
        let left = machine.limit.saturating_sub(elapsed);
        let mut go = Go::On;
        match chunks.recv_timeout(left.min(TICK)) {
            Ok(chunk) => {
                console.take(&chunk)?;
                for line in console.heard.drain(..) {
                    if watch(Some(&line)) == Go::Off {
                        go = Go::Off;
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if !console.is_up && elapsed > BOOT_LIMIT => {
                let stands = format!("it was not up after {} s", BOOT_LIMIT.as_secs());
                console.panic.get_or_insert(stands);
                break;
            }
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => go = watch(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the guest was killed after {} s{}",
                    machine.limit.as_secs(),
                    console.before_the_end()
                )
            }
        }
        if go == Go::Off {
            running.0.kill().context("cannot kill the guest")?;
            // What it had said before counts.
            for chunk in chunks {
                console.take(&chunk)?;
            }
            for line in console.heard.drain(..) {
                watch(Some(&line));
            }
            console.status.get_or_insert(KILLED);
            break;
        }
    }
    Ok(console)
}

fn command(machine: &Machine<'_>) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(machine.accel.arguments());
    command.args([
        "-cpu",
        "max",
        "-smp",
        &machine.processors.to_string(),
        "-m",
        &format!("{MEMORY_GIB}G"),
        "-nodefaults",
        "-nographic",
        "-no-reboot",
    ]);
    command.args([
        "-serial",
        "mon:stdio",
        "-append",
        "console=ttyS0 quiet loglevel=3 panic=-1 random.trust_cpu=on",
    ]);
    command
        .arg("-kernel")
        .arg(machine.kernel)
        .arg("-initrd")
        .arg(machine.initramfs);
    for disk in machine.disks {
        command.arg("-drive").arg(format!(
            "if=virtio,format=raw,discard=unmap,file={}",
            disk.display()
        ));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// What came over the serial line, line by line.
#[derive(Debug, Default)]
struct Console {
    silent: bool,
    /// Everything before the guest's own first line: the firmware's and the kernel's.
    boot: String,
    is_up: bool,
    kernel: String,
    /// The line that is not complete yet, and how much of it was relayed.
    line: Vec<u8>,
    relayed: usize,
    output: String,
    /// Lines of the guest that nobody was told of yet.
    heard: Vec<String>,
    status: Option<u8>,
    panic: Option<String>,
}

impl Console {
    fn take(&mut self, chunk: &[u8]) -> Result<()> {
        for byte in chunk {
            match byte {
                b'\r' => {}
                b'\n' => self.end_line()?,
                byte => self.line.push(*byte),
            }
        }
        // A test's name is shown before its result comes.
        if self.is_up && !self.line.starts_with(b"@") && self.status.is_none() {
            self.relay()?;
        }
        Ok(())
    }

    fn end_line(&mut self) -> Result<()> {
        let text = String::from_utf8_lossy(&self.line).into_owned();
        if text.contains("Kernel panic - not syncing") {
            self.panic = Some(text.clone());
        }
        // The firmware leaves its escape codes in front of the first line.
        if let Some((_, release)) = text.split_once("@@x up ") {
            self.is_up = true;
            self.kernel = release.to_owned();
            if !self.silent {
                eprintln!("x: guest is up, Linux {release}");
            }
        } else if let Some(status) = text.strip_prefix("@@x exit ") {
            self.status = Some(
                status
                    .parse()
                    .with_context(|| format!("the guest ended with {text}"))?,
            );
        } else if self.is_up && self.status.is_none() {
            self.line.push(b'\n');
            self.relay()?;
            self.output.push_str(&text);
            self.output.push('\n');
            self.heard.push(text);
        } else {
            self.boot.push_str(&text);
            self.boot.push('\n');
        }
        self.line.clear();
        self.relayed = 0;
        Ok(())
    }

    fn relay(&mut self) -> Result<()> {
        if !self.silent {
            let mut out = std::io::stdout().lock();
            let new = self.line.get(self.relayed..).unwrap_or_default();
            out.write_all(new)
                .and_then(|()| out.flush())
                .context("cannot write to stdout")?;
        }
        self.relayed = self.line.len();
        Ok(())
    }

    /// The kernel's words, where they explain a guest that never came up.
    fn before_the_end(&self) -> String {
        if self.is_up {
            return String::new();
        }
        let lines: Vec<_> = self.boot.lines().collect();
        let tail = lines
            .get(lines.len().saturating_sub(40)..)
            .unwrap_or_default();
        format!(" before it was up; its last words:\n{}", tail.join("\n"))
    }

    fn outcome(self) -> Result<Outcome> {
        if let Some(panic) = self.panic {
            bail!("the guest's kernel died: {panic}");
        }
        match self.status {
            Some(status) => Ok(Outcome {
                status,
                output: self.output.trim_end().to_owned() + "\n",
                kernel: self.kernel,
            }),
            None => bail!(
                "the guest ended without a word about its command{}",
                self.before_the_end()
            ),
        }
    }
}
