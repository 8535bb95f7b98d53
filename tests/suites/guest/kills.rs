//! kill -9 of the daemon again and again, at moments drawn by seed, under a load that verifies all the while.
//! `cargo x kill` runs this longer.

use std::thread::sleep;
use std::time::Duration;

use blockfork_tests::guest::{Background, Device, MIB, Pool, eventually, from_environment, shell};
use fastrand::Rng;

const LOAD_BYTES: u64 = 48 * MIB;
/// Each keeps up to so much of the load, and the RAM disk has 1 GiB.
const SNAPSHOTS_MAX: usize = 8;

/// When the daemon dies.
#[derive(Clone, Copy, Debug)]
enum Moment {
    UnderLoad,
    AfterAStop,
    InASnapshot,
    InAReclaim,
    InACheckpoint,
    InARecovery,
}

const MOMENTS: [Moment; 6] = [
    Moment::UnderLoad,
    Moment::AfterAStop,
    Moment::InASnapshot,
    Moment::InAReclaim,
    Moment::InACheckpoint,
    Moment::InARecovery,
];

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn no_kill_loses_an_acknowledged_write() {
    let cycles = from_environment("BLOCKFORK_CYCLES", 25);
    let seed = from_environment("BLOCKFORK_SEED", 0);
    let mut rng = Rng::with_seed(seed);
    let pool = Pool::on_ram_disk("kills");
    let device = pool.volume("v", "64M");
    device.fill(0, LOAD_BYTES, seed);
    pool.snapshot("v@base");
    let (mut loads, mut snapshots) = (0, Snapshots::default());
    let mut load = start(&device, loads);
    for cycle in 0..cycles {
        sleep(Duration::from_millis(rng.u64(..300)));
        if !load.is_running() {
            load.succeeds();
            loads += 1;
            load = start(&device, loads);
        }
        let moment = MOMENTS[rng.usize(..MOMENTS.len())];
        println!("cycle {cycle}: killed {moment:?}");
        kill(&pool, moment, cycle, &mut snapshots, &mut rng);
        pool.recover();
        assert!(
            std::path::Path::new(&device.path).exists(),
            "{} is gone",
            device.path
        );
        pool.ctl(&["pool", "check", "kills"]);
        let listed = pool.ctl(&["list", "kills", "-H", "-o", "name"]);
        snapshots.compare(|name| listed.lines().any(|line| line == pool.target(name)));
        while snapshots.kept.len() > SNAPSHOTS_MAX {
            let oldest = snapshots.kept.remove(0);
            pool.ctl(&["rm", &pool.target(&oldest)]);
            snapshots.removed.push(oldest);
        }
    }
    load.succeeds();
    let base = pool.attach("v@base");
    assert!(base.holds(0, LOAD_BYTES, seed), "the snapshot changed");
    pool.check();
    println!("@ cycles {cycles}");
    println!("@ loads {}", loads + 1);
}

/// What became of the snapshots that were asked for.
#[derive(Default)]
struct Snapshots {
    kept: Vec<String>,
    removed: Vec<String>,
    /// One that was never answered: whether it took effect is open until somebody looks.
    open: Option<String>,
}

impl Snapshots {
    /// Holds them against what the pool has.
    fn compare(&mut self, is_there: impl Fn(&str) -> bool) {
        for name in &self.kept {
            assert!(is_there(name), "the acknowledged snapshot {name} is lost");
        }
        for name in &self.removed {
            assert!(!is_there(name), "the removed snapshot {name} is back");
        }
        self.kept
            .extend(self.open.take().filter(|name| is_there(name)));
    }
}

/// Writes each block once in random order; reads what it wrote back while it goes on, and all of it at the end.
fn start(device: &Device, number: u64) -> Background {
    Background::start(&device.fio(&format!(
        "--rw=randwrite --bs=4k --iodepth=16 --size={LOAD_BYTES} --rate=,6m --randseed={number} \
         --verify_backlog=1024 --verify_backlog_batch=256"
    )))
}

fn kill(pool: &Pool, moment: Moment, cycle: u64, snapshots: &mut Snapshots, rng: &mut Rng) {
    let pause = Duration::from_millis(rng.u64(..60));
    match moment {
        Moment::UnderLoad => pool.kill_daemon(),
        Moment::AfterAStop => {
            let pid = pool.daemon().expect("the daemon has a pid file");
            shell(&format!("kill -STOP {pid}"));
            sleep(pause);
            pool.kill_daemon();
        }
        Moment::InASnapshot => {
            let name = format!("v@s{cycle}");
            let command = pool.start_ctl(&["snapshot", &pool.target(&name)]);
            sleep(pause);
            pool.kill_daemon();
            if command.ends() {
                snapshots.kept.push(name);
            } else {
                snapshots.open = Some(name);
            }
        }
        Moment::InAReclaim => {
            let name = format!("v@r{cycle}");
            pool.snapshot(&name);
            sleep(pause);
            pool.ctl(&["rm", &pool.target(&name)]);
            snapshots.removed.push(name);
            sleep(pause);
            pool.kill_daemon();
        }
        Moment::InACheckpoint => {
            // The check begins with one.
            let command = pool.start_ctl(&["pool", "check", "kills"]);
            sleep(pause);
            pool.kill_daemon();
            command.ends();
        }
        Moment::InARecovery => {
            pool.kill_daemon();
            let command = pool.start_ctl(&["recover", "kills"]);
            let mut found = None;
            eventually("the next daemon starts", || {
                found = pool.serving();
                found.is_some()
            });
            sleep(4 * pause);
            let pid = found.expect("it was found");
            shell(&format!("kill -9 {pid}"));
            command.ends();
            pool.await_end(&pid);
        }
    }
}
