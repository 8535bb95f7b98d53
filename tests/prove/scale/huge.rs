//! A tebibyte mapped in random blocks of 4 KiB: what opening it takes, and what it takes in memory. The data itself is never
//! written; the metadata is all there.

use super::Setting;
use super::journal::{SECONDS_MAX, wear_by_discards};
use super::kit::{Bench, seconds, timed};
use super::sparse::{Hurried, Place};
use blockfork::pool::Redirect;
use fastrand::Rng;
use score::{Card, Target};
use std::path::Path;
use std::process::{Command, Stdio};

const OPEN_SECONDS_MAX: f64 = 1.0;
const OPEN_MIB_MAX: f64 = 64.0;
const GIB_PER_TIB_MAX: f64 = 3.0;
const READS_KEPT_MIN: f64 = 0.5;
/// Blocks within which the order is random: 1 GiB.
const WINDOW: u64 = 1 << 18;

pub(super) fn run(setting: &Setting, card: &mut Card) {
    let blocks: u64 = setting.pick(1 << 22, 1 << 28);
    let pool_blocks = blocks + blocks / 8;
    let mut rng = Rng::with_seed(setting.seed);
    let place = Place::new(&setting.folder, "huge", pool_blocks);
    let bench = Bench::create(Hurried(place.device()), pool_blocks);
    let volume = bench.volume("v", blocks, Redirect::Shared);
    let ((), ns) = timed(|| bench.fill_at_random(&volume, WINDOW, &mut rng));
    let mapped = volume.stats().redirected_blocks;
    volume.detach();
    drop(volume);
    drop(bench.close());
    eprintln!(
        "prove: {mapped} blocks mapped in {:.0} s; the file takes {} MiB",
        seconds(ns),
        place.bytes_taken() >> 20
    );
    card.at_least("blocks mapped at random", mapped, blocks);
    let found = probe(place.folder(), setting.seed);
    for (name, metric, target) in [
        (
            "open_s",
            "seconds to open",
            Target::AtMost(OPEN_SECONDS_MAX),
        ),
        (
            "open_mib",
            "MiB of memory before the first I/O",
            Target::AtMost(OPEN_MIB_MAX),
        ),
        (
            "io_gib_per_tib",
            "GiB of memory per TiB under random I/O",
            Target::AtMost(GIB_PER_TIB_MAX),
        ),
        (
            "reads_kept",
            "4k reads with a quarter of the metadata in memory as a part of those with all",
            Target::AtLeast(READS_KEPT_MIN),
        ),
    ] {
        match found.iter().find(|(found, _)| found == name) {
            Some((_, value)) => card.add(metric, *value, target),
            None => panic!("the probe did not come to measure: {metric}"),
        }
    }
    let bench = Bench::open(Hurried(place.device()), pool_blocks);
    let volume = bench.attach("v");
    wear_by_discards(&bench, &volume, &mut rng);
    drop(volume);
    drop(bench);
    let device = place.device();
    let (bench, ns) = timed(|| Bench::open(device, pool_blocks));
    drop(bench);
    card.add(
        "seconds to open after a crash amid discards",
        seconds(ns),
        Target::AtMost(SECONDS_MAX),
    );
}

/// What a process of its own finds: memory that this one has used and freed would hide what opening takes.
fn probe(folder: &Path, seed: u64) -> Vec<(String, f64)> {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["scale", "--seed", &seed.to_string(), "--probe"]);
    command
        .arg(folder)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = command.output().expect("the probe starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("@ ")?.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    found.collect()
}
