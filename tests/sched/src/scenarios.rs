//! What meets what. Two or three queues with a handful of requests each: enough for every pair, few enough for many
//! schedules. Each scenario gives what its queues do; [`World::end`] says what must hold.

use crate::world::World;
use shuttle::thread::JoinHandle;
use std::sync::Arc;

/// Starts the queues of a scenario.
pub(crate) type Scenario = fn(&Arc<World>) -> Vec<JoinHandle<()>>;

/// All of them.
pub(crate) const ALL: [(&str, Scenario); 11] = [
    ("write-write", write_write),
    ("sectors", sectors),
    ("write-snapshot", write_snapshot),
    ("write-discard", write_discard),
    ("write-flush", write_flush),
    ("snapshot-remove-reclaim", snapshot_remove_reclaim),
    ("checkpoint-all", checkpoint_all),
    ("read-reuse", read_reuse),
    ("rollback", rollback),
    ("detach", detach),
    ("two-snapshots", two_snapshots),
];

/// Overlapping writes: one winner for each block.
fn write_write(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.write(0, 0, 2).await;
            world.write(0, 2, 1).await;
        }),
        world.queue(async |world| {
            world.write(0, 1, 3).await;
            world.read(0, 0, 3).await;
        }),
        world.queue(async |world| world.write(0, 0, 1).await),
    ]
}

/// Writes of sectors of one block, which all read, merge and write it: none is lost, whatever a snapshot does.
fn sectors(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    let writers = (1..=2).map(|sector| {
        world.queue(async move |world| {
            world.write_sector(sector, sector).await;
            world.write_sector(sector + 4, sector).await;
            let found = world.sectors().await;
            let mine = [sector, sector + 4].map(|at| found[at as usize]);
            assert_eq!(mine, [sector; 2], "a sector was lost");
        })
    });
    let mut queues: Vec<_> = writers.collect();
    queues.push(world.queue(async |world| world.snapshot("s").await));
    queues
}

/// Writes in place and redirected ones around a snapshot of both volumes.
fn write_snapshot(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.write(0, 1, 1).await;
            world.write(1, 1, 1).await;
            world.write(0, 1, 1).await;
        }),
        world.queue(async |world| {
            world.write(1, 2, 2).await;
            world.read(0, 1, 1).await;
            world.write(0, 0, 1).await;
        }),
        world.queue(async |world| world.snapshot("s").await),
    ]
}

/// Discards of what is written at the same time, and what others share.
fn write_discard(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.write(0, 1, 2).await;
            world.read(0, 0, 4).await;
        }),
        world.queue(async |world| {
            world.discard(0, 1, 3).await;
            world.write(0, 3, 1).await;
        }),
        world.queue(async |world| {
            world.snapshot("s").await;
            world.discard(0, 2, 1).await;
        }),
    ]
}

/// A flush covers what was answered before, on every queue.
fn write_flush(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    let queue = |lba| {
        world.queue(async move |world| {
            world.write(0, lba, 1).await;
            world.flush_covers(0, lba).await;
        })
    };
    vec![queue(0), queue(1), queue(2)]
}

/// Space of removed snapshots comes back while others are taken and blocks are written.
fn snapshot_remove_reclaim(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.snapshot("s").await;
            world.remove("old").await;
        }),
        world.queue(async |world| {
            world.maintain().await;
            world.maintain().await;
        }),
        world.queue(async |world| {
            world.write(0, 2, 1).await;
            world.write(1, 1, 2).await;
        }),
    ]
}

/// A checkpoint while everything else goes on.
fn checkpoint_all(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.checkpoint().await;
            world.checkpoint().await;
        }),
        world.queue(async |world| {
            world.write(0, 0, 3).await;
            world.flush_covers(0, 0).await;
            world.discard(0, 1, 1).await;
        }),
        world.queue(async |world| {
            world.snapshot("s").await;
            world.write(1, 0, 1).await;
        }),
    ]
}

/// A read of a block that is released and given out again.
fn read_reuse(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.read(0, 1, 1).await;
            world.read(0, 1, 3).await;
        }),
        world.queue(async |world| {
            world.discard(0, 1, 1).await;
            world.checkpoint().await;
            world.write(1, 0, 2).await;
        }),
        world.queue(async |world| {
            world.write(0, 0, 1).await;
            world.write(0, 1, 1).await;
        }),
    ]
}

/// A rollback while others read, and write elsewhere. What the volume held after its snapshot is gone.
fn rollback(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| world.roll_back().await),
        world.queue(async |world| {
            world.read(0, 1, 1).await;
            world.read(0, 1, 3).await;
        }),
        world.queue(async |world| {
            world.write(1, 0, 2).await;
            world.maintain().await;
            world.checkpoint().await;
            world.write(1, 2, 1).await;
        }),
    ]
}

/// A volume is given back and taken again while its last requests are under way.
fn detach(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.write(0, 1, 1).await;
            world.write(0, 2, 1).await;
        }),
        world.queue(async |world| world.attach_again()),
        world.queue(async |world| {
            world.remove("old").await;
            world.snapshot("s").await;
        }),
    ]
}

/// Snapshots follow each other: what the first has, the second has.
fn two_snapshots(world: &Arc<World>) -> Vec<JoinHandle<()>> {
    vec![
        world.queue(async |world| {
            world.snapshot("s").await;
            world.snapshot("t").await;
        }),
        world.queue(async |world| {
            world.write(0, 1, 1).await;
            world.write(1, 3, 1).await;
            world.write(0, 3, 1).await;
        }),
        world.queue(async |world| {
            world.write(1, 1, 1).await;
            world.write(0, 1, 1).await;
        }),
    ]
}
