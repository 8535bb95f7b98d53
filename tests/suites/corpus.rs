//! Every input that fuzzing found worth keeping, run again, with the memory that each takes held against its bound.

use blockfork_tests::fuzz::{Counting, TARGETS, Target, peak_of, seeds};
use std::fs;
use std::path::{Path, PathBuf};

#[global_allocator]
static COUNTING: Counting = Counting;

fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name)
}

fn inputs(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder(target))
        .unwrap_or_else(|e| panic!("{}: {e}", folder(target).display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

#[test]
fn the_corpus_passes_within_its_memory() {
    for target in TARGETS {
        // What a target keeps for all its runs is made by the first one.
        (target.run)(&[]);
        for (path, bytes) in inputs(target) {
            println!("{}", path.display());
            target.hold(&bytes);
        }
    }
}

#[test]
fn the_corpus_is_small_and_every_target_has_one() {
    let mut total = 0;
    for target in TARGETS {
        let inputs = inputs(target);
        assert!(
            (1..=60).contains(&inputs.len()),
            "{}: {}",
            target.name,
            inputs.len()
        );
        total += inputs.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    }
    assert!(total <= 1 << 20, "{total} bytes");
}

/// With `$SEEDS` they are written below that folder too, for a corpus that begins anew.
#[test]
fn real_metadata_and_requests_pass() {
    let to = std::env::var_os("SEEDS").map(PathBuf::from);
    for target in TARGETS {
        (target.run)(&[]);
        let seeds = seeds(target.name);
        assert!(!seeds.is_empty(), "{}", target.name);
        for (number, seed) in seeds.iter().enumerate() {
            target.hold(seed);
            if let Some(to) = &to {
                fs::create_dir_all(to.join(target.name)).unwrap();
                fs::write(to.join(target.name).join(format!("seed-{number}")), seed).unwrap();
            }
        }
    }
}

#[test]
fn memory_is_measured() {
    let peak = peak_of(|| drop(vec![1_u8; 100_000]));
    assert!((100_000..200_000).contains(&peak), "{peak}");
}
