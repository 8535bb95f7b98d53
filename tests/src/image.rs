//! The bytes of a simulated device: blocks that copies share until one of them is written.

use std::sync::Arc;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

type Block = [u8; BLOCK];

/// A device's bytes; a copy costs a pointer for each block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// None is a block of zeros.
    blocks: Vec<Option<Arc<Block>>>,
}

impl Image {
    /// So many blocks of zeros.
    pub fn zeros(blocks: u64) -> Self {
        Self {
            blocks: vec![None; usize::try_from(blocks).unwrap()],
        }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * BLOCK
    }

    /// Adds zeros at the end.
    pub fn grow(&mut self, blocks: u64) {
        self.blocks.resize(usize::try_from(blocks).unwrap(), None);
    }

    /// Fills `buffer` with the bytes from `at`.
    pub fn read(&self, mut at: usize, buffer: &mut [u8]) {
        let mut rest = buffer;
        while !rest.is_empty() {
            let within = at % BLOCK;
            let count = rest.len().min(BLOCK - within);
            let (part, behind) = rest.split_at_mut(count);
            match &self.blocks[at / BLOCK] {
                Some(block) => part.copy_from_slice(&block[within..within + count]),
                None => part.fill(0),
            }
            rest = behind;
            at += count;
        }
    }

    /// Puts `data` at `at`.
    pub fn write(&mut self, mut at: usize, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() {
            let within = at % BLOCK;
            let count = rest.len().min(BLOCK - within);
            let (part, behind) = rest.split_at(count);
            let slot = &mut self.blocks[at / BLOCK];
            if let (Ok(whole), None) = (<&Block>::try_from(part), slot.as_ref()) {
                *slot = Some(Arc::new(*whole));
            } else {
                let block = slot.get_or_insert_with(|| Arc::new([0; BLOCK]));
                Arc::make_mut(block)[within..within + count].copy_from_slice(part);
            }
            rest = behind;
            at += count;
        }
    }

    /// Takes over the bytes from `at` that `other` has.
    pub fn copy_from(&mut self, other: &Self, at: usize, bytes: usize) {
        if at.is_multiple_of(BLOCK) && bytes == BLOCK {
            self.blocks[at / BLOCK].clone_from(&other.blocks[at / BLOCK]);
            return;
        }
        let mut part = vec![0; bytes];
        other.read(at, &mut part);
        self.write(at, &part);
    }

    /// All bytes, one after the other.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes()];
        self.read(0, &mut bytes);
        bytes
    }
}

impl From<&[u8]> for Image {
    fn from(bytes: &[u8]) -> Self {
        let mut image = Self::zeros((bytes.len() / BLOCK) as u64);
        for (at, block) in (0..).step_by(BLOCK).zip(bytes.chunks_exact(BLOCK)) {
            if block.iter().any(|byte| *byte != 0) {
                image.write(at, block);
            }
        }
        image
    }
}
