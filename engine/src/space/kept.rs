//! What a reader of an earlier checkpoint still needs of it, while the pool goes on: a check walks all metadata of one
//! checkpoint, and nobody waits for that.
//!
//! Two things of a checkpoint would be overwritten by later ones. Counts of a region stand in two slots in turn: what they
//! were is kept in memory from their first change on. Pages of maps and of the catalog that lose their last owner keep
//! their blocks until the reader has ended. Where space runs out before that, the reader loses: the blocks are taken
//! back, and it has to begin with a younger checkpoint.

use super::SpaceMap;
use crate::format::counts::Halves;
use crate::format::layout::region_slot;
use crate::format::page::{PageKind, PagePtr};
use crate::units::{Extent, Generation, Pba, Seq};
use rustc_hash::FxHashMap;
use triomphe::Arc;

/// What is kept of a checkpoint.
#[derive(Debug)]
pub(super) struct Kept {
    generation: Generation,
    /// Counts that changed since, by the slot that they stood in.
    counts: FxHashMap<Pba, KeptCounts>,
    /// Pages released since the last freeze.
    fresh: Vec<Pba>,
    /// Pages released before, which no durable state names and no request uses any more.
    ripe: Vec<Pba>,
}

/// A page of counts as the checkpoint has it.
#[derive(Clone, Debug)]
pub(crate) struct KeptCounts {
    pub(crate) kind: PageKind,
    pub(crate) generation: Generation,
    pub(crate) halves: Arc<Halves>,
}

/// Released pages that a freeze took, and the checkpoint that they are kept of.
#[derive(Debug)]
pub(crate) struct KeptPages {
    generation: Generation,
    pages: Vec<Pba>,
}

impl SpaceMap {
    /// Keeps what the checkpoint of `generation` names, which was frozen just now, until [`SpaceMap::stop_keeping`].
    pub(crate) fn keep(&mut self, generation: Generation) {
        self.stop_keeping();
        self.kept = Some(Kept {
            generation,
            counts: FxHashMap::default(),
            fresh: Vec::new(),
            ripe: Vec::new(),
        });
    }

    /// Whether all that the checkpoint of `generation` names is still there.
    pub(crate) fn keeps(&self, generation: Generation) -> bool {
        let kept = self.kept.as_ref();
        kept.is_some_and(|kept| kept.generation == generation)
    }

    /// Keeps nothing any more. Whether that makes blocks pending.
    pub(crate) fn stop_keeping(&mut self) -> bool {
        let Some(kept) = self.kept.take() else {
            return false;
        };
        let pages = kept.fresh.len() + kept.ripe.len();
        let extents = kept.fresh.into_iter().chain(kept.ripe);
        self.pending.extend(extents.map(|pba| Extent::new(pba, 1)));
        self.kept_blocks -= pages as u64;
        self.pending_blocks += pages as u64;
        pages > 0
    }

    /// What stood in a slot of counts, if it changed since.
    pub(crate) fn kept_counts(&self, slot: Pba) -> Option<KeptCounts> {
        self.kept.as_ref()?.counts.get(&slot).cloned()
    }

    /// Blocks of released pages that are kept.
    pub(crate) fn kept_blocks(&self) -> u64 {
        self.kept_blocks
    }

    /// The counts of a region change for the first time since a freeze.
    pub(super) fn keep_counts(&mut self, number: u64) {
        let Some(kept) = &mut self.kept else { return };
        let Some(region) = self.regions.get(number) else {
            return;
        };
        let Some((slot, generation, _)) = region.place() else {
            return;
        };
        if generation > kept.generation {
            return;
        }
        let (low, high) = region.halves();
        let halves = [
            (false, PageKind::Counts, low),
            (true, PageKind::CountsHigh, high),
        ];
        for (is_high, kind, halves) in halves {
            if let Some(halves) = halves {
                kept.counts.insert(
                    region_slot(number, slot, is_high),
                    KeptCounts {
                        kind,
                        generation,
                        halves,
                    },
                );
            }
        }
    }

    /// One owner less for a page of a map or of the catalog. See [`SpaceMap::release`].
    pub(crate) fn release_page(&mut self, ptr: PagePtr, seq: Option<Seq>) {
        if !self.drop_owner(ptr.pba, seq) {
            return;
        }
        match &mut self.kept {
            Some(kept) if ptr.generation <= kept.generation => {
                kept.fresh.push(ptr.pba);
                self.kept_blocks += 1;
            }
            _ => self.add_pending(ptr.pba),
        }
    }

    /// Takes the kept pages that were released so far, for a checkpoint that does not name them; they come back to
    /// [`SpaceMap::ripen`] when it is durable.
    pub(crate) fn take_kept(&mut self) -> Option<KeptPages> {
        let kept = self.kept.as_mut()?;
        Some(KeptPages {
            generation: kept.generation,
            pages: std::mem::take(&mut kept.fresh),
        })
    }

    /// Only the reader keeps these pages from being reused. Those that it does not need any more are pending now.
    pub(crate) fn ripen(&mut self, pages: KeptPages) {
        match &mut self.kept {
            Some(kept) if kept.generation == pages.generation => kept.ripe.extend(pages.pages),
            _ => {
                let count = pages.pages.len() as u64;
                self.kept_blocks -= count;
                self.pending_blocks += count;
                let extents = pages.pages.into_iter().map(|pba| Extent::new(pba, 1));
                self.pending.extend(extents);
            }
        }
    }

    /// How many kept blocks metadata may take at once.
    pub(super) fn ripe_blocks(&self) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.ripe.len() as u64)
    }

    /// Takes the blocks of kept pages for metadata, where nothing else is free; nothing is kept any more.
    pub(super) fn take_ripe(&mut self) -> Vec<Pba> {
        let Some(kept) = &mut self.kept else {
            return Vec::new();
        };
        let ripe = std::mem::take(&mut kept.ripe);
        self.kept_blocks -= ripe.len() as u64;
        self.stop_keeping();
        ripe
    }
}
