//! A redo record: one change of the metadata, in logical terms. Replaying the records that follow a checkpoint over
//! that checkpoint gives the state again; pages and counts follow from them.

use super::bytes::{Reader, Writer};
use super::catalog::is_limit;
use super::layout::usable_blocks;
use super::map_page::LEAF_ENTRIES;
use crate::error::{Error, Result};
use crate::limits::{
    NAME_BYTES_MAX, POOL_BLOCKS_MAX, POOL_BLOCKS_MIN, RECORD_BLOCKS_MAX, VOLUME_BYTES_MAX,
};
use crate::name::Name;
use crate::units::{BLOCK_BYTES, Lba, Pba, Timestamp, VolumeId};

/// The most bytes of an encoded record: few enough that a journal block is never left much emptier than it could be.
pub(crate) const RECORD_BYTES_MAX: usize = 500;
/// The most bytes of one that is no [`Record::RemoveAll`].
const FIELDS_BYTES_MAX: usize = 64 + NAME_BYTES_MAX;
const _: () = assert!(FIELDS_BYTES_MAX <= RECORD_BYTES_MAX);

/// What a volume can be told besides its name and its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Property {
    /// The most bytes that it maps.
    Quota,
    /// Bytes that are set aside for it.
    Reserve,
}

/// A change of the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Blocks from `lba` map to newly allocated blocks from `pba`.
    Map {
        volume: VolumeId,
        lba: Lba,
        pba: Pba,
        count: u64,
    },
    /// Blocks from `lba` map to nothing.
    Unmap {
        volume: VolumeId,
        lba: Lba,
        count: u64,
    },
    /// A new, empty volume.
    Create {
        id: VolumeId,
        name: Name,
        bytes: u64,
        sector_bytes: u32,
        redirects_always: bool,
        created: Timestamp,
    },
    /// A snapshot of `volume`.
    Snapshot {
        volume: VolumeId,
        id: VolumeId,
        name: Name,
        created: Timestamp,
    },
    /// A volume that begins as `snapshot` is.
    Clone {
        snapshot: VolumeId,
        id: VolumeId,
        name: Name,
        created: Timestamp,
    },
    /// `volume` becomes as `snapshot` is; its old tree is reclaimed as `reclaim`.
    Rollback {
        volume: VolumeId,
        snapshot: VolumeId,
        reclaim: VolumeId,
    },
    /// A volume or snapshot goes; its tree is reclaimed.
    Remove { id: VolumeId },
    /// The same of several, whose numbers ascend.
    RemoveAll { ids: Vec<VolumeId> },
    /// A volume or snapshot gets another name.
    Rename { id: VolumeId, name: Name },
    /// The pool has so many blocks from here on.
    Grow { blocks: u64 },
    /// A volume gets another size; blocks beyond a smaller one are unmapped already.
    Resize { id: VolumeId, bytes: u64 },
    /// A hold on `snapshot`.
    Hold {
        snapshot: VolumeId,
        id: VolumeId,
        created: Timestamp,
        tag: Name,
    },
    /// A hold goes.
    Release { id: VolumeId },
    /// A volume gets a limit, in bytes; 0 takes it away.
    SetProperty {
        id: VolumeId,
        property: Property,
        value: u64,
    },
}

/// The distance between two numbers, seven bits a byte, the low ones first; the highest bit says that another byte follows.
fn gap_bytes(mut gap: u64) -> impl ExactSizeIterator<Item = u8> {
    let mut bytes = [0; 10];
    let mut count = 0;
    for byte in &mut bytes {
        count += 1;
        *byte = (gap & 0x7f) as u8;
        gap >>= 7;
        if gap == 0 {
            break;
        }
        *byte |= 0x80;
    }
    bytes.into_iter().take(count)
}

/// Reads a distance; none where it is zero, too large, or longer than it need be.
fn gap(reader: &mut Reader<'_>) -> Result<Option<u64>> {
    let mut gap = 0;
    for shift in (0..63).step_by(7) {
        let byte = reader.u8()?;
        gap |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok((byte > 0).then_some(gap));
        }
    }
    Ok(None)
}

fn is_id(id: VolumeId) -> bool {
    id.0 > 0 && id.0 >> 62 == 0
}

impl Record {
    /// Whether this must not be durable before the data that was written before it: it names blocks with data, it says
    /// at what moment a volume is kept, or it cuts off bytes that were zeroed in place before.
    pub(crate) fn relies_on_data(&self) -> bool {
        match self {
            Self::Map { .. } | Self::Snapshot { .. } | Self::Grow { .. } | Self::Resize { .. } => {
                true
            }
            Self::Unmap { .. }
            | Self::Create { .. }
            | Self::Clone { .. }
            | Self::Rollback { .. }
            | Self::Remove { .. }
            | Self::RemoveAll { .. }
            | Self::Rename { .. }
            | Self::Hold { .. }
            | Self::Release { .. }
            | Self::SetProperty { .. } => false,
        }
    }

    /// Its first byte.
    fn kind(&self) -> u8 {
        match self {
            Self::Map { .. } => 1,
            Self::Unmap { .. } => 2,
            Self::Create { .. } => 3,
            Self::Snapshot { .. } => 4,
            Self::Clone { .. } => 5,
            Self::Rollback { .. } => 6,
            Self::Remove { .. } => 7,
            Self::Rename { .. } => 8,
            Self::Resize { .. } => 9,
            Self::Grow { .. } => 10,
            Self::Hold { .. } => 11,
            Self::Release { .. } => 12,
            Self::SetProperty { .. } => 13,
            Self::RemoveAll { .. } => 14,
        }
    }

    /// The records that remove these, in this order but for numbers that could ascend and do not.
    pub(crate) fn removals(ids: &[VolumeId]) -> Vec<Self> {
        let mut records = Vec::new();
        let mut rest = ids;
        while let Some((first, others)) = rest.split_first() {
            let (mut last, mut bytes, mut count) = (*first, 11, 1);
            for id in others {
                bytes += gap_bytes(id.0.saturating_sub(last.0)).len();
                if *id <= last || bytes > RECORD_BYTES_MAX {
                    break;
                }
                (last, count) = (*id, count + 1);
            }
            let (some, later) = rest.split_at(count);
            records.push(match some {
                [id] => Self::Remove { id: *id },
                _ => Self::RemoveAll { ids: some.to_vec() },
            });
            rest = later;
        }
        records
    }

    /// Appends the encoded record.
    #[expect(clippy::too_many_lines, reason = "an arm for each kind of record")]
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut bytes = [0; FIELDS_BYTES_MAX];
        let mut writer = Writer::new(&mut bytes);
        let mut trailer: &str = "";
        writer.u8(self.kind());
        let fixed = match self {
            Self::Map {
                volume,
                lba,
                pba,
                count,
            } => {
                writer.u64(volume.0);
                writer.u48(lba.0);
                writer.u48(pba.0);
                writer.u48(*count);
                27
            }
            Self::Unmap { volume, lba, count } => {
                writer.u64(volume.0);
                writer.u48(lba.0);
                writer.u48(*count);
                21
            }
            Self::Create {
                id,
                name,
                bytes,
                sector_bytes,
                redirects_always,
                created,
            } => {
                writer.u64(id.0);
                writer.u64(*bytes);
                writer.u32(*sector_bytes);
                writer.u8(u8::from(*redirects_always));
                writer.u64(created.0);
                trailer = name.as_str();
                30
            }
            Self::Snapshot {
                volume: from,
                id,
                name,
                created,
            }
            | Self::Clone {
                snapshot: from,
                id,
                name,
                created,
            }
            | Self::Hold {
                snapshot: from,
                id,
                created,
                tag: name,
            } => {
                writer.u64(from.0);
                writer.u64(id.0);
                writer.u64(created.0);
                trailer = name.as_str();
                25
            }
            Self::Rollback {
                volume,
                snapshot,
                reclaim,
            } => {
                writer.u64(volume.0);
                writer.u64(snapshot.0);
                writer.u64(reclaim.0);
                25
            }
            Self::Remove { id } | Self::Release { id } => {
                writer.u64(id.0);
                9
            }
            Self::RemoveAll { ids } => {
                out.push(self.kind());
                let mut last = ids.first().map_or(0, |first| first.0);
                out.extend(last.to_le_bytes());
                let others = u16::try_from(ids.len().saturating_sub(1)).unwrap_or(u16::MAX);
                out.extend(others.to_le_bytes());
                for id in ids.iter().skip(1) {
                    out.extend(gap_bytes(id.0.saturating_sub(last)));
                    last = id.0;
                }
                return;
            }
            Self::Rename { id, name } => {
                writer.u64(id.0);
                trailer = name.as_str();
                9
            }
            Self::Resize { id, bytes } => {
                writer.u64(id.0);
                writer.u64(*bytes);
                17
            }
            Self::Grow { blocks } => {
                writer.u64(*blocks);
                9
            }
            Self::SetProperty {
                id,
                property,
                value,
            } => {
                writer.u64(id.0);
                writer.u8(match property {
                    Property::Quota => 1,
                    Property::Reserve => 2,
                });
                writer.u64(*value);
                18
            }
        };
        out.extend(bytes.get(..fixed).unwrap_or_default());
        out.extend(trailer.as_bytes());
    }

    /// Whether its numbers and sizes can be, so that what it makes can be written and read back.
    fn is_plausible(&self) -> bool {
        let is_size = |bytes: u64| bytes > 0 && bytes <= VOLUME_BYTES_MAX;
        match self {
            Self::Map { volume: id, .. }
            | Self::Unmap { volume: id, .. }
            | Self::Remove { id }
            | Self::Rename { id, .. }
            | Self::Release { id } => is_id(*id),
            Self::RemoveAll { ids } => ids.iter().all(|id| is_id(*id)),
            Self::Create {
                id,
                bytes,
                sector_bytes,
                ..
            } => is_id(*id) && is_size(*bytes) && matches!(sector_bytes, 512 | 4096),
            Self::Snapshot {
                volume: from, id, ..
            }
            | Self::Clone {
                snapshot: from, id, ..
            }
            | Self::Hold {
                snapshot: from, id, ..
            } => is_id(*from) && is_id(*id),
            Self::Rollback {
                volume,
                snapshot,
                reclaim,
            } => is_id(*volume) && is_id(*snapshot) && is_id(*reclaim),
            Self::Resize { id, bytes } => is_id(*id) && is_size(*bytes),
            Self::Grow { blocks } => {
                (POOL_BLOCKS_MIN..=POOL_BLOCKS_MAX).contains(blocks)
                    && usable_blocks(*blocks) == *blocks
            }
            Self::SetProperty { id, value, .. } => is_id(*id) && is_limit(*value),
        }
    }

    /// The record that `bytes` holds, no more and no less.
    #[expect(clippy::too_many_lines, reason = "an arm for each kind of record")]
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let damaged = |fact: &str| Error::corrupt(format!("journal record: {fact}"));
        let name = |reader: &mut Reader<'_>| -> Result<Name> {
            let text = std::str::from_utf8(reader.bytes(reader.remaining())?).ok();
            text.and_then(|text| text.parse().ok())
                .ok_or_else(|| damaged("a name that cannot be"))
        };
        let run = |lba: Lba, count: u64| {
            let inside = count > 0
                && count <= RECORD_BLOCKS_MAX
                && lba.0 + count <= VOLUME_BYTES_MAX / BLOCK_BYTES;
            if inside {
                Ok(count)
            } else {
                Err(damaged("a run of blocks that cannot be"))
            }
        };
        let record = match reader.u8()? {
            1 => {
                let (volume, lba, pba) = (
                    VolumeId(reader.u64()?),
                    Lba(reader.u48()?),
                    Pba(reader.u48()?),
                );
                let count = run(lba, reader.u48()?)?;
                if pba.0 == 0 || pba.0 + count > POOL_BLOCKS_MAX {
                    return Err(damaged("blocks beyond any pool"));
                }
                if lba.0 % LEAF_ENTRIES as u64 + count > LEAF_ENTRIES as u64 {
                    return Err(damaged("blocks of more than one leaf"));
                }
                Self::Map {
                    volume,
                    lba,
                    pba,
                    count,
                }
            }
            2 => {
                let (volume, lba) = (VolumeId(reader.u64()?), Lba(reader.u48()?));
                let count = run(lba, reader.u48()?)?;
                Self::Unmap { volume, lba, count }
            }
            3 => Self::Create {
                id: VolumeId(reader.u64()?),
                bytes: reader.u64()?,
                sector_bytes: reader.u32()?,
                redirects_always: reader.u8()? != 0,
                created: Timestamp(reader.u64()?),
                name: name(&mut reader)?,
            },
            4 => Self::Snapshot {
                volume: VolumeId(reader.u64()?),
                id: VolumeId(reader.u64()?),
                created: Timestamp(reader.u64()?),
                name: name(&mut reader)?,
            },
            5 => Self::Clone {
                snapshot: VolumeId(reader.u64()?),
                id: VolumeId(reader.u64()?),
                created: Timestamp(reader.u64()?),
                name: name(&mut reader)?,
            },
            6 => Self::Rollback {
                volume: VolumeId(reader.u64()?),
                snapshot: VolumeId(reader.u64()?),
                reclaim: VolumeId(reader.u64()?),
            },
            7 => Self::Remove {
                id: VolumeId(reader.u64()?),
            },
            8 => Self::Rename {
                id: VolumeId(reader.u64()?),
                name: name(&mut reader)?,
            },
            9 => Self::Resize {
                id: VolumeId(reader.u64()?),
                bytes: reader.u64()?,
            },
            10 => Self::Grow {
                blocks: reader.u64()?,
            },
            11 => Self::Hold {
                snapshot: VolumeId(reader.u64()?),
                id: VolumeId(reader.u64()?),
                created: Timestamp(reader.u64()?),
                tag: name(&mut reader)?,
            },
            12 => Self::Release {
                id: VolumeId(reader.u64()?),
            },
            13 => Self::SetProperty {
                id: VolumeId(reader.u64()?),
                property: match reader.u8()? {
                    1 => Property::Quota,
                    2 => Property::Reserve,
                    _ => return Err(damaged("an unknown property")),
                },
                value: reader.u64()?,
            },
            14 => {
                let mut last = reader.u64()?;
                let mut ids = vec![VolumeId(last)];
                for _ in 0..reader.u16()? {
                    let next = gap(&mut reader)?.and_then(|gap| last.checked_add(gap));
                    last = next.ok_or_else(|| damaged("numbers that do not ascend"))?;
                    ids.push(VolumeId(last));
                }
                Self::RemoveAll { ids }
            }
            _ => return Err(damaged("an unknown kind")),
        };
        if !record.is_plausible() {
            return Err(damaged("a field that cannot be"));
        }
        if reader.remaining() > 0 {
            return Err(damaged("bytes after its last field"));
        }
        Ok(record)
    }
}
