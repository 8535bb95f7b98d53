//! A pool in a sparse file, and that file without the data.

use blockfork::device::{Access, BlockBuf, Device, FileDevice, PoolFile};
use blockfork::error::Result;
use blockfork::units::BLOCK_BYTES;
use futures_lite::future::block_on;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder with the pool's file; gone when dropped.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
}

impl Place {
    /// A folder in `base`, with a sparse file of so many blocks.
    pub(super) fn new(base: &Path, scene: &str, blocks: u64) -> Self {
        let folder = base.join(format!("blockfork-scale-{scene}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the pool");
        let place = Self { folder };
        let file = File::create(place.file()).expect("a file for the pool");
        file.set_len(blocks * BLOCK_BYTES).expect("a sparse file");
        place
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn file(&self) -> PathBuf {
        pool_file(&self.folder)
    }

    /// The file, for one who reads and writes all of it.
    pub(super) fn device(&self) -> FileDevice {
        open(&self.folder)
    }

    /// Writes all of the file, so that its file system has nothing left to allocate.
    pub(super) fn allocate(&self) {
        let device = self.device();
        let piece = BlockBuf::zeroed(256);
        let bytes = std::fs::metadata(self.file())
            .expect("the pool's file")
            .len();
        for offset in (0..bytes).step_by(piece.len()) {
            let rest = usize::try_from(bytes - offset).unwrap_or(usize::MAX);
            let part = &piece[..piece.len().min(rest)];
            block_on(device.write(offset, part)).expect("a write of the device");
        }
        block_on(device.flush()).expect("a flush of the device");
    }

    /// Bytes that the file takes of its file system.
    pub(super) fn bytes_taken(&self) -> u64 {
        let metadata = std::fs::metadata(self.file()).expect("the pool's file");
        metadata.blocks() * 512
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

fn pool_file(folder: &Path) -> PathBuf {
    folder.join("pool")
}

/// The pool's file in a folder.
pub(super) fn open(folder: &Path) -> FileDevice {
    let access = Access {
        write: true,
        lock_wait_ms: 0,
    };
    let file = PoolFile::open(&pool_file(folder), access).expect("the file opens");
    FileDevice::new(Arc::new(file))
}

/// The pool's file without the data, which is all zeros, and without waiting for the disk: so a tebibyte is mapped in
/// minutes, and takes a few gibibytes. Only what is built is written through this.
#[derive(Debug)]
pub(super) struct Hurried(pub(super) FileDevice);

impl Device for Hurried {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read(offset, buffer).await
    }

    async fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        // Whatever the engine writes of its own begins with a magic number.
        if buffer.starts_with(&[0; 8]) {
            return Ok(());
        }
        self.0.write(offset, buffer).await
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.0.discard(offset, bytes).await
    }
}
