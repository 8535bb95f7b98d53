//! `x profile`: where the daemon's time goes under a fio job, as a flame graph.
//!
//! Over ublk where this machine has it and we are root; else over NBD, the same engine behind another frontend. The pool
//! lies on a tmpfs, so that what shows is the work and not the wait for a device.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options as Collapsing};
use inferno::flamegraph;

use crate::{command, demo, paths, setup};

/// What is profiled.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The job: the name of a file in fio-jobs, without .fio
    job: String,
    /// Samples a second
    #[arg(long, default_value_t = 997)]
    frequency: u32,
    /// Over NBD, even if this machine has ublk
    #[arg(long)]
    nbd: bool,
}

/// The volume's size; the jobs want 256 MiB.
const SIZE: &str = "256M";
/// How long perf looks. A job that ends after a time is made longer than that.
const SECONDS: &str = "2";

/// Runs the job beside perf and draws what the daemon did.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::install_missing()?;
    let job = paths::root().join(format!("fio-jobs/{}.fio", options.job));
    let text = fs::read_to_string(&job).with_context(|| format!("{}: no such job", options.job))?;
    let perf = Command::new("perf").arg("--version").output();
    if !perf.is_ok_and(|output| output.status.success()) {
        bail!("perf is missing; install it with: sudo apt-get install linux-perf");
    }
    let is_ublk = !options.nbd && setup::is_root() && demo::has_ublk();
    let daemon = Daemon::start(&command::build_ublkctl()?, is_ublk)?;
    let text = if is_ublk { text } else { over_nbd(&text) };
    let job = daemon.folder.join("job.fio");
    fs::write(&job, text).context("cannot write the job")?;
    if !options.job.contains("fill") {
        daemon.fill()?;
    }
    if options.job.contains("snapshot") {
        daemon.ctl(&["snapshot", "profile/v@s"])?;
    }
    let svg = daemon.profile(&job, options)?;
    println!("{}", svg.display());
    Ok(ExitCode::SUCCESS)
}

/// The job for fio's NBD engine.
fn over_nbd(text: &str) -> String {
    text.replace("filename=${DEVICE}", "uri=${DEVICE}")
        .replace("ioengine=libaio", "ioengine=nbd")
        .replace("direct=1\n", "")
}

/// A pool with a volume that is served; gone when dropped.
struct Daemon {
    program: PathBuf,
    folder: PathBuf,
    /// A block device, or an NBD URI.
    device: String,
    /// `serve-nbd`, which lasts as long as it serves.
    over_nbd: Option<Child>,
}

impl Daemon {
    fn start(program: &Path, is_ublk: bool) -> Result<Self> {
        let folder = PathBuf::from(format!("/dev/shm/blockfork-profile-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut daemon = Self {
            program: program.to_owned(),
            folder,
            device: String::new(),
            over_nbd: None,
        };
        let pool = daemon.folder.join("pool").to_string_lossy().into_owned();
        daemon.ctl(&["pool", "create", "profile", &pool, "--size", "1G"])?;
        daemon.ctl(&["create", "profile/v", "--size", SIZE])?;
        if is_ublk {
            daemon.device = daemon.ctl(&["attach", "profile/v", "--queues", "2"])?;
        } else {
            daemon.serve_nbd()?;
        }
        Ok(daemon)
    }

    fn serve_nbd(&mut self) -> Result<()> {
        let mut serve = self.command(&["serve-nbd", "profile/v"]);
        let mut child = serve
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start ublkctl serve-nbd")?;
        let said = child.stdout.take().context("no stdout")?;
        self.over_nbd = Some(child);
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        line.trim().clone_into(&mut self.device);
        if self.device.is_empty() {
            bail!("ublkctl serve-nbd named no URI");
        }
        Ok(())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut ublkctl = Command::new(&self.program);
        ublkctl
            .args(words)
            .env("UBLKCTL_STATE_DIR", self.folder.join("state"))
            .env("UBLKCTL_RUNTIME_DIR", self.folder.join("run"));
        ublkctl
    }

    /// What a command said.
    fn ctl(&self, words: &[&str]) -> Result<String> {
        let said = command::output(&mut self.command(words))?;
        Ok(said.trim().to_owned())
    }

    fn fio(&self) -> Command {
        let mut fio = Command::new("fio");
        fio.env("DEVICE", &self.device)
            .current_dir(&self.folder)
            .arg("--eta=never")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        fio
    }

    /// Writes all of the volume.
    fn fill(&self) -> Result<()> {
        let job = "[fill]\nioengine=libaio\nfilename=${DEVICE}\ndirect=1\nrw=write\nbs=256k\n";
        let job = match self.over_nbd {
            None => job.to_owned(),
            Some(_) => over_nbd(job),
        };
        let file = self.folder.join("fill.fio");
        fs::write(&file, format!("{job}size={SIZE}\n")).context("cannot write the job")?;
        command::run(self.fio().arg(file))
    }

    /// Runs the job with perf beside it; the flame graph.
    fn profile(&self, job: &Path, options: &Options) -> Result<PathBuf> {
        let data = self.folder.join("perf.data");
        let pid = self.pid()?;
        let before = ticks(&pid)?;
        let mut fio = self.fio();
        let mut load = fio.arg(job).spawn().context("cannot start fio")?;
        // perf looks at the threads that there are, and those of a connection come with it: wait until they work.
        while ticks(&pid)? < before + 5 && load.try_wait()?.is_none() {
            thread::sleep(Duration::from_millis(20));
        }
        let mut perf = Command::new("perf");
        perf.args(["record", "--quiet", "--event", "cpu-clock"])
            .args(["--call-graph", "dwarf,16384"])
            .args(["--freq", &options.frequency.to_string()])
            .args(["--pid", &pid])
            .arg("--output")
            .arg(&data)
            .args(["--", "sleep", SECONDS]);
        let recorded = command::run(&mut perf);
        let ended = load.wait().context("cannot wait for fio")?;
        recorded?;
        if !ended.success() {
            bail!("fio failed: {ended}");
        }
        self.draw(&data, options)
    }

    fn pid(&self) -> Result<String> {
        let run = self.folder.join("run");
        let entries =
            fs::read_dir(&run).with_context(|| format!("cannot list {}", run.display()))?;
        let file = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "pid"))
            .context("the daemon has no pid file")?;
        let text = fs::read_to_string(file).context("cannot read the daemon's pid file")?;
        Ok(text.trim().to_owned())
    }

    fn draw(&self, data: &Path, options: &Options) -> Result<PathBuf> {
        let folder = paths::target().join("profile");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let stacks = self.folder.join("stacks");
        let folded = self.folder.join("folded");
        let mut script = Command::new("perf");
        script
            .args(["script", "--input"])
            .arg(data)
            .stdout(File::create(&stacks).context("cannot make a file for the stacks")?)
            .stderr(Stdio::null());
        command::run(&mut script)?;
        Folder::from(Collapsing::default())
            .collapse(
                BufReader::new(File::open(&stacks)?),
                BufWriter::new(File::create(&folded)?),
            )
            .context("perf recorded nothing that can be drawn")?;
        let svg = folder.join(format!("{}.svg", options.job));
        let mut drawing = flamegraph::Options::default();
        drawing.title = format!("ublkctl, {}", options.job);
        flamegraph::from_files(&mut drawing, &[folded], BufWriter::new(File::create(&svg)?))
            .context("perf recorded nothing that can be drawn")?;
        Ok(svg)
    }
}

/// The processor time of a process so far, in hundredths of a second: fields 14 and 15 of proc_pid_stat(5).
fn ticks(pid: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name, in parentheses, may hold blanks.
    let (_, fields) = text.rsplit_once(") ").context("not a stat file")?;
    let spent = fields.split(' ').skip(11).take(2);
    Ok(spent.filter_map(|field| field.parse::<u64>().ok()).sum())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Whatever was not begun fails, and there is nobody to tell.
        if let Some(child) = &mut self.over_nbd {
            drop(child.kill());
            drop(child.wait());
        } else {
            drop(self.ctl(&["detach", "profile/v"]));
        }
        drop(self.ctl(&["pool", "destroy", "profile", "--force"]));
        drop(fs::remove_dir_all(&self.folder));
    }
}
