//! The command line: what can be typed. The doc comments are the help texts and the source of docs/cli.md.

use crate::marks::Marks;
use crate::output::Format;
use crate::size;
use blockfork::limits::METADATA_CACHE_BYTES_MIN;
use blockfork::name::{Name, Target, VolumePath};
use blockfork::pool::{Limit, LimitChange, OnFull};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Volumes that fork: create, snapshot, clone, roll back and attach them as block devices
///
/// A pool is a file or a block device that holds volumes. A snapshot of a volume takes no time and no space,
/// whatever the volume's size. A volume or a snapshot is attached as /dev/ublkbN.
///
/// Names are POOL, POOL/VOLUME and POOL/VOLUME@SNAPSHOT: letters, digits and `_ - . :`. Sizes are powers of 1024:
/// 10G is 10 GiB.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 out of space, 4 corrupt; `pool check`: 0 clean, 4 corrupt, 5 leaks only.
///
/// `$UBLKCTL_STATE_DIR` (/var/lib/ublkctl) knows where each pool lives; `$UBLKCTL_RUNTIME_DIR` (/run/ublkctl) holds
/// the daemons' sockets, pid files and logs.
#[derive(Debug, Parser)]
#[command(
    name = "ublkctl",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What `ublkctl` does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, import, look at, grow, check and destroy pools
    Pool {
        /// What to do with a pool.
        #[command(subcommand)]
        command: PoolCommand,
    },
    /// Create an empty volume
    ///
    /// Disk images are mostly made for sectors of 512 bytes. On a volume with sectors of 4096 bytes their partitions are not found, or
    /// at the wrong place. Create the volume for such an image with --sector-size 512: docs/using-snapshots.md.
    Create(Create),
    /// Set what a volume may take, or when a pool is said to run short of space
    ///
    /// Of a volume, quota=SIZE: the most that it maps. A write of new blocks beyond it gets ENOSPC; overwrites and discards go on.
    ///
    /// reserve=SIZE: what is set aside for the volume, at most its size. Others leave so much of the free space to it as it may still
    /// need: all of that less the blocks that are its own alone. So a snapshot of it is refused where its space would not be enough to
    /// write all of that anew.
    ///
    /// Of a pool, marks=80,90,95: the percentages of used space at which `pool status`, the daemon's log and `watch` say so. They are
    /// this machine's: a pool that is imported elsewhere has those above there.
    ///
    /// `none` takes a property away.
    Set(Set),
    /// Change the size of a volume; a larger one grows online where the kernel can
    Resize(Resize),
    /// Rename a volume, with its snapshots, or a snapshot within its volume
    Rename {
        /// POOL/VOLUME or POOL/VOLUME@SNAPSHOT
        #[arg(value_parser = path_target)]
        from: PathTarget,
        /// The new name, in the same pool
        #[arg(value_parser = path_target)]
        to: PathTarget,
    },
    /// Remove volumes and snapshots, in any order, whether clones exist or not
    Rm(Rm),
    /// Take snapshots; several targets are one point in time
    ///
    /// A snapshot contains everything that was written to the volume before the command, also what this machine still has in its
    /// page cache: the command first flushes the file systems that are mounted on the device, on its partitions and on device
    /// mapper, RAID and loop devices above it, and then these devices. If a flush fails, no snapshot is taken. Clients of `serve-nbd`
    /// have caches of their own; flush there.
    ///
    /// The snapshot of a mounted file system is like a disk after a power cut: the file system replays its journal when a clone is
    /// mounted. With --freeze, the file system is complete without that. How to mount snapshots and clones: docs/using-snapshots.md.
    ///
    /// Refused while less than 1/128 of the pool is free to a volume: from then on each overwrite would need new space.
    #[command(alias = "snap")]
    Snapshot(Snapshot),
    /// Make a volume that begins as a snapshot is
    ///
    /// A file system in a clone has the same UUID as its origin, so an XFS is mounted with `-o nouuid` beside it. LVM and RAID need new
    /// ids: docs/using-snapshots.md.
    Clone {
        /// POOL/VOLUME@SNAPSHOT
        #[arg(value_name = "POOL/VOLUME@SNAPSHOT", value_parser = snapshot_target)]
        snapshot: PathTarget,
        /// POOL/NEW, in the same pool
        #[arg(value_name = "POOL/NEW", value_parser = volume_target)]
        volume: PathTarget,
    },
    /// Turn a volume back to one of its snapshots; newer snapshots stay
    ///
    /// What the volume holds now is gone, unless a snapshot has it. An attached volume is rolled back in place if
    /// nobody has it open; a mounted one is refused.
    Rollback {
        /// POOL/VOLUME@SNAPSHOT
        #[arg(value_name = "POOL/VOLUME@SNAPSHOT", value_parser = snapshot_target)]
        snapshot: PathTarget,
    },
    /// Keep snapshots from being removed, until the hold is released
    ///
    /// A snapshot can have several holds, each with a tag of its own. While it has one, `rm` and `pool destroy` are
    /// refused and `prune` keeps it; it can be cloned, renamed, attached and rolled back to.
    Hold(Hold),
    /// Take a hold from snapshots
    Release(Hold),
    /// Remove the snapshots of a volume that no rule keeps
    ///
    /// Time is cut into hours, days, ISO weeks (from Monday), months and years of the UTC calendar. Of each, the snapshot
    /// that was taken last in it stands for it. --keep-daily 7 keeps those that stand for the 7 most recent days in which
    /// there was a snapshot at all; days without one do not count. The other rules do the same for their unit, and
    /// --keep-last 10 keeps the 10 snapshots that were taken last. Each rule looks at all snapshots, whatever the others
    /// keep, and a snapshot is kept if any rule keeps it.
    ///
    /// Snapshots that are held or attached are kept too, and count for the rules like any other. Snapshots that are dated
    /// in the future are kept, but do not count for any rule; a warning names them. All that is not kept is removed
    /// together, or nothing is.
    Prune(Prune),
    /// Draw who was cloned from what: volumes, below them their snapshots by age, below a snapshot its clones
    ///
    /// A clone whose snapshot is gone, and a volume that was rolled back, stand at the left side.
    Tree(Tree),
    /// Serve a volume, or a snapshot read-only, as a block device and print its path
    ///
    /// A file system in a snapshot cannot replay its journal. Mount an ext4 with `-o ro,noload`, an XFS with `-o
    /// ro,norecovery,nouuid`. More, also about clones, LVM and RAID: docs/using-snapshots.md.
    Attach(Attach),
    /// Serve a volume, or a snapshot read-only, over NBD and print its URI
    ///
    /// It is served until SIGINT or SIGTERM ends the command; by then everything is durable. Needs no ublk. Without
    /// options, clients connect to a unix socket that is its owner's alone. Over TCP there is neither encryption nor a
    /// password: whoever connects has the volume.
    ServeNbd(ServeNbd),
    /// Take block devices away; refused while they are mounted or open
    Detach(Detach),
    /// List volumes and snapshots
    #[command(alias = "ls")]
    List(List),
    /// Print where a volume differs from one of its snapshots: offset, length, data or zero
    ///
    /// The volume as it is now includes what this machine still has in its page cache: the command first flushes it, as `snapshot`
    /// does.
    Diff(Diff),
    /// Print the counters of pools and attached volumes
    Stats(Stats),
    /// Print what happens to a pool that a daemon serves, a JSON object a line, until interrupted
    ///
    /// `watching` comes first and says how it stands. `space-mark`: the use of space passed a mark, `up` or `down`; it is passed
    /// downwards 2 % below it. `device-added`, `device-gone`, `export-added`, `export-gone`: what is attached. `reclaim-done`: the
    /// space of all that was removed has come back. `error`: a flush failed, damage was found, or the pool's file was deleted,
    /// moved or replaced. `lost`: who reads too slowly misses so many events. `at` is the time in nanoseconds since 1970.
    Watch {
        /// The pool
        pool: Name,
        /// It is JSON anyway
        #[arg(long)]
        json: bool,
    },
    /// Serve a pool in the foreground
    ///
    /// Takes back the devices of a daemon that died. SIGTERM and SIGINT make everything durable and end it; devices
    /// that are still attached wait for the next daemon.
    Serve {
        /// The pool
        pool: Name,
        /// Be the daemon that another command starts: leave its session, end with the last device
        #[arg(long, hide = true)]
        detached: bool,
        /// Memory for maps and counts, at least 16M [default: an eighth of the machine's]
        #[arg(long, value_name = "SIZE", value_parser = metadata_cache)]
        metadata_cache: Option<u64>,
    },
    /// Start the daemon of a pool whose daemon died, and take its devices back
    Recover {
        /// The pool
        pool: Name,
    },
    /// Flush and freeze for another command
    #[command(hide = true)]
    Guard,
    /// Say whether this machine is able to attach volumes, and what to do if it is not
    ///
    /// If nothing is amiss, a small device over a pool in memory is added as `attach` does it, read, and removed.
    Doctor {
        #[command(flatten)]
        format: Format,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Be the process that holds the claim of a device for a daemon, see `claim/process.rs`
    #[command(hide = true)]
    ClaimDevice {
        /// The N of /dev/ublkbN
        dev_id: u32,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory, which exists
        directory: PathBuf,
    },
}

/// What can be done with pools.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Make a pool in a file or on a block device
    ///
    /// A file that is not there is made, sparse, of --size. What is there is used whole, and refused if it holds
    /// anything that is recognised: a pool, a file system, a partition table and so on, or for a file, any data.
    Create {
        /// The pool's name
        name: Name,
        /// A file or a block device
        path: PathBuf,
        /// The pool's size, of a new file or up to what is there
        #[arg(short, long, value_parser = size::parse)]
        size: Option<u64>,
        /// Use it whatever it holds; that is lost
        #[arg(short, long)]
        force: bool,
        /// Refuse volumes, clones and sizes that would make the volumes together larger than the pool
        #[arg(long)]
        no_overcommit: bool,
    },
    /// Make a pool known that was created elsewhere, or exported
    ///
    /// A copy of a pool has the name and the id of the original, so this machine can use one of the two. With --name and
    /// --new-id the copy gets its own, written to the copy, and both can be used. The copy may be of a pool that was in
    /// use: it is then what a power cut would have left. A snapshot or clone of a volume that holds a pool is such a copy.
    Import {
        /// A file or a block device
        path: PathBuf,
        /// Give the pool this name
        #[arg(long, value_name = "NAME")]
        name: Option<Name>,
        /// Give the pool an id of its own: it is a copy, and the original stays in use
        #[arg(long)]
        new_id: bool,
    },
    /// Give a pool another name; nothing of it may be attached
    Rename {
        /// The pool
        #[arg(value_name = "OLD")]
        from: Name,
        /// The new name
        #[arg(value_name = "NEW")]
        to: Name,
    },
    /// Close a pool and forget where it lives; its volumes stay in it
    Export {
        /// The pool
        name: Name,
        /// Forget it even if its file is gone or cannot be closed
        #[arg(short, long)]
        force: bool,
    },
    /// List the pools that this machine knows
    #[command(alias = "ls")]
    List {
        #[command(flatten)]
        format: Format,
    },
    /// Print the state of a pool
    Status {
        /// The pool
        name: Name,
        #[command(flatten)]
        format: Format,
    },
    /// Take more space into use: extend the pool's file to SIZE, or use what its device has by now
    Grow {
        /// The pool
        name: Name,
        /// The new size
        #[arg(value_parser = size::parse)]
        size: u64,
    },
    /// Verify all metadata of a pool, and mend what needs no guessing
    ///
    /// Exits with 0 if it is clean, 4 if it is corrupt, 5 if blocks are lost and nothing is damaged. Damage is named
    /// volume by volume; the rest can be used, or at least read.
    ///
    /// With --repair it first says what is wrong, where, and what it will do; then it does that, and exits as a check
    /// of the mended pool does. Counts are found again from the maps, lost blocks are given back, a superblock copy is
    /// written again from the other. With --dry-run it exits with 0 if there is nothing to do, otherwise 4.
    Check {
        /// A pool's name, or the path of its file or device
        #[arg(value_name = "NAME|PATH")]
        pool: String,
        /// Mend what needs no guessing; refused while a daemon serves the pool
        #[arg(long)]
        repair: bool,
        /// Only say what a repair would do
        #[arg(short = 'n', long, requires = "repair")]
        dry_run: bool,
        /// Do not ask
        #[arg(short, long, requires = "repair")]
        yes: bool,
        /// Where the journal is damaged: go back to the state before that, and give up what was written later
        #[arg(long, requires = "repair")]
        discard_journal: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Destroy a pool with all its volumes and snapshots; its file stays, without them
    Destroy {
        /// The pool
        name: Name,
        /// Really do it
        #[arg(short, long, required_unless_present = "dry_run")]
        force: bool,
        /// Only say what would go
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
}

/// Options of `create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// POOL/VOLUME
    #[arg(value_name = "POOL/VOLUME", value_parser = volume_target)]
    pub(crate) volume: PathTarget,
    /// Its size
    #[arg(short, long, value_parser = size::parse)]
    pub(crate) size: u64,
    /// Its logical sector; 512 for what cannot do with 4096
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = sector_bytes)]
    pub(crate) sector_size: u32,
    /// Which writes go to newly allocated blocks; with `always` a power cut never tears a block
    #[arg(long, value_enum, default_value_t = Redirect::Shared)]
    pub(crate) redirect: Redirect,
    /// The most that it maps; a write of new blocks beyond that gets ENOSPC
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) quota: Option<u64>,
    /// Set so much of the pool aside for it, which others leave to it
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) reserve: Option<u64>,
}

/// Which writes are redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Redirect {
    /// Those to blocks that a snapshot or clone shares
    Shared,
    /// Every one
    Always,
}

/// Options of `set`.
#[derive(Debug, Args)]
pub(crate) struct Set {
    /// POOL/VOLUME or POOL
    #[arg(value_name = "TARGET")]
    pub(crate) target: Target,
    /// quota=SIZE, reserve=SIZE; marks=PERCENT,PERCENT,...
    #[arg(required = true, value_name = "PROPERTY=VALUE", value_parser = property)]
    pub(crate) properties: Vec<Property>,
}

/// A property and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Property {
    /// Of a volume.
    Limit(LimitChange),
    /// Of a pool.
    Marks(Marks),
}

/// Options of `resize`.
#[derive(Debug, Args)]
pub(crate) struct Resize {
    /// POOL/VOLUME
    #[arg(value_name = "POOL/VOLUME", value_parser = volume_target)]
    pub(crate) volume: PathTarget,
    /// The new size
    #[arg(value_parser = size::parse)]
    pub(crate) size: u64,
    /// Allow a smaller size; what lies beyond it is lost. Never while attached
    #[arg(long)]
    pub(crate) allow_shrink: bool,
}

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// POOL/VOLUME@SNAPSHOT, all in one pool
    #[arg(required = true, value_name = "POOL/VOLUME@SNAPSHOT", value_parser = snapshot_target)]
    pub(crate) targets: Vec<PathTarget>,
    /// Freeze every file system that is mounted on the volumes until the snapshots are taken, for at most SECONDS [default: 10].
    /// If one cannot be frozen, or if the time is not enough, the command fails. Every file system is thawed in any case
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "10",
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub(crate) freeze: Option<u32>,
    /// Do not flush: writes that are still in this machine's page cache are not in the snapshots
    #[arg(long, conflicts_with = "freeze")]
    pub(crate) no_sync: bool,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// POOL/VOLUME or POOL/VOLUME@SNAPSHOT, all in one pool
    #[arg(required = true, value_name = "TARGET", value_parser = path_target)]
    pub(crate) targets: Vec<PathTarget>,
    /// Only say what would go and how much space would come back
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Remove the snapshots of the volumes too
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// Wait until the space has come back, which is background work of the daemon
    #[arg(short, long)]
    pub(crate) wait: bool,
}

/// Options of `hold` and `release`.
#[derive(Debug, Args)]
pub(crate) struct Hold {
    /// The name of the hold
    pub(crate) tag: Name,
    /// POOL/VOLUME@SNAPSHOT, all in one pool
    #[arg(required = true, value_name = "POOL/VOLUME@SNAPSHOT", value_parser = snapshot_target)]
    pub(crate) targets: Vec<PathTarget>,
}

/// Options of `prune`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("rules").required(true).multiple(true))]
pub(crate) struct Prune {
    /// POOL/VOLUME
    #[arg(value_name = "POOL/VOLUME", value_parser = volume_target)]
    pub(crate) volume: PathTarget,
    /// Keep the snapshots that were taken last
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_last: Option<u32>,
    /// Keep the newest of each of so many hours
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_hourly: Option<u32>,
    /// Keep the newest of each of so many days
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_daily: Option<u32>,
    /// Keep the newest of each of so many weeks
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_weekly: Option<u32>,
    /// Keep the newest of each of so many months
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_monthly: Option<u32>,
    /// Keep the newest of each of so many years
    #[arg(long, value_name = "N", group = "rules", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep_yearly: Option<u32>,
    /// Only say what would be kept and why, what would go, and how much space would come back
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// Options of `tree`.
#[derive(Debug, Args)]
pub(crate) struct Tree {
    /// POOL, or POOL/VOLUME for that volume and what hangs on it
    #[arg(value_name = "POOL[/VOLUME]", value_parser = tree_target)]
    pub(crate) target: Target,
    /// Print JSON: an array of volumes with `snapshots`, each with its `clones`
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `attach`.
#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// POOL/VOLUME or POOL/VOLUME@SNAPSHOT
    #[arg(value_name = "POOL/VOLUME[@SNAPSHOT]", value_parser = path_target)]
    pub(crate) target: PathTarget,
    /// Refuse writes, as a snapshot always does
    #[arg(long, visible_alias = "ro")]
    pub(crate) read_only: bool,
    /// Hardware queues, each with a thread [default: the processors, at most 4]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight in each queue
    #[arg(short, long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) depth: u16,
    /// Memory for maps and counts of the pool from here on, at least 16M, until its daemon ends [default: what the daemon
    /// has, an eighth of the machine's]
    #[arg(long, value_name = "SIZE", value_parser = metadata_cache)]
    pub(crate) metadata_cache: Option<u64>,
    /// What a write does that finds no space: `error` fails with ENOSPC at once, `queue` waits for space, SECONDS [default: 60] at
    /// most, and fails then
    #[arg(long, value_name = "error|queue[=SECONDS]", default_value = "error", value_parser = on_full)]
    pub(crate) on_full: OnFull,
}

/// Options of `serve-nbd`.
#[derive(Debug, Args)]
pub(crate) struct ServeNbd {
    /// POOL/VOLUME or POOL/VOLUME@SNAPSHOT
    #[arg(value_name = "POOL/VOLUME[@SNAPSHOT]", value_parser = path_target)]
    pub(crate) target: PathTarget,
    /// Refuse writes, as a snapshot always does
    #[arg(long, visible_alias = "ro")]
    pub(crate) read_only: bool,
    /// The unix socket to listen on [default: one in `$UBLKCTL_RUNTIME_DIR`]
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on TCP: PORT or ADDRESS:PORT; on 127.0.0.1 unless another address is named
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = listen_address)]
    pub(crate) listen: Option<SocketAddr>,
    /// What a write does that finds no space: `error` fails with ENOSPC at once, `queue` waits for space, SECONDS [default: 60] at
    /// most, and fails then
    #[arg(long, value_name = "error|queue[=SECONDS]", default_value = "error", value_parser = on_full)]
    pub(crate) on_full: OnFull,
}

/// Options of `detach`.
#[derive(Debug, Args)]
pub(crate) struct Detach {
    /// POOL/VOLUME, POOL/VOLUME@SNAPSHOT or /dev/ublkbN; with --all, pools
    #[arg(value_name = "TARGET", required_unless_present = "all")]
    pub(crate) targets: Vec<String>,
    /// All devices, of the pools named or of every pool
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Take away even a device that no daemon serves and none can take back; unwritten data is lost
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// POOL, POOL/VOLUME or POOL/VOLUME@SNAPSHOT; all pools if there is none
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<Target>,
    /// The columns
    #[arg(
        short = 'o',
        long = "columns",
        value_name = "COLUMNS",
        value_enum,
        value_delimiter = ','
    )]
    pub(crate) columns: Vec<Column>,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// A column of `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Column {
    /// POOL/VOLUME or POOL/VOLUME@SNAPSHOT
    Name,
    /// volume or snapshot
    Type,
    /// Its size
    Size,
    /// What it maps
    Used,
    /// What removing it alone would free
    Unique,
    /// What it maps together with others
    Shared,
    /// The block device, or the URI, that serves it
    Device,
    /// Its age
    Created,
    /// The snapshot that it was cloned from or rolled back to
    Origin,
    /// Its logical sector in bytes
    Sector,
    /// The tags of its holds
    Holds,
    /// The most that it maps
    Quota,
    /// What is set aside for it
    Reserve,
}

/// Options of `diff`.
#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The older side, POOL/VOLUME@SNAPSHOT
    #[arg(value_name = "POOL/VOLUME@A", value_parser = snapshot_target)]
    pub(crate) from: PathTarget,
    /// The newer side, a snapshot or the volume as it is now
    #[arg(value_name = "POOL/VOLUME[@B]", value_parser = path_target)]
    pub(crate) to: PathTarget,
    /// Do not flush: writes that are still in this machine's page cache are not seen
    #[arg(long)]
    pub(crate) no_sync: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// Options of `stats`.
#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// The pools; all if there is none
    pub(crate) pools: Vec<Name>,
    /// Count over this many seconds from now, rather than since each volume was attached
    #[arg(short, long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) interval: Option<u64>,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// A volume or a snapshot, with its pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PathTarget {
    /// The pool.
    pub(crate) pool: Name,
    /// The volume or snapshot.
    pub(crate) path: VolumePath,
}

fn refuse<T>(text: &str, fact: &str) -> Result<T, blockfork::error::Error> {
    let shown: String = text.chars().take(80).collect();
    Err(blockfork::error::Error::with(
        blockfork::error::ErrorKind::Invalid,
        format!("{shown:?}: {fact}"),
    ))
}

/// How long a queued write waits unless told otherwise, as with dm-thin.
const QUEUE_SECONDS: u32 = 60;
/// The longest such wait: a day.
const QUEUE_SECONDS_MAX: u32 = 86_400;

/// `error`, `queue` or `queue=SECONDS`.
fn on_full(text: &str) -> Result<OnFull, blockfork::error::Error> {
    let seconds = match text {
        "error" => return Ok(OnFull::Error),
        "queue" => Some(QUEUE_SECONDS),
        _ => text
            .strip_prefix("queue=")
            .and_then(|seconds| seconds.parse().ok())
            .filter(|seconds| (1..=QUEUE_SECONDS_MAX).contains(seconds)),
    };
    match seconds {
        Some(seconds) => Ok(OnFull::Queue { seconds }),
        None => refuse(text, "write error, queue or queue=SECONDS, up to a day"),
    }
}

/// `PROPERTY=VALUE`.
fn property(text: &str) -> Result<Property, blockfork::error::Error> {
    let (word, value) = text.split_once('=').unwrap_or((text, ""));
    let limit = match word {
        "quota" => Limit::Quota,
        "reserve" => Limit::Reserve,
        "marks" => return value.parse().map(Property::Marks),
        _ => {
            return refuse(
                text,
                "is not a property; write quota=SIZE, reserve=SIZE or marks=80,90,95",
            );
        }
    };
    let bytes = match value {
        "none" => None,
        "" => return refuse(text, "has no value; write a size, or none"),
        size => Some(size::parse(size)?),
    };
    Ok(Property::Limit(LimitChange { limit, bytes }))
}

/// `POOL/VOLUME` or `POOL/VOLUME@SNAPSHOT`.
pub(crate) fn path_target(text: &str) -> Result<PathTarget, blockfork::error::Error> {
    let Target { pool, path } = text.parse()?;
    match path {
        Some(path) => Ok(PathTarget { pool, path }),
        None => refuse(text, "names a pool; write POOL/VOLUME"),
    }
}

fn volume_target(text: &str) -> Result<PathTarget, blockfork::error::Error> {
    let target = path_target(text)?;
    match target.path.snapshot {
        None => Ok(target),
        Some(_) => refuse(text, "names a snapshot; write POOL/VOLUME"),
    }
}

fn snapshot_target(text: &str) -> Result<PathTarget, blockfork::error::Error> {
    let target = path_target(text)?;
    match target.path.snapshot {
        Some(_) => Ok(target),
        None => refuse(text, "names no snapshot; write POOL/VOLUME@SNAPSHOT"),
    }
}

fn tree_target(text: &str) -> Result<Target, blockfork::error::Error> {
    let target: Target = text.parse()?;
    match &target.path {
        Some(path) if path.snapshot.is_some() => {
            refuse(text, "names a snapshot; write POOL or POOL/VOLUME")
        }
        Some(_) | None => Ok(target),
    }
}

/// `PORT`, `:PORT` or `ADDRESS:PORT`. Only who names another address is heard by others than this machine.
fn listen_address(text: &str) -> Result<SocketAddr, blockfork::error::Error> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    if matches!(host, "" | "localhost")
        && let Ok(port) = port.parse()
    {
        return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    }
    let refused = |_| {
        refuse(
            text,
            "is no address; write PORT, or ADDRESS:PORT with numbers",
        )
    };
    text.parse().or_else(refused)
}

/// Memory for metadata.
fn metadata_cache(text: &str) -> Result<u64, blockfork::error::Error> {
    let bytes = size::parse(text)?;
    if bytes < METADATA_CACHE_BYTES_MIN {
        return refuse(text, "is too little memory to work with; give at least 16M");
    }
    Ok(bytes)
}

fn sector_bytes(text: &str) -> Result<u32, blockfork::error::Error> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => refuse(text, "is no sector size; 4096 and 512 are"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn only_this_machine_is_heard_unless_another_address_is_named() {
        for text in ["10809", ":10809", "localhost:10809", "127.0.0.1:10809"] {
            let address = listen_address(text).unwrap();
            assert_eq!(address.to_string(), "127.0.0.1:10809", "{text}");
        }
        assert_eq!(listen_address("[::]:1").unwrap().to_string(), "[::]:1");
        for text in [
            "",
            ":",
            "70000",
            "example.org:1",
            "0.0.0.0",
            "::",
            "-1",
            " 1",
        ] {
            assert!(listen_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_for_metadata_is_enough_to_work_with() {
        assert_eq!(metadata_cache("16M").unwrap(), METADATA_CACHE_BYTES_MIN);
        for text in ["15M", "0", "1T2", ""] {
            assert!(metadata_cache(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_full_pool_fails_writes_or_queues_them() {
        let queue = |seconds| OnFull::Queue { seconds };
        for (text, wanted) in [
            ("error", OnFull::Error),
            ("queue", queue(60)),
            ("queue=1", queue(1)),
            ("queue=86400", queue(86_400)),
        ] {
            assert_eq!(on_full(text).unwrap(), wanted, "{text}");
        }
        for text in [
            "",
            "fail",
            "queue=",
            "queue=0",
            "queue=86401",
            "queue=-1",
            "queue=1s",
        ] {
            assert!(on_full(text).is_err(), "{text}");
        }
    }

    #[test]
    fn targets_are_what_a_command_wants() {
        assert!(path_target("p0").is_err());
        assert!(volume_target("p0/v@s").is_err());
        assert!(snapshot_target("p0/v").is_err());
        assert!(tree_target("p0").is_ok() && tree_target("p0/v").is_ok());
        assert!(tree_target("p0/v@s").is_err());
        assert_eq!(snapshot_target("p0/v@s").unwrap().path.to_string(), "v@s");
    }
}
