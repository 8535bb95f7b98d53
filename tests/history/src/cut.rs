//! Whether a snapshot is one cut of the writes, over all its blocks and volumes.
//!
//! Something in the snapshot was called at the moment T, the latest such. Whatever was answered before T, or before
//! the snapshot was asked for, came before the cut. So no block may show a write that another, answered before T,
//! certainly replaced.

use crate::{Action, Operation, Place, Snapshot, Span, ZEROS};
use std::collections::BTreeMap;

pub(crate) fn check(
    snapshot: &Snapshot,
    blocks: &BTreeMap<Place, Vec<Operation>>,
) -> Result<(), String> {
    let writes = |place: &Place| {
        let operations = blocks.get(place).map(Vec::as_slice).unwrap_or_default();
        operations
            .iter()
            .filter_map(|operation| match operation.action {
                Action::Write(stamp) => Some((stamp, operation.span)),
                Action::Read(_) => None,
            })
    };
    // Of several that wrote zeros any may be the one that is seen, so zeros say nothing about T.
    let mut latest = snapshot.span.called;
    for (place, found) in snapshot
        .content
        .iter()
        .filter(|(_, found)| **found != ZEROS)
    {
        let Some((_, span)) = writes(place).find(|(stamp, _)| stamp == found) else {
            return Err(format!("{place:?} holds {found}, which nobody wrote there"));
        };
        latest = latest.max(span.called);
    }
    for (place, found) in &snapshot.content {
        // The last call of those that were answered before T: what was answered before that call is replaced.
        let replaced_before = writes(place)
            .filter(|(_, span)| span.answered < latest)
            .map(|(_, span)| span.called)
            .max()
            .unwrap_or(0);
        let is_in =
            |span: Span| span.called < snapshot.span.answered && span.answered >= replaced_before;
        let began_as_zeros = *found == ZEROS && replaced_before == 0;
        let explained = writes(place).any(|(stamp, span)| stamp == *found && is_in(span));
        if !began_as_zeros && !explained {
            return Err(format!(
                "{place:?} holds {found}, and what replaced it came before something else that is in the snapshot"
            ));
        }
    }
    Ok(())
}
