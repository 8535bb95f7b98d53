//! Whether one block is a register: two ways to find out.
//!
//! Where every write has a stamp of its own, a read says which write it saw, and it is enough to look at *zones*
//! (P. B. Gibbons and E. Korach, "Testing Shared Memories", SIAM Journal on Computing 26(4), 1997): in O(n log n).
//! Where zeros were written, several writes look alike. Then the orders are searched, call by call and answer by
//! answer (J. Wing and C. Gong, 1993, with the memory of G. Lowe, "Testing for linearizability", 2017); few requests
//! on one block are under way at once, so this is fast too.

use crate::{Action, Operation, ZEROS};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) fn check(operations: &[Operation]) -> Result<(), String> {
    let has_zeros = (operations.iter()).any(|operation| operation.action == Action::Write(ZEROS));
    if has_zeros {
        search(operations)
    } else {
        zones(operations)
    }
}

/// A write and the reads that saw it.
#[derive(Clone, Copy, Debug)]
struct Zone {
    stamp: u64,
    written: Option<u64>,
    first_answer: u64,
    last_call: u64,
}

/// The check by zones, for stamps that are all different.
fn zones(operations: &[Operation]) -> Result<(), String> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    for operation in operations {
        let (Action::Write(stamp) | Action::Read(stamp)) = operation.action;
        let zone = zones.entry(stamp).or_insert(Zone {
            stamp,
            // Zeros were there before everything.
            written: (stamp == ZEROS).then_some(0),
            first_answer: if stamp == ZEROS { 0 } else { u64::MAX },
            last_call: 0,
        });
        if matches!(operation.action, Action::Write(_))
            && zone.written.replace(operation.span.called).is_some()
        {
            return Err(format!("{stamp} was written twice"));
        }
        zone.first_answer = zone.first_answer.min(operation.span.answered);
        zone.last_call = zone.last_call.max(operation.span.called);
    }
    for operation in operations {
        let Action::Read(stamp) = operation.action else {
            continue;
        };
        match zones[&stamp].written {
            None => return Err(format!("{stamp} was read, and nobody wrote it")),
            Some(called) if operation.span.answered < called => {
                return Err(format!("{stamp} was read before it was written"));
            }
            Some(_) => {}
        }
    }
    // Forward zones: from the first answer to the last call the block holds this stamp and no other.
    let mut forward: Vec<Zone> = (zones.values())
        .filter(|zone| zone.first_answer < zone.last_call)
        .copied()
        .collect();
    forward.sort_by_key(|zone| zone.first_answer);
    for pair in forward.windows(2) {
        if pair[1].first_answer < pair[0].last_call {
            return Err(format!(
                "{} and {} are both there at {}",
                pair[0].stamp, pair[1].stamp, pair[1].first_answer
            ));
        }
    }
    // Backward zones: somewhere between the last call and the first answer the block holds this stamp.
    for zone in zones
        .values()
        .filter(|zone| zone.first_answer >= zone.last_call)
    {
        let next = forward.partition_point(|other| other.first_answer < zone.last_call);
        let around = next.checked_sub(1).map(|index| forward[index]);
        if let Some(other) = around.filter(|other| zone.first_answer < other.last_call) {
            return Err(format!(
                "{} has no moment: {} is there from {} to {}",
                zone.stamp, other.stamp, other.first_answer, other.last_call
            ));
        }
    }
    Ok(())
}

/// What may be true at a moment: the stamp, and which of the requests under way have taken effect.
type Belief = (u64, BTreeSet<usize>);

/// The check by search.
fn search(operations: &[Operation]) -> Result<(), String> {
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(operations.len() * 2);
    for (index, operation) in operations.iter().enumerate() {
        events.push((operation.span.called, false, index));
        events.push((operation.span.answered, true, index));
    }
    events.sort_unstable();
    let mut under_way: BTreeSet<usize> = BTreeSet::new();
    let mut beliefs: BTreeSet<Belief> = BTreeSet::from([(ZEROS, BTreeSet::new())]);
    for (_, is_answer, index) in events {
        if !is_answer {
            under_way.insert(index);
            continue;
        }
        // Everything that may have taken effect by now; then only what agrees that this one did.
        let mut grown = beliefs.clone();
        let mut fresh: Vec<Belief> = beliefs.into_iter().collect();
        while let Some((stamp, done)) = fresh.pop() {
            for &other in under_way.difference(&done) {
                let next = match operations[other].action {
                    Action::Write(written) => written,
                    Action::Read(found) if found == stamp => stamp,
                    Action::Read(_) => continue,
                };
                let mut done = done.clone();
                done.insert(other);
                if grown.insert((next, done.clone())) {
                    fresh.push((next, done));
                }
            }
        }
        under_way.remove(&index);
        beliefs = grown
            .into_iter()
            .filter_map(|(stamp, mut done)| done.remove(&index).then_some((stamp, done)))
            .collect();
        if beliefs.is_empty() {
            return Err(format!("no order explains {:?}", operations[index]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Span;
    use fastrand::Rng;

    /// A random history of a few requests; half of them come from a real register.
    fn random(rng: &mut Rng) -> Vec<Operation> {
        let count = rng.usize(2..9);
        let mut moments: Vec<u64> = (1..=count as u64 * 2).collect();
        let is_real = rng.bool();
        if rng.bool() {
            rng.shuffle(&mut moments);
        } else {
            // Mostly one after the other.
            for index in 1..moments.len() {
                if rng.u8(..3) == 0 {
                    moments.swap(index - 1, index);
                }
            }
        }
        let mut spans: Vec<(Span, u64)> = moments
            .chunks_exact(2)
            .map(|pair| {
                let (called, answered) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                (Span { called, answered }, rng.u64(called..answered))
            })
            .collect();
        spans.sort_by_key(|(_, effect)| *effect);
        let (mut held, mut next) = (ZEROS, 0);
        spans
            .into_iter()
            .map(|(span, _)| {
                let action = if rng.bool() {
                    next += 1;
                    held = next;
                    Action::Write(next)
                } else if is_real {
                    Action::Read(held)
                } else {
                    Action::Read(rng.u64(..=next + 1))
                };
                Operation { span, action }
            })
            .collect()
    }

    #[test]
    fn both_checks_agree_on_random_histories() {
        let mut rng = Rng::with_seed(1);
        let mut fine = 0;
        for _ in 0..100_000 {
            let history = random(&mut rng);
            let (zones, search) = (zones(&history), search(&history));
            assert_eq!(
                zones.is_ok(),
                search.is_ok(),
                "{history:#?} {zones:?} {search:?}"
            );
            fine += u32::from(zones.is_ok());
        }
        assert!((20_000..90_000).contains(&fine), "{fine}");
    }

    #[test]
    fn zeros_of_different_writes_are_told_apart_by_time() {
        let span = |called, answered| Span { called, answered };
        let of = |span, action| Operation { span, action };
        let mut history = vec![
            of(span(1, 2), Action::Write(5)),
            of(span(3, 6), Action::Write(ZEROS)),
            of(span(4, 5), Action::Read(5)),
            of(span(7, 8), Action::Read(ZEROS)),
        ];
        assert_eq!(check(&history), Ok(()));
        history.push(of(span(9, 10), Action::Read(5)));
        assert!(check(&history).is_err());
    }
}
