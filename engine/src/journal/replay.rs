//! Reading the journal back: block after block as long as each is the next, up to the first that is not.

use super::commit::Tail;
use crate::device::{BlockBuf, Device};
use crate::error::{Error, Result};
use crate::format::journal::{
    BlockHeader, Framed, decode_block, decode_framed, decode_number, is_decayed, split_framed,
};
use crate::format::superblock::Superblock;
use crate::units::{BLOCK_LEN, Extent, Pba, Seq};

/// What the journal holds beyond the checkpoint.
#[derive(Debug)]
pub(crate) struct ReadJournal {
    /// The records in order, the first one's number being the superblock's. A last change that was cut is not here.
    pub(crate) records: Vec<Framed>,
    /// The number after the last record read, cut or not.
    pub(crate) next_seq: Seq,
    /// Where it goes on.
    pub(crate) tail: Tail,
    /// Why durable records are missing behind those read; none as far as the journal tells.
    pub(crate) lost: Option<Error>,
    /// The first number that no block has, whole or behind a damaged one.
    pub(crate) beyond: u64,
}

/// Reads what the checkpoint of `superblock` does not cover. `may_be_lost`: after a crash, looks whether the journal
/// ends where it does because a block that was durable is damaged.
pub(crate) async fn read_journal<D: Device>(
    device: &D,
    superblock: &Superblock,
    may_be_lost: bool,
) -> Result<ReadJournal> {
    let place = superblock.journal;
    let mut records = Vec::new();
    let mut header = BlockHeader {
        metadata: superblock.metadata_id,
        number: superblock.journal_block,
        chain: superblock.journal_chain,
        first_seq: superblock.seq,
        batch: 0,
        session: 0,
    };
    let mut window = Window::new(place);
    while header.number - superblock.journal_block < place.count {
        let block = window.block(device, header.number % place.count).await?;
        let Some((mut framed, crc)) = decode_block(block, header)? else {
            break;
        };
        while !framed.is_empty() {
            let (record, rest) = split_framed(framed)?;
            records.push(decode_framed(record)?);
            header.first_seq = header.first_seq.next();
            framed = rest;
        }
        header.number += 1;
        header.chain = crc;
    }
    let (mut lost, mut beyond) = (None, header.number);
    if may_be_lost {
        lost = find_decayed(device, superblock, header, &mut window).await?;
        let later = find_later(device, superblock, header.number, &mut window).await?;
        beyond = beyond.max(later.beyond) + u64::from(lost.is_some());
        if later.shows_loss && lost.is_none() {
            let fact =
                "journal block: is damaged, although a later commit shows that it was durable";
            lost = Some(Error::corrupt(fact).at_pba(at(superblock, header.number)));
        }
    }
    Ok(ReadJournal {
        records,
        next_seq: header.first_seq,
        tail: Tail {
            place,
            next: header.number,
            chain: header.chain,
            oldest: superblock.journal_block,
            session: superblock.session + 1,
        },
        lost,
        beyond,
    })
}

/// Where the block of a number stands.
fn at(superblock: &Superblock, number: u64) -> Pba {
    let journal = superblock.journal;
    journal.start.plus(number % journal.count)
}

/// A block that was whole and has a flipped bit is no torn commit, so it may have been durable.
async fn find_decayed<D: Device>(
    device: &D,
    superblock: &Superblock,
    end: BlockHeader,
    window: &mut Window,
) -> Result<Option<Error>> {
    let position = end.number % superblock.journal.count;
    let block = window.block(device, position).await?;
    let fact = "journal block: one bit of it is flipped, and it may have been durable";
    Ok(is_decayed(block, end)?.then(|| Error::corrupt(fact).at_pba(at(superblock, end.number))))
}

/// What stands behind the journal's end.
struct Later {
    shows_loss: bool,
    beyond: u64,
}

/// A commit begins only when the one before it is flushed. So a whole block of a commit that began behind `end` says
/// that the block `end` was durable: that it cannot be read is damage, not a torn commit.
async fn find_later<D: Device>(
    device: &D,
    superblock: &Superblock,
    end: u64,
    window: &mut Window,
) -> Result<Later> {
    let mut later = Later {
        shows_loss: false,
        beyond: end,
    };
    // What the chain has led through is not read again.
    for place in end..superblock.journal_block + superblock.journal.count {
        let block = window
            .block(device, place % superblock.journal.count)
            .await?;
        if let Some((number, batch)) = decode_number(block, superblock.metadata_id)?
            && number > end
        {
            later.shows_loss |= batch > end;
            later.beyond = later.beyond.max(number + 1);
        }
    }
    Ok(later)
}

/// Drops the records at the end that belong to a change whose last record is missing; whether there were any.
pub(crate) fn drop_cut_change(records: &mut Vec<Framed>) -> bool {
    let before = records.len();
    while records.last().is_some_and(|last| last.continues) {
        records.pop();
    }
    records.len() < before
}

/// Reads the journal in runs, not block by block.
struct Window {
    place: Extent,
    buffer: BlockBuf,
    loaded: Option<std::ops::Range<u64>>,
}

const WINDOW_BLOCKS: u64 = 256;

impl Window {
    fn new(place: Extent) -> Self {
        Self {
            place,
            buffer: BlockBuf::zeroed(256),
            loaded: None,
        }
    }

    async fn block<D: Device>(&mut self, device: &D, position: u64) -> Result<&[u8; BLOCK_LEN]> {
        let first = match &self.loaded {
            Some(loaded) if loaded.contains(&position) => loaded.start,
            _ => {
                let count = WINDOW_BLOCKS.min(self.place.count - position);
                let bytes = usize::try_from(count).unwrap_or(0) * BLOCK_LEN;
                let at = self.place.start.plus(position);
                device.read(at.offset(), &mut self.buffer[..bytes]).await?;
                self.loaded = Some(position..position + count);
                position
            }
        };
        let index = usize::try_from(position - first).unwrap_or(0);
        let (blocks, _) = self.buffer.as_chunks();
        Ok(&blocks[index])
    }
}
