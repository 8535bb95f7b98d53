//! `x power-cut`: R7b. The power goes while ext4 on a volume, its fsyncs and snapshots are at work; again and again on
//! the same pool. See `disk.rs` for what a cut does to the disk, `inside.rs` for what is looked at.
//!
//! One boot looks at what the cut before left, and then makes the load for the next.

mod disk;
mod inside;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use score::{Card, Figure};

use self::disk::{Disk, Moment};
use crate::guest::{Go, Job, Kernel};
use crate::{command, paths, row, setup};

/// Threads that write and sync files.
const WRITERS: u64 = 2;
const DISK_BYTES: usize = 256 << 20;
/// A boot, a look and a load take less.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Whether a snapshot of this number is taken only to be removed.
fn is_removed_again(number: u64) -> bool {
    number % 3 == 1
}

/// How many cuts, and where.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A sample, held against a sample's target
    #[arg(long)]
    quick: bool,
    /// How many cuts
    #[arg(long, value_name = "N")]
    cuts: Option<u64>,
    /// The guest's kernel: "new" or "6.12"
    #[arg(long, default_value = "new")]
    kernel: Kernel,
    /// Draws the moments and what is lost
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the figures here too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Be what runs in the guest, in this round
    #[arg(long, hide = true)]
    inside: Option<u64>,
    /// Only look, without load
    #[arg(long, hide = true, requires = "inside")]
    last: bool,
}

/// Runs the row, or its part in the guest.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(round) = options.inside {
        inside::run(round, options.last)?;
        return Ok(ExitCode::SUCCESS);
    }
    row::report(&measure(options)?, options.json.as_deref())
}

/// A few cuts on the newest kernel; whether all held, and the figures as lines.
pub fn sample() -> Result<(bool, Vec<String>)> {
    let options = Options {
        quick: true,
        cuts: None,
        kernel: Kernel::New,
        seed: 0,
        json: None,
        inside: None,
        last: false,
    };
    let figures = measure(&options)?;
    let mut lines = Vec::new();
    score::print(&figures, &mut lines).context("cannot print the figures")?;
    let lines = String::from_utf8_lossy(&lines).into_owned();
    Ok((
        score::all_pass(&figures),
        lines.lines().map(str::to_owned).collect(),
    ))
}

fn measure(options: &Options) -> Result<Vec<Figure>> {
    setup::install_missing()?;
    let ublkctl = command::build_ublkctl()?;
    let wanted = if options.quick { 3 } else { 50 };
    let cuts = options.cuts.unwrap_or(wanted);
    let socket = paths::guest_cache().join(format!("disk.{}", std::process::id()));
    std::fs::create_dir_all(paths::guest_cache()).context("cannot make the guest's folder")?;
    let disk = Disk::serve(DISK_BYTES, &socket).context("cannot serve the disk")?;
    let mut rng = fastrand::Rng::with_seed(options.seed);
    let mut witness = Witness::default();
    for round in 0..=cuts {
        let last = if round == cuts { "--last" } else { "" };
        let script = format!("x power-cut --inside {round} {last}");
        let mut job = Job::new(options.kernel, &script, LIMIT);
        job.add_program(&ublkctl, "ublkctl");
        job.disks = vec![disk.address().into()];
        job.silent = true;
        let moment = [Moment::Now, Moment::BeforeFlush, Moment::AfterFlush][rng.usize(..3)];
        let load = Duration::from_millis(rng.u64(300..4000));
        #[expect(clippy::disallowed_methods, reason = "the load runs in real time")]
        let now = Instant::now;
        let (mut ends, mut is_off) = (None, false);
        let outcome = job.run_watched(&mut |line| {
            if let Some(line) = line {
                witness.hear(line);
                if line == "@load" {
                    ends = Some(now() + load);
                }
            }
            match ends {
                Some(end) if now() >= end => {
                    if !is_off {
                        disk.cut(moment);
                        is_off = true;
                    }
                    Go::Off
                }
                _ => Go::On,
            }
        });
        let outcome = outcome.with_context(|| format!("round {round}"))?;
        witness.judge();
        if round == cuts {
            if outcome.status != 0 {
                witness.fault(&format!("the last look ended with {}", outcome.status));
            }
        } else if ends.is_none() {
            // What a cut left may be beyond use: that is what this row counts.
            let last = outcome.output.lines().last().unwrap_or_default();
            witness.fault(&format!("round {round}: no load began: {last}"));
            break;
        } else {
            let loss = disk.restart(&mut rng);
            println!(
                "cut {}: {moment:?} after {} ms of load; {} unflushed sectors, {} lost; so far {}",
                round + 1,
                load.as_millis(),
                loss.unflushed,
                loss.lost,
                witness.summary()
            );
            witness.lost += u64::try_from(loss.lost).unwrap_or(0);
            witness.cuts += 1;
        }
    }
    let mut card = Card::new("R7b", options.quick, Some(options.seed));
    card.at_least("power cuts", witness.cuts, wanted);
    // A few cuts may all have come right behind a flush, when there is next to nothing to lose.
    let least_lost = if options.quick { 1 } else { wanted };
    card.at_least("sectors that the cuts lost", witness.lost, least_lost);
    card.at_least("synced files looked for", witness.files, wanted);
    card.at_least("snapshots replayed and checked", witness.snapshots, wanted);
    card.none("violations", witness.faults);
    Ok(card.into_figures())
}

/// What the guest said that holds, and what it said that it found.
#[derive(Debug, Default)]
struct Witness {
    /// Synced files of a round's writers.
    synced: BTreeMap<(u64, u64), u64>,
    /// Snapshots that were answered, with the files of each writer that they must have.
    taken: BTreeMap<String, Vec<u64>>,
    gone: BTreeSet<String>,
    /// What the current boot found.
    found: Vec<(String, u64, u64, u64)>,
    there: BTreeSet<String>,
    cuts: u64,
    lost: u64,
    files: u64,
    snapshots: u64,
    faults: u64,
}

impl Witness {
    fn hear(&mut self, line: &str) {
        let Some(line) = line.strip_prefix('@') else {
            return;
        };
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().unwrap_or(u64::MAX);
        match words.as_slice() {
            ["bad", ..] => self.fault(line),
            ["files", place, round, writer, count] => {
                let (round, writer) = (number(round), number(writer));
                self.found
                    .push(((*place).to_owned(), round, writer, number(count)));
            }
            ["there", name] => drop(self.there.insert((*name).to_owned())),
            ["load"] => self.judge(),
            ["synced", round, writer, file] => {
                let key = (number(round), number(writer));
                self.synced.insert(key, number(file) + 1);
            }
            ["snapshot", name, counts @ ..] => {
                let counts = counts.iter().map(|count| number(count)).collect();
                self.taken.insert((*name).to_owned(), counts);
            }
            ["gone", name] => drop(self.gone.insert((*name).to_owned())),
            _ => {}
        }
    }

    /// Holds what a boot found against what was answered before it.
    fn judge(&mut self) {
        let found = std::mem::take(&mut self.found);
        if found.is_empty() {
            return;
        }
        let newest = found.iter().map(|(_, round, ..)| *round).max();
        for (place, round, writer, count) in &found {
            let least = if place == "volume" {
                // Earlier rounds were removed when theirs was looked at.
                let due = (Some(*round) == newest).then(|| self.synced.get(&(*round, *writer)));
                due.flatten().copied().unwrap_or(0)
            } else {
                let of_round = place.starts_with(&format!("r{round}-"));
                let counts = self.taken.get(place).filter(|_| of_round);
                let writer = usize::try_from(*writer).unwrap_or(usize::MAX);
                counts
                    .and_then(|counts| counts.get(writer))
                    .copied()
                    .unwrap_or(0)
            };
            self.files += least;
            if *count < least {
                self.fault(&format!(
                    "{place}: writer {writer} of round {round} synced {least} files, {count} are whole"
                ));
            }
        }
        let there = std::mem::take(&mut self.there);
        self.snapshots += there.len() as u64;
        let due: Vec<String> = self.taken.keys().cloned().collect();
        for name in due {
            let number = name.rsplit('-').next().and_then(|word| word.parse().ok());
            let may_be_gone = number.is_none_or(is_removed_again) || self.gone.contains(&name);
            if !may_be_gone && !there.contains(&name) {
                self.fault(&format!(
                    "the snapshot {name} was answered and is not there"
                ));
            }
        }
        // What went in this very boot was there when it began.
        self.taken.retain(|name, _| there.contains(name));
    }

    fn fault(&mut self, text: &str) {
        println!("VIOLATION: {text}");
        self.faults += 1;
    }

    fn summary(&self) -> String {
        format!(
            "{} files and {} snapshots looked at, {} violations",
            self.files, self.snapshots, self.faults
        )
    }
}
