//! The trial of `doctor`: a real ublk device over a small pool in memory, added as `attach` adds one, read, and removed.
//!
//! Nothing of it outlives the command: the pool's file has no name. Nothing is written through the device's node, which in a
//! foreign `/dev` may lead to a device of somebody else.

use blockfork::clock::{Clock, SystemClock};
use blockfork::device::{Access, FileDevice, PoolFile};
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::POOL_BLOCKS_MIN;
use blockfork::name::VolumePath;
use blockfork::pool::{
    Attached, CreateOptions, OpenOptions, Pool, Redirect, RingPlace, VolumeOptions,
};
use blockfork::ublk::{DeviceOptions, Served};
use blockfork::units::{BLOCK_BYTES, PoolId};
use futures_lite::future::block_on;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

const VOLUME_BYTES: u64 = 1 << 20;

/// Adds a device, reads from its node and removes it. The error of the first step that fails.
pub(super) fn run() -> Result<()> {
    let failed = |e| Error::io(e, "a file in memory cannot be made");
    let descriptor = memfd_create(c"blockfork-doctor", MFdFlags::MFD_CLOEXEC);
    let memory = File::from(descriptor.map_err(|e| failed(e.into()))?);
    memory
        .set_len(POOL_BLOCKS_MIN * BLOCK_BYTES)
        .map_err(failed)?;
    let access = Access {
        write: true,
        lock_wait_ms: 0,
    };
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let file = Arc::new(PoolFile::open(Path::new(&path), access)?);
    let attached = block_on(volume(&file))?;
    let options = DeviceOptions {
        dev_id: None,
        queues: 1,
        depth: 1,
        read_only: true,
    };
    let served = Served::add(file, attached.clone(), &options, |_| Ok(()))?;
    let was_read = read(&served.path());
    // Without a claim: the device is empty and read-only, so nobody can lose anything with it.
    let removed = served.stop(|| Ok(())).and_then(|()| served.delete());
    attached.detach();
    was_read.and(removed)
}

/// A volume in a new pool.
async fn volume(file: &Arc<PoolFile>) -> Result<Arc<Attached>> {
    let device = FileDevice::new(file.clone());
    let clock = SystemClock::new();
    let create = CreateOptions {
        name: "doctor".parse()?,
        id: PoolId([0; 16]),
        blocks: file.blocks(),
        created: clock.now(),
    };
    Pool::create(&device, create).await?;
    let open = OpenOptions {
        read_only: false,
        device_blocks: file.blocks(),
        ring: RingPlace::Nowhere,
        clock: Arc::new(clock),
    };
    let pool = Arc::new(Pool::open(&device, open).await?);
    let path: VolumePath = "trial".parse()?;
    let options = VolumeOptions {
        bytes: VOLUME_BYTES,
        sector_bytes: 4096,
        redirect: Redirect::Shared,
    };
    pool.create_volume(&device, &path.volume, options).await?;
    pool.attach(&path, true)
}

/// Reads from the node, if it is the device's.
fn read(node: &Path) -> Result<()> {
    let shown = node.display();
    let failed = |e| Error::io(e, format!("{shown}: cannot be read"));
    let found = fs::metadata(node).map_err(failed)?;
    let (major, minor) = (libc::major(found.rdev()), libc::minor(found.rdev()));
    let name = node.file_name().unwrap_or_default();
    let number = fs::read_to_string(Path::new("/sys/class/block").join(name).join("dev"));
    let is_meant = found.file_type().is_block_device()
        && number.map_err(failed)?.trim() == format!("{major}:{minor}");
    if !is_meant {
        return Err(Error::with(
            ErrorKind::NotFound,
            format!("{shown}: is a node of another device"),
        ));
    }
    let mut bytes = [1; 4096];
    let read = File::open(node).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(failed)?;
    if bytes != [0; 4096] {
        return Err(Error::with(
            ErrorKind::Io,
            format!("{shown}: an empty volume does not read as zeros"),
        ));
    }
    Ok(())
}
