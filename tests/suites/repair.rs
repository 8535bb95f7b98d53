//! Damaged metadata: it is told from whole metadata, what needs no guessing is mended, and the rest stays usable.

use blockfork::clock::ManualClock;
use blockfork::pool::{OpenOptions, Pool, RepairOptions, RepairPlan, RingPlace};
use blockfork_tests::damage::{BLOCK_BITS, Damage, Scene};
use blockfork_tests::fixture::{attach, open, path, put, reclaim};
use blockfork_tests::parallel;
use blockfork_tests::sim_device::{Loss, SimDevice};
use fastrand::Rng;
use futures_lite::future::block_on;
use std::sync::Arc;

const COUNTS: u8 = 2;
const COUNT_INDEX: u8 = 4;
const MAP: u8 = 1;
const SUPERBLOCK: u8 = 100;
const JOURNAL: u8 = 101;

fn options(device: &SimDevice) -> OpenOptions {
    OpenOptions {
        read_only: false,
        device_blocks: device.blocks(),
        ring: RingPlace::Nowhere,
        clock: Arc::new(ManualClock::default()),
    }
}

fn repair(device: &SimDevice, discards_journal: bool) -> blockfork::error::Result<RepairPlan> {
    let repair = RepairOptions { discards_journal };
    block_on(Pool::repair(
        device,
        options(device),
        repair,
        &mut |_, _| {},
    ))
}

#[test]
fn a_sample_of_all_damage_is_detected_or_harmless() {
    let mut wrong = Vec::new();
    for scene in [Scene::crashed(), Scene::closed()] {
        let mut damages: Vec<Damage> = scene.damages().into_iter().step_by(7).collect();
        for &block in scene.live() {
            let bits = (block % 4099..BLOCK_BITS).step_by(4099);
            damages.extend(bits.map(|bit| Damage::Flip { block, bit }));
        }
        let (outcomes, panics) = parallel::each(0..damages.len() as u64, |number| {
            scene.judge(damages[usize::try_from(number).unwrap()])
        });
        wrong.extend(outcomes.into_iter().filter_map(Result::err));
        wrong.extend(panics.into_iter().map(|panic| panic.message));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_repair_brings_back_every_superblock_and_count_page() {
    for scene in [Scene::crashed(), Scene::closed()] {
        for kind in [SUPERBLOCK, COUNTS, COUNT_INDEX] {
            for block in scene.live_of(kind) {
                let device = scene.damaged(&[Damage::Zero { block }]);
                let plan = repair(&device, false).unwrap();
                assert!(
                    plan.mends_something() && !plan.leaves_something(),
                    "{plan:?}"
                );
                assert_eq!(scene.is_whole(&device), Ok(true), "block {block}");
            }
        }
    }
}

#[test]
fn a_repair_cut_short_at_any_operation_goes_on_to_the_same_end() {
    for scene in [Scene::crashed(), Scene::closed()] {
        let damages: Vec<Damage> = [SUPERBLOCK, COUNTS, COUNT_INDEX]
            .into_iter()
            .map(|kind| Damage::Zero {
                block: scene.live_of(kind)[0],
            })
            .collect();
        let mut rng = Rng::with_seed(1);
        for operations in 0.. {
            let device = scene.damaged(&damages);
            device.fail_after(operations);
            let is_done = repair(&device, false).is_ok();
            let loss = [Loss::All, Loss::None, Loss::Some][rng.usize(..3)];
            device.restart(loss, &mut rng);
            let plan = repair(&device, false).unwrap();
            assert!(!plan.leaves_something(), "{plan:?}");
            assert_eq!(scene.is_whole(&device), Ok(true), "cut after {operations}");
            if is_done {
                assert!(operations > 20, "{operations}");
                break;
            }
        }
    }
}

#[test]
fn a_plan_changes_nothing_and_a_whole_pool_needs_none() {
    for scene in [Scene::crashed(), Scene::closed()] {
        for damages in [
            vec![],
            vec![Damage::Zero {
                block: scene.live_of(COUNTS)[0],
            }],
        ] {
            let device = scene.damaged(&damages);
            let before = device.with_bytes(|bytes| bytes.to_vec());
            let (opening, repair) = (options(&device), RepairOptions::default());
            let plan = block_on(Pool::plan_repair(&device, &opening, repair, &mut |_, _| {}));
            assert_eq!(plan.unwrap().mends_something(), !damages.is_empty());
            assert!(device.with_bytes(|bytes| *bytes == before[..]));
        }
    }
}

#[test]
fn a_map_page_that_is_lost_takes_its_volume_and_nothing_else() {
    let scene = Scene::closed();
    for block in scene.live_of(MAP) {
        // Counts are lost too: what the unreadable map names must not be given to others.
        let counts = scene.live_of(COUNTS)[1];
        let damages = [Damage::Zero { block }, Damage::Zero { block: counts }];
        for damages in [&damages[..1], &damages[..]] {
            let device = scene.damaged(damages);
            let plan = repair(&device, false).unwrap();
            assert!(plan.leaves_something(), "{plan:?}");
            let pool = open(&device).unwrap();
            let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
            assert_eq!(report.damage.len(), 1, "{report:?}");
            let lost = report
                .unreadable
                .iter()
                .filter_map(|lost| lost.path.clone());
            let lost: Vec<_> = lost.collect();
            assert!(!lost.is_empty());
            // Once nobody wants what is lost, everything is proven again and the space comes back.
            block_on(pool.remove(&device, &lost, true, false)).unwrap();
            reclaim(&device, &pool);
            block_on(pool.close(&device)).unwrap();
            drop(pool);
            let plan = repair(&device, false).unwrap();
            assert!(!plan.leaves_something(), "{plan:?}");
            let pool = open(&device).unwrap();
            let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
            assert_eq!(
                (report.exit_code(), report.unreadable.len()),
                (0, 0),
                "{report:?}"
            );
            let left = block_on(pool.list(&device)).unwrap();
            for entry in left.iter().filter(|entry| entry.path.snapshot.is_none()) {
                let attached = pool.attach(&entry.path, false).unwrap();
                put(&device, &attached, 0, 8, 9).unwrap();
            }
        }
    }
}

#[test]
fn a_journal_that_lost_a_durable_block_is_gone_back_before_only_when_asked() {
    let scene = Scene::crashed();
    let block = scene.live_of(JOURNAL)[1];
    let device = scene.damaged(&[Damage::Zero { block }]);
    let plan = repair(&device, false).unwrap();
    assert!(
        plan.leaves_something() && !plan.mends_something(),
        "{plan:?}"
    );
    assert!(open(&device).is_err());

    let reading = OpenOptions {
        read_only: true,
        ..options(&device)
    };
    let pool = Arc::new(block_on(Pool::open(&device, reading)).unwrap());
    assert!(pool.attach(&path("a"), true).is_err());
    assert!(pool.attach(&path("a@1"), true).is_ok());
    drop(pool);

    let plan = repair(&device, true).unwrap();
    assert!(!plan.leaves_something(), "{plan:?}");
    let pool = open(&device).unwrap();
    put(&device, &attach(&pool, "a"), 100, 4, 3).unwrap();
    block_on(pool.flush(&device)).unwrap();
    drop(pool);
    // What the journal held behind the damage does not come back with the next crash.
    let pool = open(&device).unwrap();
    let report = block_on(pool.check(&device, &mut |_, _| {})).unwrap();
    assert_eq!(report.exit_code(), 0, "{report:?}");
}
