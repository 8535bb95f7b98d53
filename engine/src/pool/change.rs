//! Commands that change the catalog take turns. One that takes long does its slow part outside of its turn, and keeps away
//! only those that concern the same volumes.

use super::Pool;
use crate::metadata::Metadata;
use crate::sync::{AsyncMutexGuard, Event, Mutex};
use crate::units::VolumeId;
use std::collections::BTreeSet;

/// The volumes that commands are changing.
#[derive(Debug, Default)]
pub(super) struct Changes {
    ids: Mutex<BTreeSet<VolumeId>>,
    ended: Event,
}

impl Changes {
    /// Whether this volume is being changed.
    pub(super) fn concern(&self, id: VolumeId) -> bool {
        self.ids.lock().contains(&id)
    }

    /// Waits until none of these volumes is being changed.
    async fn end_of(&self, ids: &[VolumeId]) {
        let has_ended = || !ids.iter().any(|id| self.concern(*id));
        self.ended.wait_for(|| has_ended().then_some(())).await;
    }
}

/// A change of volumes that depends on whether they are attached. While it lives nobody attaches them; who looks after it
/// was announced knows whether somebody has.
#[derive(Debug)]
pub(super) struct Change<'a> {
    pool: &'a Pool,
    ids: Vec<VolumeId>,
}

impl<'a> Change<'a> {
    /// Announces a change. The caller has the turn of these volumes, from [`Pool::turn`].
    pub(super) fn announce(pool: &'a Pool, ids: Vec<VolumeId>) -> Self {
        pool.changes.ids.lock().extend(&ids);
        Self { pool, ids }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut changing = self.pool.changes.ids.lock();
        for id in &self.ids {
            changing.remove(id);
        }
        drop(changing);
        self.pool.changes.ended.notify_all();
    }
}

impl Pool {
    /// The right to change the catalog, once nobody is changing the volumes that `concerned` finds.
    pub(super) async fn turn(
        &self,
        concerned: impl Fn(&Metadata) -> Vec<VolumeId>,
    ) -> AsyncMutexGuard<'_, ()> {
        loop {
            let turn = self.control.lock().await;
            let ids = self.ledger.look(&concerned);
            if !ids.iter().any(|id| self.changes.concern(*id)) {
                return turn;
            }
            drop(turn);
            self.changes.end_of(&ids).await;
        }
    }
}
