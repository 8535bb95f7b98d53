//! The workloads whose every crash point is visited: what a pool is asked for, by whom, in which order.

use fastrand::Rng;

/// One thing that a pool is asked for. Volumes and snapshots go by their names.
#[derive(Clone, Debug)]
pub enum Step {
    /// Makes a volume of so many blocks; `redirects` all its writes or only those of shared blocks.
    Create(String, u64, bool),
    /// Writes so many blocks from a block on.
    Write(String, u64, u64),
    /// Discards so many blocks from a block on.
    Discard(String, u64, u64),
    /// Writes zeros over so many blocks from a block on.
    Zero(String, u64, u64),
    /// Flushes through a volume.
    Flush(String),
    /// Takes a snapshot of that name of each of the volumes at one point in time.
    Snapshot(Vec<String>, String),
    /// Clones a volume's snapshot into a new volume.
    Clone(String, String, String),
    /// Rolls a volume back to its snapshot.
    Rollback(String, String),
    /// Removes a volume with its snapshots, or one of its snapshots.
    Remove(String, Option<String>),
    /// Changes a volume's size.
    Resize(String, u64),
    /// Renames a volume.
    Rename(String, String),
    /// Makes device and pool larger.
    Grow(u64),
    /// One round of background work.
    Maintain,
    /// Writes a checkpoint.
    Checkpoint,
}

/// What several clients do at once, each one thing after another.
pub type Phase = Vec<Vec<Step>>;

/// A workload: phases, one after another. What `prologue` does is durable before the recording begins.
#[derive(Clone, Debug)]
pub struct Script {
    /// Its name.
    pub name: &'static str,
    /// Blocks of the pool's device.
    pub device_blocks: u64,
    /// Done before.
    pub prologue: Vec<Step>,
    /// Recorded.
    pub phases: Vec<Phase>,
}

/// The smallest pool.
const POOL: u64 = 4096;
/// Where a leaf of the map ends.
const LEAF: u64 = 512;

fn v(name: &str) -> String {
    name.to_owned()
}

fn create(name: &str, blocks: u64, redirects: bool) -> Step {
    Step::Create(v(name), blocks, redirects)
}

fn snapshot(volume: &str, name: &str) -> Step {
    Step::Snapshot(vec![v(volume)], v(name))
}

fn remove(volume: &str, snapshot: Option<&str>) -> Step {
    Step::Remove(v(volume), snapshot.map(v))
}

/// A client that writes here and there in a volume, within so many blocks around a leaf's end, and flushes now and then.
fn writer(volume: &str, count: u32, spread: u64, rng: &mut Rng) -> Vec<Step> {
    let mut steps = Vec::new();
    for _ in 0..count {
        let lba = LEAF - spread / 2 + rng.u64(..spread);
        steps.push(Step::Write(v(volume), lba, 1 + rng.u64(..3)));
        if rng.u8(..5) == 0 {
            steps.push(Step::Flush(v(volume)));
        }
    }
    steps
}

/// The eight workloads, varied by `seed`.
pub fn all(seed: u64) -> Vec<Script> {
    let mut rng = Rng::with_seed(seed);
    let rng = &mut rng;
    vec![
        write(rng),
        overwrite(rng),
        snapshots(rng),
        clones(rng),
        delete(rng),
        discard(rng),
        resize(rng),
        full_pool(rng),
    ]
}

fn write(rng: &mut Rng) -> Script {
    Script {
        name: "write",
        device_blocks: POOL,
        prologue: vec![create("a", 1024, false), create("b", 1024, true)],
        phases: vec![
            vec![
                writer("a", 14, 40, rng),
                writer("a", 14, 40, rng),
                writer("b", 14, 40, rng),
            ],
            vec![vec![Step::Checkpoint], writer("b", 10, 20, rng)],
            vec![writer("a", 6, 40, rng), writer("b", 6, 40, rng)],
        ],
    }
}

fn overwrite(rng: &mut Rng) -> Script {
    let whole = |volume: &str| Step::Write(v(volume), LEAF - 10, 20);
    Script {
        name: "overwrite",
        device_blocks: POOL,
        prologue: vec![
            create("a", 1024, false),
            create("b", 1024, true),
            whole("a"),
            whole("b"),
        ],
        phases: vec![
            vec![
                writer("a", 14, 16, rng),
                writer("b", 14, 16, rng),
                writer("b", 8, 16, rng),
            ],
            vec![
                writer("b", 10, 16, rng),
                vec![Step::Maintain, Step::Checkpoint, Step::Maintain],
            ],
            vec![writer("a", 8, 16, rng), writer("b", 8, 16, rng)],
        ],
    }
}

fn snapshots(rng: &mut Rng) -> Script {
    let both = |name: &str| Step::Snapshot(vec![v("a"), v("b")], v(name));
    Script {
        name: "snapshot",
        device_blocks: POOL,
        prologue: vec![
            create("a", 1024, false),
            create("b", 1024, false),
            Step::Write(v("a"), LEAF - 10, 20),
        ],
        phases: vec![
            vec![
                writer("a", 8, 16, rng),
                writer("b", 8, 16, rng),
                vec![both("s1"), both("s2")],
            ],
            vec![
                writer("a", 8, 16, rng),
                vec![snapshot("a", "s3"), Step::Checkpoint],
            ],
            vec![
                vec![Step::Rollback(v("a"), v("s1"))],
                writer("b", 6, 8, rng),
            ],
            vec![
                writer("a", 6, 16, rng),
                vec![both("s4"), Step::Remove(v("b"), Some(v("s1")))],
            ],
        ],
    }
}

fn clones(rng: &mut Rng) -> Script {
    let clone = |volume: &str, snapshot: &str, to: &str| Step::Clone(v(volume), v(snapshot), v(to));
    Script {
        name: "clone",
        device_blocks: POOL,
        prologue: vec![
            create("a", 1024, false),
            Step::Write(v("a"), LEAF - 10, 20),
            snapshot("a", "s1"),
        ],
        phases: vec![
            vec![writer("a", 6, 16, rng), vec![clone("a", "s1", "c1")]],
            vec![writer("c1", 8, 16, rng), writer("a", 8, 16, rng)],
            vec![vec![snapshot("c1", "t"), clone("c1", "t", "c2")]],
            vec![
                writer("c2", 8, 16, rng),
                writer("c1", 4, 16, rng),
                vec![remove("a", Some("s1"))],
            ],
            vec![
                vec![Step::Rename(v("c2"), v("d"))],
                writer("c1", 4, 16, rng),
            ],
            vec![vec![remove("c1", None)], writer("d", 6, 16, rng)],
            vec![
                vec![Step::Maintain, Step::Checkpoint],
                writer("d", 4, 8, rng),
            ],
        ],
    }
}

fn delete(rng: &mut Rng) -> Script {
    Script {
        name: "delete",
        device_blocks: POOL,
        prologue: vec![
            create("a", 1024, false),
            create("b", 1024, false),
            Step::Write(v("a"), LEAF - 20, 40),
            Step::Write(v("b"), LEAF - 20, 40),
            snapshot("a", "s1"),
            Step::Write(v("a"), LEAF - 5, 10),
            snapshot("a", "s2"),
            Step::Write(v("a"), LEAF, 5),
        ],
        phases: vec![
            vec![
                vec![remove("a", Some("s1")), Step::Maintain, Step::Maintain],
                writer("b", 10, 16, rng),
            ],
            vec![
                vec![Step::Maintain, Step::Checkpoint, Step::Maintain],
                writer("a", 10, 24, rng),
            ],
            vec![
                vec![remove("a", Some("s2")), Step::Maintain],
                writer("a", 10, 24, rng),
            ],
            vec![
                vec![remove("b", None), Step::Maintain, Step::Checkpoint],
                writer("a", 8, 24, rng),
            ],
            vec![
                vec![create("b", 1024, true), Step::Maintain],
                writer("a", 4, 24, rng),
            ],
            vec![writer("b", 6, 24, rng), vec![Step::Maintain]],
        ],
    }
}

fn discard(rng: &mut Rng) -> Script {
    let holes = |volume: &str, rng: &mut Rng| -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..6 {
            let (lba, count) = (LEAF - 8 + rng.u64(..12), 1 + rng.u64(..4));
            steps.push(match rng.u8(..3) {
                0 => Step::Zero(v(volume), lba, count),
                1 => Step::Write(v(volume), lba, count),
                _ => Step::Discard(v(volume), lba, count),
            });
            if rng.u8(..3) == 0 {
                steps.push(Step::Flush(v(volume)));
            }
        }
        steps
    };
    Script {
        name: "discard",
        device_blocks: POOL,
        prologue: vec![
            create("a", 2048, false),
            create("b", 2048, true),
            Step::Write(v("a"), LEAF - 12, 24),
            Step::Write(v("b"), LEAF - 12, 24),
            snapshot("a", "s1"),
            Step::Write(v("a"), LEAF - 2, 4),
        ],
        phases: vec![
            vec![holes("a", rng), holes("b", rng), writer("a", 6, 24, rng)],
            vec![
                vec![Step::Discard(v("a"), 0, LEAF), Step::Maintain],
                holes("b", rng),
            ],
            vec![
                vec![Step::Checkpoint, Step::Maintain],
                writer("a", 6, 24, rng),
                holes("b", rng),
            ],
            vec![
                vec![snapshot("b", "s2"), Step::Discard(v("b"), LEAF, LEAF)],
                holes("a", rng),
            ],
        ],
    }
}

fn resize(rng: &mut Rng) -> Script {
    Script {
        name: "resize",
        device_blocks: POOL,
        prologue: vec![
            create("a", 1024, false),
            create("b", 1024, true),
            Step::Write(v("a"), LEAF - 10, 20),
            Step::Write(v("b"), LEAF - 10, 20),
            snapshot("a", "s1"),
        ],
        phases: vec![
            vec![vec![Step::Resize(v("a"), LEAF)], writer("b", 8, 16, rng)],
            vec![vec![Step::Resize(v("a"), 300_000)], writer("b", 8, 16, rng)],
            vec![writer("a", 8, 16, rng), writer("b", 8, 16, rng)],
            vec![vec![Step::Grow(POOL + 2048)], writer("b", 8, 16, rng)],
            vec![
                vec![Step::Resize(v("b"), LEAF + 3)],
                writer("a", 8, 16, rng),
            ],
            vec![
                vec![Step::Resize(v("a"), 1024), Step::Checkpoint],
                writer("b", 4, 1, rng),
            ],
            vec![vec![Step::Grow(POOL + 4096)], writer("a", 6, 16, rng)],
            vec![
                vec![Step::Rollback(v("a"), v("s1"))],
                writer("b", 4, 1, rng),
            ],
        ],
    }
}

fn full_pool(rng: &mut Rng) -> Script {
    let fill = |volume: &str, from: u64, count: u64| -> Vec<Step> {
        (0..count)
            .map(|index| Step::Write(v(volume), from + 128 * index, 128))
            .collect()
    };
    let mut prologue = vec![create("a", 8192, false), create("b", 8192, false)];
    prologue.extend(fill("a", 1024, 20));
    prologue.push(Step::Write(v("b"), LEAF - 10, 20));
    prologue.push(snapshot("b", "s1"));
    Script {
        name: "full pool",
        device_blocks: POOL,
        prologue,
        phases: vec![
            vec![
                (0..8)
                    .map(|index| Step::Write(v("a"), 4000 + 40 * index, 40))
                    .collect(),
                writer("b", 6, 16, rng),
            ],
            vec![
                writer("b", 6, 16, rng),
                vec![snapshot("a", "t"), remove("b", Some("s1")), Step::Maintain],
            ],
            vec![
                vec![Step::Discard(v("a"), 1024, 40), Step::Checkpoint],
                writer("b", 6, 16, rng),
            ],
            vec![
                vec![remove("a", Some("t")), Step::Maintain, Step::Checkpoint],
                writer("b", 6, 16, rng),
            ],
            vec![vec![Step::Maintain], writer("b", 6, 40, rng)],
        ],
    }
}
