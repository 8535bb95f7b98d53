//! Checking: every reference is counted and held against the count that the pool keeps.
//!
//! What is checked is what stands on disk. A pool open for writing first writes a checkpoint, which is read back while
//! the pool goes on; one open read-only is checked with its journal replayed in memory, or, where that cannot be done,
//! without.

use super::Pool;
use super::as_of::AsOf;
use super::mend::{Purpose, mend};
use super::reach::Reach;
use super::recovery::load_current;
use super::report::{ByteRange, CheckReport, Unreadable};
use crate::checkpoint::{Losses, load_catalog, load_index, load_readable, read_superblocks};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog::{Own, Role};
use crate::format::layout::REGION_BLOCKS;
use crate::format::superblock::Superblock;
use crate::metadata::Metadata;
use crate::units::{BLOCK_BYTES, Generation, Pba, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Of each kind of damage, at most this many lines are reported.
const DAMAGE_LINES_MAX: usize = 1000;
/// Of what a volume cannot read, at most this many ranges are reported.
const RANGES_MAX: usize = 8;
/// Of those who reach a page, at most this many are named in its line.
const NAMES_MAX: usize = 4;

/// How often a check begins anew where writers took what it was to read.
const ATTEMPTS_MAX: usize = 3;

/// What is wrong with the counts of a region.
#[derive(Debug, Default)]
pub(super) struct RegionFault {
    /// They cannot be read.
    pub(super) lost: Option<Error>,
    /// Blocks that have more references than counted.
    pub(super) low: u64,
    /// Blocks counted more often than referred to.
    pub(super) high: u64,
}

/// All that a check finds of the metadata of a checkpoint.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) metadata: Metadata,
    pub(super) losses: Losses,
    pub(super) reach: Reach,
    /// By region, those with a fault.
    pub(super) regions: BTreeMap<u64, RegionFault>,
    /// For each entry, the logical blocks below pages that cannot be read.
    pub(super) lost: BTreeMap<VolumeId, Vec<(Pba, Range<u64>)>>,
    /// Lines about counts that are too low.
    low_lines: Vec<String>,
}

impl Pool {
    /// Holds every reference against every count. Reads all metadata; the pool may be open read-only. `progress` is
    /// called with how many blocks are accounted for, and of how many.
    ///
    /// Of a pool that is open for writing one checkpoint is read, while requests, commands and later checkpoints go on.
    pub async fn check<D: Device>(
        &self,
        device: &D,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        let _alone = self.checking.lock().await;
        let mut report = if self.is_read_only {
            self.check_unapplied(device, progress).await?
        } else {
            self.check_live(device, progress).await?
        };
        report.damage.truncate(DAMAGE_LINES_MAX);
        Ok(report)
    }

    /// Checks a checkpoint that is written for it.
    async fn check_live<D: Device>(
        &self,
        device: &D,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        self.check_writable()?;
        for _ in 0..ATTEMPTS_MAX {
            let current = match self.checkpoints.write_kept(&self.ledger, device).await {
                Ok(current) => current,
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    let mut report = self.check_last(device, progress).await?;
                    let line = format!("no checkpoint can be written: {error}");
                    report.damage.insert(0, line);
                    return Ok(report);
                }
                Err(error) => return Err(error),
            };
            let superblock = current.superblock.clone();
            let device = AsOf::new(&self.ledger, superblock.generation, device);
            let (mut metadata, mut losses) = load_index(&device, &superblock).await?;
            drop(current);
            load_catalog(&device, &superblock, &mut metadata, &mut losses).await?;
            let (generation, all) = (superblock.generation, BTreeSet::new());
            let findings =
                Findings::of(&device, metadata, losses, generation, &all, progress).await;
            if device.is_whole() {
                return Ok(findings.report());
            }
        }
        let message = format!(
            "{}: so little space is free that writers took what the check was to read; remove something, or try again when less is written",
            self.name
        );
        Err(Error::with(ErrorKind::Busy, message))
    }

    /// Checks the last checkpoint, where none can be written after it.
    async fn check_last<D: Device>(
        &self,
        device: &D,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        let current = self.checkpoints.hold().await;
        let (metadata, losses) = load_readable(device, &current.superblock).await?;
        let (generation, all) = (current.superblock.generation, BTreeSet::new());
        let findings = Findings::of(device, metadata, losses, generation, &all, progress).await;
        Ok(findings.report())
    }

    /// Checks a pool that is open read-only, with its journal replayed in memory, or without where that cannot be done.
    async fn check_unapplied<D: Device>(
        &self,
        device: &D,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CheckReport> {
        let current = self.checkpoints.hold().await;
        let superblock = &current.superblock;
        let (generation, all) = (superblock.generation, BTreeSet::new());
        let mut first = superblock_faults(device, superblock).await?;
        let (was_clean, warnings) = (superblock.is_clean, &mut Vec::new());
        let loaded = load_current(device, superblock, was_clean, &self.ring, warnings).await;
        let (metadata, losses, unapplied) = match loaded {
            Ok((metadata, _)) => (metadata, Losses::default(), None),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let (metadata, losses) = load_readable(device, superblock).await?;
                (metadata, losses, Some(error))
            }
            Err(error) => return Err(error),
        };
        let findings = Findings::of(device, metadata, losses, generation, &all, progress).await;
        let mut report = findings.report();
        if let Some(error) = unapplied {
            // Counts are held against the checkpoint that they belong to, but what cannot be read is what a reader of
            // this pool cannot.
            report.unreadable = self.unreadable_now(device, superblock).await?;
            if report.damage.is_empty() {
                first.push(format!(
                    "what no checkpoint covers cannot be applied: {error}"
                ));
            }
        }
        for id in &self.withheld {
            let path = self.ledger.look(|metadata| metadata.catalog.path(*id));
            let bytes = self.ledger.look(|metadata| {
                metadata
                    .catalog
                    .get(*id)
                    .map_or(0, |found| found.entry.bytes)
            });
            report.unreadable.retain(|other| other.id != *id);
            report.unreadable.push(Unreadable {
                path,
                id: *id,
                bytes,
                ranges: vec![ByteRange {
                    offset: 0,
                    length: bytes,
                }],
                reason: "acknowledged writes to it may be lost".to_owned(),
            });
        }
        first.append(&mut report.damage);
        report.damage = first;
        Ok(report)
    }

    /// What of each volume and snapshot cannot be read, with everything applied that can be.
    async fn unreadable_now<D: Device>(
        &self,
        device: &D,
        superblock: &Superblock,
    ) -> Result<Vec<Unreadable>> {
        let (was_clean, generation) = (superblock.is_clean, superblock.generation);
        let (look, all, ignore) = (Purpose::Look, BTreeSet::new(), &mut |_, _| {});
        let mended = mend(device, superblock, was_clean, &self.ring, look, ignore).await?;
        let (metadata, losses) = (mended.metadata, Losses::default());
        let findings = Findings::of(device, metadata, losses, generation, &all, ignore).await;
        Ok(findings.report().unreadable)
    }
}

/// What is wrong with a copy of the superblock.
async fn superblock_faults<D: Device>(device: &D, superblock: &Superblock) -> Result<Vec<String>> {
    Ok(read_superblocks(device, superblock.blocks).await?.warnings)
}

impl Findings {
    /// Walks everything but the entries in `without`, and compares.
    pub(super) async fn of<D: Device>(
        device: &D,
        mut metadata: Metadata,
        losses: Losses,
        durable: Generation,
        without: &BTreeSet<VolumeId>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Self {
        let total = metadata.space.used_blocks();
        let mut told = |done| progress(done, total);
        let reach = Reach::walk(device, &mut metadata, durable, without, &mut told).await;
        let lost = reach.unreadable_blocks(device, &mut metadata).await;
        let mut findings = Self {
            metadata,
            losses,
            reach,
            regions: BTreeMap::new(),
            lost,
            low_lines: Vec::new(),
        };
        findings.compare(device).await;
        findings
    }

    /// Holds the references found against the counts.
    async fn compare<D: Device>(&mut self, device: &D) {
        let mut regions: BTreeSet<u64> = self.metadata.space.written_regions().collect();
        for region in self.reach.regions() {
            if self.is_index_lost(region) {
                self.regions.entry(region).or_default();
            }
            regions.insert(region);
        }
        for region in regions {
            let fault = self.compare_region(device, region).await;
            if fault.lost.is_some() || fault.low > 0 || fault.high > 0 {
                self.regions.insert(region, fault);
            }
        }
    }

    /// Whether the index of a region's counts is lost, which has a line of its own.
    fn is_index_lost(&self, region: u64) -> bool {
        let mut lost = self.losses.counts.iter();
        lost.any(|(regions, _)| regions.contains(&region))
    }

    async fn compare_region<D: Device>(&mut self, device: &D, region: u64) -> RegionFault {
        let mut fault = RegionFault::default();
        let blocks = self.metadata.space.region_blocks(region);
        for (offset, pba) in (0..).zip(blocks.map(Pba)) {
            if self.metadata.space.is_fixed(pba) {
                continue;
            }
            let counted = self
                .metadata
                .with_supply(device, |metadata| metadata.space.count(pba))
                .await;
            let counted = match counted {
                Ok(counted) => counted,
                Err(error) => {
                    fault.lost = Some(error);
                    break;
                }
            };
            let found = self.reach.count(region, offset);
            if found < counted {
                fault.high += 1;
            } else if found > counted {
                fault.low += 1;
                if self.low_lines.len() < DAMAGE_LINES_MAX && !self.is_index_lost(region) {
                    let fact = format!("{found} references, counted are {counted}");
                    let line = Error::corrupt(fact).at_pba(pba).to_string();
                    self.low_lines.push(line);
                }
            }
        }
        fault
    }

    /// What messages call an entry.
    pub(super) fn name(&self, id: VolumeId) -> String {
        match self.metadata.catalog.path(id) {
            Some(path) => path.to_string(),
            None => match self.metadata.catalog.get(id).map(|found| &found.entry.role) {
                Ok(Role::Snapshot { name, .. }) => {
                    format!("snapshot {name} of a volume whose name is lost")
                }
                _ => format!("removed volume number {}", id.0),
            },
        }
    }

    /// Those who reach a page that cannot be read.
    fn names_at(&self, pba: Pba) -> String {
        let mut names: Vec<String> = self
            .lost
            .iter()
            .filter(|(_, ranges)| ranges.iter().any(|(at, _)| *at == pba))
            .map(|(id, _)| self.name(*id))
            .collect();
        let more = names.len().saturating_sub(NAMES_MAX);
        names.truncate(NAMES_MAX);
        let names = names.join(", ");
        if more > 0 {
            format!("{names} and {more} more")
        } else {
            names
        }
    }

    /// Entries that own alone something else than the catalog says, what they do and what it says: where that can be told.
    pub(super) fn misjudged(&self) -> Vec<(VolumeId, Own, Own)> {
        let catalog = &self.metadata.catalog;
        let is_whole = self.reach.unreadable.is_empty()
            && self.losses.catalog.is_empty()
            && self.losses.counts.is_empty()
            && self.regions.is_empty()
            && self.reach.miscounted.is_empty();
        if !is_whole {
            return Vec::new();
        }
        let entries = catalog.entries().into_iter();
        entries
            .filter_map(|entry| {
                let (says, is) = (entry.kin.counted()?, *self.reach.own.get(&entry.id)?);
                (says != is && catalog.path(entry.id).is_some()).then_some((entry.id, is, says))
            })
            .collect()
    }

    /// The report of it.
    pub(super) fn report(&self) -> CheckReport {
        let mut damage = Vec::new();
        for (slots, error) in &self.losses.catalog {
            damage.push(format!(
                "{error}; what its {} slots held is not known",
                slots.len()
            ));
        }
        let strays = self.losses.holds.iter().take(DAMAGE_LINES_MAX);
        damage.extend(strays.map(|(_, error)| error.to_string()));
        for (regions, error) in &self.losses.counts {
            damage.push(format!(
                "{error}; counts of {} regions",
                regions.clone().count()
            ));
        }
        for id in &self.reach.too_small {
            damage.push(format!(
                "{}: its map is too small for its size",
                self.name(*id)
            ));
        }
        for (id, mapped) in &self.reach.miscounted {
            let says = self.metadata.catalog.get(*id);
            let says = says.map_or(0, |found| found.entry.mapped_blocks);
            damage.push(format!(
                "{}: maps {mapped} blocks, the catalog says {says}",
                self.name(*id)
            ));
        }
        for (id, is, says) in self.misjudged() {
            damage.push(format!(
                "{}: owns {} blocks and {} map pages alone, the catalog says {} and {}",
                self.name(id),
                is.data,
                is.pages,
                says.data,
                says.pages
            ));
        }
        let pages = self.reach.unreadable.iter().take(DAMAGE_LINES_MAX);
        damage.extend(pages.map(|(pba, error)| format!("{}: {error}", self.names_at(*pba))));
        for (region, fault) in &self.regions {
            if let Some(error) = &fault.lost {
                let start = Pba(region * REGION_BLOCKS);
                damage.push(format!(
                    "counts of {REGION_BLOCKS} blocks from {start}: {error}"
                ));
            }
        }
        damage.extend(self.low_lines.iter().cloned());
        CheckReport {
            pages: self.reach.pages,
            data_blocks: self.reach.data_blocks,
            damage,
            unreadable: self.unreadable(),
            leaked_blocks: self.regions.values().map(|fault| fault.high).sum(),
        }
    }

    fn unreadable(&self) -> Vec<Unreadable> {
        let of = |(id, blocks): (&VolumeId, &Vec<(Pba, Range<u64>)>)| {
            let mut ranges: Vec<ByteRange> = Vec::new();
            let size = self.metadata.catalog.get(*id);
            let size = size.map_or(0, |found| found.entry.bytes);
            for (_, blocks) in blocks.iter().filter(|(_, blocks)| !blocks.is_empty()) {
                let offset = blocks.start * BLOCK_BYTES;
                let end = (blocks.end * BLOCK_BYTES).min(size);
                match ranges.last_mut() {
                    Some(last) if last.offset + last.length == offset => {
                        last.length = end - last.offset;
                    }
                    _ => ranges.push(ByteRange {
                        offset,
                        length: end.saturating_sub(offset),
                    }),
                }
            }
            let bytes = ranges.iter().map(|range| range.length).sum();
            ranges.truncate(RANGES_MAX);
            Unreadable {
                path: self.metadata.catalog.path(*id),
                id: *id,
                bytes,
                ranges,
                reason: "pages of its map cannot be read".to_owned(),
            }
        };
        self.lost.iter().map(of).collect()
    }
}
