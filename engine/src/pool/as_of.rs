//! The pool's device as an earlier checkpoint left it, for reading metadata while the pool goes on.

use crate::device::{BlockBuf, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::format::counts::encode_counts;
use crate::format::page::{PageBytes, PageIdentity, PagePtr};
use crate::journal::Ledger;
use crate::space::KeptCounts;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Generation, Pba};

/// The device as of a checkpoint, which [`crate::checkpoint::Checkpoints::write_kept`] wrote. Dropped, it lets what was
/// kept be reused.
pub(super) struct AsOf<'a, D> {
    ledger: &'a Ledger,
    generation: Generation,
    device: &'a D,
}

impl<'a, D> AsOf<'a, D> {
    pub(super) fn new(ledger: &'a Ledger, generation: Generation, device: &'a D) -> Self {
        Self {
            ledger,
            generation,
            device,
        }
    }

    /// Whether nothing of the checkpoint was lost to those who lacked space.
    pub(super) fn is_whole(&self) -> bool {
        self.ledger
            .look(|metadata| metadata.space.keeps(self.generation))
    }

    /// Counts that changed since, as they were.
    fn kept(&self, pba: Pba) -> Result<Option<PageBytes>> {
        self.ledger.look(|metadata| {
            if !metadata.space.keeps(self.generation) {
                return Err(Error::with(ErrorKind::Busy, "a checkpoint is gone"));
            }
            let encode = |kept: KeptCounts| {
                let identity = PageIdentity {
                    metadata: metadata.page_id,
                    kind: kept.kind,
                    level: 0,
                    ptr: PagePtr {
                        pba,
                        generation: kept.generation,
                    },
                };
                encode_counts(&kept.halves, identity)
            };
            Ok(metadata.space.kept_counts(pba).map(encode))
        })
    }
}

impl<D: Device> Device for AsOf<'_, D> {
    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.device.read(offset, buffer).await?;
        // After the read: who changes counts keeps them before a checkpoint overwrites them.
        for (pba, block) in (offset / BLOCK_BYTES..).zip(buffer.chunks_exact_mut(BLOCK_LEN)) {
            if let Some(kept) = self.kept(Pba(pba))? {
                block.copy_from_slice(&kept);
            }
        }
        Ok(())
    }

    async fn read_blocks(&self, blocks: &mut [(u64, BlockBuf)]) -> Vec<bool> {
        let mut done = self.device.read_blocks(blocks).await;
        for ((offset, block), is_read) in blocks.iter_mut().zip(&mut done) {
            match self.kept(Pba(*offset / BLOCK_BYTES)) {
                Ok(Some(kept)) => block.copy_from_slice(&kept),
                Ok(None) => {}
                Err(_) => *is_read = false,
            }
        }
        done
    }

    async fn write(&self, _offset: u64, _buffer: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly))
    }

    async fn flush(&self) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly))
    }

    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly))
    }
}

impl<D> Drop for AsOf<'_, D> {
    fn drop(&mut self) {
        self.ledger.adjust(|metadata| {
            if metadata.space.keeps(self.generation) {
                metadata.space.stop_keeping();
            }
        });
    }
}
