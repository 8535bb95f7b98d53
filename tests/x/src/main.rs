//! `cargo x`: every developer command, one file per verb.

mod bench;
mod command;
mod demo;
mod figures;
mod fuzz;
mod guest;
mod hostile;
mod kill_nbd;
mod paths;
mod power_cut;
mod profile;
mod quick;
mod row;
mod scale;
mod sched;
mod scorecard;
mod seeded_bugs;
mod setup;
mod strength;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo x",
    about = "Every developer command of blockfork",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what building and testing need (Debian packages)
    Setup,
    /// The main job on real data: create, snapshot, clone, roll back, kill, recover, check
    Demo(demo::Options),
    /// Compare with its peers in instruction-counted time, for docs/performance.md
    Bench(bench::Options),
    /// Where the daemon's time goes under a fio job: a flame graph
    Profile(profile::Options),
    /// R7 of the scorecard, over NBD: kill the daemon under verifying clients, and compare every block
    KillNbd(kill_nbd::Options),
    /// Every row of the scorecard, in one table: what is proven, and how far
    Scorecard(scorecard::Options),
    /// Scale: snapshots, volumes, depth, size and time, of which it must not notice how many, for docs/scaling.md
    Scale(scale::Options),
    /// R4 of the scorecard: change the code in one place at a time, and count the changes that no test notices
    Mutants(strength::mutants::Options),
    /// R4 of the scorecard: the lines that tests reach where a mistake loses data
    Coverage(strength::coverage::Options),
    /// What every commit passes: fmt, clippy, rustdoc, tidy
    Quick,
    /// Everything: unit tests, suites, and real devices in the guest on both kernels
    Test(test::Options),
    /// What is too long for every change: all tests, then every row of the scorecard at full size
    Nightly,
    /// Scorecard R7: kill the daemon and take its devices back, under a load that verifies
    Kill(row::Options),
    /// Scorecard R7b: cut the guest's power under a file system, and look at what is left
    PowerCut(power_cut::Options),
    /// Scorecard R14: attach and detach a device many times
    Churn(row::Options),
    /// Put historical bugs back, one at a time: the harness must find each (row R3 of the scorecard)
    SeededBugs(seeded_bugs::Options),
    /// R10: schedules (shuttle), memory orders (loom) and linearizable histories
    Sched(sched::Options),
    /// R4 of the scorecard: the engine's unit tests under Miri, which finds undefined behaviour
    Miri(strength::miri::Options),
    /// R5: every decoder, a whole pool and operations on it, under libFuzzer with the address sanitizer
    Fuzz(fuzz::Options),
    /// R13: hostile arguments, socket bytes, images and users against the real program
    Hostile(hostile::Options),
    /// The rules of this repository that no compiler knows
    Tidy {
        /// Note that docs/format.md describes the format as it is now
        #[arg(long)]
        bless: bool,
    },
    /// Run a shell command in a virtual machine that has ublk
    Guest {
        /// The guest's kernel: "new" (the newest cloud kernel of Debian's backports) or "6.12"
        #[arg(long, default_value = "new")]
        kernel: guest::Kernel,
        /// Let the guest's clock count instructions, so that times repeat
        #[arg(long)]
        icount: bool,
        /// Attach an image file as /dev/vda, the next one as /dev/vdb, ...
        #[arg(long, value_name = "FILE")]
        disk: Vec<PathBuf>,
        /// Copy a program (with its libraries) or a file into the guest's /root
        #[arg(long, value_name = "FILE")]
        add: Vec<PathBuf>,
        /// Kill the guest after so many seconds
        #[arg(long, default_value_t = 600)]
        limit: u64,
        /// Start without ublkctl
        #[arg(long)]
        bare: bool,
        /// The command; several words are joined with blanks
        #[arg(
            last = true,
            default_value = "uname -a; lsmod; ls -l /dev/ublk-control"
        )]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("x: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Setup => setup::install_missing()?,
        Verb::Demo(options) => return demo::run(&options),
        Verb::Bench(options) => return bench::run(&options),
        Verb::Profile(options) => return profile::run(&options),
        Verb::KillNbd(options) => return kill_nbd::run(&options),
        Verb::Scale(options) => return scale::run(&options),
        Verb::Mutants(options) => return strength::mutants::run(&options),
        Verb::Coverage(options) => return strength::coverage::run(&options),
        Verb::Quick => return quick::run(),
        Verb::Nightly => {
            let tested = test::run(&test::Options::default())?;
            let scored = scorecard::full()?;
            let worst = if tested == ExitCode::SUCCESS {
                scored
            } else {
                tested
            };
            return Ok(worst);
        }
        Verb::Scorecard(options) => return scorecard::run(&options),
        Verb::Test(options) => return test::run(&options),
        Verb::Kill(options) => return row::kill(&options),
        Verb::PowerCut(options) => return power_cut::run(&options),
        Verb::Churn(options) => return row::churn(&options),
        Verb::SeededBugs(options) => return seeded_bugs::run(&options),
        Verb::Sched(options) => return sched::run(&options),
        Verb::Miri(options) => return strength::miri::run(&options),
        Verb::Hostile(options) => return hostile::run(&options),
        Verb::Fuzz(options) => return fuzz::run(&options),
        Verb::Tidy { bless } => tidy::run(bless)?,
        Verb::Guest {
            kernel,
            icount,
            disk,
            add,
            limit,
            bare,
            command,
        } => {
            setup::install_missing()?;
            let mut job = guest::Job::new(kernel, &command.join(" "), Duration::from_secs(limit));
            job.instruction_clock = icount;
            job.disks = disk;
            for file in add {
                job.add_to_root(&file)?;
            }
            if !bare {
                job.add_program(&command::build_ublkctl()?, "ublkctl");
            }
            let outcome = job.run()?;
            return Ok(ExitCode::from(outcome.status));
        }
    }
    Ok(ExitCode::SUCCESS)
}
