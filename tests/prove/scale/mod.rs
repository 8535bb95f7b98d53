//! `prove scale`: what must not notice how much there is of it: snapshots, volumes, depth, blocks, time. One file for
//! each scene.

mod day;
mod deleting;
mod depth;
mod huge;
mod journal;
mod kit;
mod metadata;
mod probe;
mod ram;
mod snapshots;
mod sparse;
mod volumes;

use crate::Common;
use blockfork::clock::{Clock, SystemClock};
use score::{Card, Figure};
use std::path::PathBuf;

/// What is run, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only these scenes: snapshots, volumes, depth, huge, metadata, journal, day, deleting
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Where pool files are made; at full size they take up to 10 GiB
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Write what is drawn into this file: a line for each number of snapshots
    #[arg(long, value_name = "FILE")]
    curve: Option<PathBuf>,
    /// Look at the pool that the scene `huge` has built in this folder, in a process of its own
    #[arg(long, value_name = "FOLDER", hide = true)]
    probe: Option<PathBuf>,
}

/// What every scene is told.
#[derive(Debug)]
struct Setting {
    quick: bool,
    seed: u64,
    folder: PathBuf,
    curve: Option<PathBuf>,
}

impl Setting {
    /// One size or the other.
    fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// A scene by its name, and the row of its figures.
struct Scene {
    name: &'static str,
    row: &'static str,
    run: fn(&Setting, &mut Card),
}

const fn scene(name: &'static str, row: &'static str, run: fn(&Setting, &mut Card)) -> Scene {
    Scene { name, row, run }
}

/// In the order of the table.
const SCENES: [Scene; 8] = [
    scene("snapshots", "S1", snapshots::run),
    scene("volumes", "S2", volumes::run),
    scene("depth", "S3", depth::run),
    scene("huge", "S4", huge::run),
    scene("metadata", "S5", metadata::run),
    scene("journal", "S6", journal::run),
    scene("day", "S7", day::run),
    scene("deleting", "S8", deleting::run),
];

pub(crate) fn run(common: Common, options: &Options) -> Vec<Figure> {
    if let Some(folder) = &options.probe {
        probe::run(folder, common.seed);
        return Vec::new();
    }
    let setting = Setting {
        quick: common.quick,
        seed: common.seed,
        folder: options.folder.clone().unwrap_or_else(std::env::temp_dir),
        curve: options.curve.clone(),
    };
    let known = |name: &String| SCENES.iter().any(|scene| scene.name == name);
    if let Some(name) = options.only.iter().find(|name| !known(name)) {
        let names: Vec<_> = SCENES.iter().map(|scene| scene.name).collect();
        eprintln!(
            "prove: {name}: no such scene; there are {}",
            names.join(", ")
        );
        return Vec::new();
    }
    let mut figures = Vec::new();
    for scene in &SCENES {
        if options.only.is_empty() || options.only.iter().any(|name| name == scene.name) {
            let clock = SystemClock::new();
            let mut card = common.card(scene.row);
            (scene.run)(&setting, &mut card);
            figures.extend(card.into_figures());
            let seconds = clock.monotonic_ns() / 1_000_000_000;
            eprintln!("prove: scene {}: {seconds} s", scene.name);
        }
    }
    figures
}
