//! What a request finds of its blocks, for both ways that it can go, and the short one of them: a request for whole
//! blocks that lie in one run on the device, old or new. It takes one lookup and one operation of the device, which the
//! frontend begins and ends by itself.

use super::{Io, Reserved};
use crate::journal::Ticket;
use crate::map::{Mapping, Resolved};
use crate::metadata::Metadata;
use crate::space::Fault;
use crate::units::{BLOCK_BYTES, BLOCK_LEN, Extent, Lba};

/// A run of blocks on the device, for one request.
#[derive(Debug)]
pub(crate) enum Direct<'a> {
    /// The blocks of the volume; they stay what they are until this is dropped.
    There { extent: Extent, _ticket: Ticket<'a> },
    /// New ones, for the blocks from where they are mapped once they are written.
    New(Reserved<'a>),
}

impl<'a, D> Io<'a, D> {
    /// What up to `max` blocks from `lba` read as, and the right to read them.
    pub(super) fn resolve(
        &self,
        metadata: &Metadata,
        lba: Lba,
        max: u64,
    ) -> Result<(Resolved, Ticket<'a>), Fault> {
        let root = metadata.catalog.get(self.volume)?.entry.root;
        let resolved = metadata.map.resolve(root, lba, max)?;
        Ok((resolved, self.ledger.gate.enter()))
    }

    /// What a write to up to `max` blocks from `lba` may do, and the right to do it.
    pub(super) fn locate(
        &self,
        metadata: &Metadata,
        lba: Lba,
        max: u64,
    ) -> Result<(Mapping, Ticket<'a>), Fault> {
        let root = metadata.catalog.get(self.volume)?.entry.root;
        let mut mapping = metadata.map.lookup(&metadata.space, root, lba, max)?;
        if let (Mapping::Exclusive(extent), true) = (mapping, self.redirects_always) {
            mapping = Mapping::Shared(extent.count);
        }
        Ok((mapping, self.ledger.gate.enter()))
    }

    /// Where all of a read lies, if it can go the short way.
    pub(crate) fn direct_read(&self, offset: u64, bytes: usize) -> Option<Direct<'a>> {
        let (lba, blocks) = whole_blocks(offset, bytes)?;
        let found = (self.ledger).look(|metadata| self.resolve(metadata, lba, blocks));
        match found {
            Ok((Resolved::Mapped(extent), ticket)) if extent.count == blocks => {
                Some(Direct::There {
                    extent,
                    _ticket: ticket,
                })
            }
            _ => None,
        }
    }

    /// Where all of a write goes, in place or to new blocks, if it can go the short way.
    pub(crate) fn direct_write(&self, offset: u64, bytes: usize) -> Option<Direct<'a>> {
        let (lba, blocks) = whole_blocks(offset, bytes)?;
        if self.ledger.is_poisoned() {
            return None;
        }
        let found = (self.ledger).look(|metadata| self.locate(metadata, lba, blocks));
        match found {
            Ok((Mapping::Exclusive(extent), ticket)) if extent.count == blocks => {
                Some(Direct::There {
                    extent,
                    _ticket: ticket,
                })
            }
            Ok((mapping @ (Mapping::Hole(count) | Mapping::Shared(count)), ticket))
                if count == blocks =>
            {
                drop(ticket);
                self.direct_redirect(lba, blocks, matches!(mapping, Mapping::Shared(_)))
            }
            _ => None,
        }
    }

    fn direct_redirect(&self, lba: Lba, blocks: u64, is_shared: bool) -> Option<Direct<'a>> {
        let extent =
            (self.ledger).change_now(|draft| self.reserve(draft, lba, blocks, is_shared))?;
        let reserved = self.reserved(lba, extent);
        (extent.count == blocks).then_some(Direct::New(reserved))
    }
}

fn whole_blocks(offset: u64, bytes: usize) -> Option<(Lba, u64)> {
    let is_whole = offset.is_multiple_of(BLOCK_BYTES) && bytes.is_multiple_of(BLOCK_LEN);
    is_whole.then_some((Lba(offset / BLOCK_BYTES), (bytes / BLOCK_LEN) as u64))
}
