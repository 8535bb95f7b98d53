//! Who was cloned from what: volumes, below them their snapshots, below a snapshot its clones.
//!
//! What a pool says of its volumes may be damaged, so nothing here recurses: neither a chain of a million clones nor a
//! ring of origins does harm.

use crate::output::json_text;
use blockfork::error::Result;
use blockfork::name::{Name, VolumePath};
use blockfork::pool::OutlineEntry;
use blockfork::units::{Timestamp, VolumeId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A snapshot so deep in a drawing has its clones drawn as trees of their own, below the others. Odd, as a snapshot's
/// depth is.
const DRAWN_DEPTH_MAX: usize = 65;

/// A pool's volumes and snapshots, and what hangs on each.
#[derive(Debug)]
pub(crate) struct Lineage<'a> {
    pool: &'a Name,
    entries: &'a [OutlineEntry],
    /// By entry: the snapshots of a volume by age, the clones of a snapshot by name.
    below: Vec<Vec<usize>>,
    /// By entry: a snapshot's volume; what a volume was cloned from, if that is there.
    above: Vec<Option<usize>>,
    roots: Vec<usize>,
}

/// A volume as JSON has it, but for its snapshots.
#[derive(Debug, Serialize)]
struct ShownVolume {
    name: String,
    id: VolumeId,
    created: Timestamp,
    origin: Option<String>,
}

/// A snapshot as JSON has it, but for its clones.
#[derive(Debug, Serialize)]
struct ShownSnapshot<'a> {
    name: String,
    id: VolumeId,
    created: Timestamp,
    holds: &'a [Name],
}

impl<'a> Lineage<'a> {
    /// The lineage of everything in `entries`, which come as in a list: volumes by name, each with its snapshots by age
    /// behind it.
    pub(crate) fn new(pool: &'a Name, entries: &'a [OutlineEntry]) -> Self {
        let places: BTreeMap<VolumeId, usize> =
            entries.iter().map(|entry| entry.id).zip(0..).collect();
        let mut lineage = Self {
            pool,
            entries,
            below: vec![Vec::new(); entries.len()],
            above: vec![None; entries.len()],
            roots: Vec::new(),
        };
        let mut volume = None;
        for (place, entry) in entries.iter().enumerate() {
            let above = if entry.path.snapshot.is_some() {
                volume
            } else {
                volume = Some(place);
                // A volume that was rolled back has a snapshot of its own as origin: nobody is its own ancestor.
                let origin = entry.origin.and_then(|origin| places.get(&origin));
                let is_others = |place: &&usize| {
                    let origin = entries.get(**place).map(|origin| &origin.path);
                    origin.is_some_and(|path| {
                        path.snapshot.is_some() && path.volume != entry.path.volume
                    })
                };
                origin.filter(is_others).copied()
            };
            match above.and_then(|above| lineage.below.get_mut(above)) {
                Some(below) => below.push(place),
                None => lineage.roots.push(place),
            }
            if let Some(kept) = lineage.above.get_mut(place) {
                *kept = above;
            }
        }
        lineage.cut_rings();
        lineage
    }

    /// Where origins lead in a ring, no root leads to it: one volume of each ring becomes a root.
    fn cut_rings(&mut self) {
        let mut is_reached = vec![false; self.entries.len()];
        let mut next: Vec<usize> = self.roots.clone();
        let mut candidates = 0..self.entries.len();
        loop {
            while let Some(place) = next.pop() {
                if let Some(reached) = is_reached.get_mut(place) {
                    *reached = true;
                }
                next.extend(self.below(place));
            }
            let is_left = |place: &usize| is_reached.get(*place) == Some(&false);
            let Some(place) = candidates.find(is_left) else {
                break;
            };
            let root = self.in_ring_above(place);
            let above = self.above(root);
            if let Some(below) = above.and_then(|above| self.below.get_mut(above)) {
                below.retain(|other| *other != root);
            }
            self.roots.push(root);
            next.push(root);
        }
    }

    /// A volume of the ring that the way up from `place` ends in.
    fn in_ring_above(&self, place: usize) -> usize {
        let mut passed = BTreeSet::new();
        let mut at = place;
        loop {
            let is_volume = self
                .entries
                .get(at)
                .is_some_and(|entry| entry.path.snapshot.is_none());
            if is_volume && !passed.insert(at) {
                return at;
            }
            match self.above(at) {
                Some(above) => at = above,
                None => return at,
            }
        }
    }

    fn above(&self, place: usize) -> Option<usize> {
        self.above.get(place).copied().flatten()
    }

    fn below(&self, place: usize) -> &[usize] {
        self.below.get(place).map_or(&[], Vec::as_slice)
    }

    fn name(&self, place: usize) -> String {
        let path = self.entries.get(place).map(|entry| &entry.path);
        path.map_or_else(String::new, |path| format!("{}/{path}", self.pool))
    }

    /// What a drawing or a document begins with: everything, or one volume alone.
    pub(crate) fn roots(&self, only: Option<&Name>) -> Vec<usize> {
        let Some(volume) = only else {
            return self.roots.clone();
        };
        let wanted = VolumePath {
            volume: volume.clone(),
            snapshot: None,
        };
        let places = self.entries.iter().enumerate();
        let found = places.filter(|(_, entry)| entry.path == wanted);
        found.map(|(place, _)| place).collect()
    }

    /// A line for each, with lines to what is below.
    pub(crate) fn draw(&self, roots: &[usize]) -> String {
        let mut out = String::new();
        let mut trees: VecDeque<usize> = roots.iter().copied().collect();
        while let Some(root) = trees.pop_front() {
            // The place, its depth and whether it is the last below its parent.
            let mut next: Vec<(usize, usize, bool)> = vec![(root, 0, true)];
            let mut margin: Vec<&str> = Vec::new();
            while let Some((place, depth, is_last)) = next.pop() {
                if depth == 0 {
                    out.push_str(&self.name(place));
                    if let Some(origin) = self.above(place) {
                        out.extend([" (clone of ", &self.name(origin), ")"]);
                    }
                } else {
                    margin.truncate(depth - 1);
                    out.extend(margin.iter().copied());
                    out.push_str(if is_last { "`- " } else { "|- " });
                    margin.push(if is_last { "   " } else { "|  " });
                    out.push_str(&self.name(place));
                }
                out.push('\n');
                if depth >= DRAWN_DEPTH_MAX {
                    trees.extend(self.below(place));
                    continue;
                }
                let below = self.below(place).iter().rev().enumerate();
                next.extend(below.map(|(index, place)| (*place, depth + 1, index == 0)));
            }
        }
        out
    }

    /// Nested JSON: volumes with `snapshots`, each with its `clones`.
    pub(crate) fn json(&self, roots: &[usize]) -> Result<String> {
        /// What is still to be written.
        enum Part {
            Open { place: usize, is_first: bool },
            Close,
        }
        let open = |places: &[usize], parts: &mut Vec<Part>| {
            let opened = places.iter().enumerate().rev();
            parts.extend(opened.map(|(index, place)| Part::Open {
                place: *place,
                is_first: index == 0,
            }));
        };
        let mut out = String::from("[");
        let mut parts = Vec::new();
        open(roots, &mut parts);
        while let Some(part) = parts.pop() {
            match part {
                Part::Close => out.push_str("]}"),
                Part::Open { place, is_first } => {
                    let Some(entry) = self.entries.get(place) else {
                        continue;
                    };
                    let is_snapshot = entry.path.snapshot.is_some();
                    let (name, id, created) = (self.name(place), entry.id, entry.created);
                    let object = if is_snapshot {
                        json_text(&ShownSnapshot {
                            name,
                            id,
                            created,
                            holds: &entry.holds,
                        })?
                    } else {
                        json_text(&ShownVolume {
                            name,
                            id,
                            created,
                            origin: self.above(place).map(|origin| self.name(origin)),
                        })?
                    };
                    out.push_str(if is_first { "\n" } else { ",\n" });
                    out.push_str(object.strip_suffix('}').unwrap_or(&object));
                    out.push_str(if is_snapshot {
                        ",\"clones\":["
                    } else {
                        ",\"snapshots\":["
                    });
                    parts.push(Part::Close);
                    open(self.below(place), &mut parts);
                }
            }
        }
        out.push_str("]\n");
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Name {
        "p".parse().unwrap()
    }

    fn entry(id: u64, path: &str, origin: u64) -> OutlineEntry {
        OutlineEntry {
            path: path.parse().unwrap(),
            id: VolumeId(id),
            origin: (origin > 0).then_some(VolumeId(origin)),
            created: Timestamp(id),
            holds: Vec::new(),
        }
    }

    fn drawn(entries: &[OutlineEntry], only: Option<&str>) -> String {
        let pool = pool();
        let lineage = Lineage::new(&pool, entries);
        let only: Option<Name> = only.map(|name| name.parse().unwrap());
        lineage.draw(&lineage.roots(only.as_ref()))
    }

    fn nested(entries: &[OutlineEntry]) -> serde_json::Value {
        let pool = pool();
        let lineage = Lineage::new(&pool, entries);
        let text = lineage.json(&lineage.roots(None)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// `v` with `@a` and `@b`; `c` and `d` cloned from `v@a`, `e` from `c@x`; `f` from a snapshot that is gone.
    fn family() -> Vec<OutlineEntry> {
        vec![
            entry(5, "c", 2),
            entry(6, "c@x", 0),
            entry(7, "d", 2),
            entry(8, "e", 6),
            entry(9, "f", 4711),
            entry(1, "v", 0),
            entry(2, "v@a", 0),
            entry(3, "v@b", 0),
        ]
    }

    #[test]
    fn clones_stand_below_their_snapshot() {
        let expected = "\
p/f
p/v
|- p/v@a
|  |- p/c
|  |  `- p/c@x
|  |     `- p/e
|  `- p/d
`- p/v@b
";
        assert_eq!(drawn(&family(), None), expected);
        let expected = "\
p/c (clone of p/v@a)
`- p/c@x
   `- p/e
";
        assert_eq!(drawn(&family(), Some("c")), expected);
        assert_eq!(drawn(&family(), Some("nobody")), "");
        assert_eq!(drawn(&[], None), "");
    }

    #[test]
    fn json_is_nested_as_the_drawing_is() {
        let mut family = family();
        family[6].holds = vec!["backup".parse().unwrap(), "x".parse().unwrap()];
        let roots = nested(&family);
        assert_eq!(roots.as_array().unwrap().len(), 2);
        let lost = &roots[0];
        assert_eq!((&lost["name"], &lost["id"]), (&"p/f".into(), &9.into()));
        assert!(lost["origin"].is_null() && lost["snapshots"] == serde_json::json!([]));
        let snapshots = &roots[1]["snapshots"];
        let first = &snapshots[0];
        assert_eq!(
            (&first["name"], &first["created"]),
            (&"p/v@a".into(), &2.into())
        );
        assert_eq!(first["holds"], serde_json::json!(["backup", "x"]));
        assert_eq!(
            snapshots[1],
            serde_json::json!({"name": "p/v@b", "id": 3, "created": 3, "holds": [], "clones": []})
        );
        let clone = &first["clones"][0];
        assert_eq!(
            (&clone["name"], &clone["origin"]),
            (&"p/c".into(), &"p/v@a".into())
        );
        assert_eq!(clone["snapshots"][0]["clones"][0]["name"], "p/e");
        assert_eq!(first["clones"][1]["name"], "p/d");
        assert_eq!(nested(&[]), serde_json::json!([]));
    }

    #[test]
    fn a_volume_that_was_rolled_back_is_not_its_own_clone() {
        let entries = [entry(1, "v", 2), entry(2, "v@a", 0)];
        assert_eq!(drawn(&entries, None), "p/v\n`- p/v@a\n");
        // An origin that is no snapshot is none.
        let entries = [entry(3, "c", 1), entry(1, "v", 0)];
        assert_eq!(drawn(&entries, None), "p/c\np/v\n");
    }

    #[test]
    fn a_ring_of_origins_is_cut_and_everything_is_drawn_once() {
        let entries = [
            entry(1, "a", 4),
            entry(2, "a@s", 0),
            entry(3, "b", 2),
            entry(4, "b@s", 0),
            entry(5, "c", 4),
        ];
        let text = drawn(&entries, None);
        let expected = "\
p/a (clone of p/b@s)
`- p/a@s
   `- p/b
      `- p/b@s
         `- p/c
";
        assert_eq!(text, expected);
        assert_eq!(nested(&entries).as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_deep_chain_of_clones_is_drawn_in_pieces_and_nested_whole() {
        const CLONES: u64 = 2000;
        let mut entries = Vec::new();
        for number in 0..CLONES {
            entries.push(entry(2 * number + 1, &format!("v{number}"), 2 * number));
            entries.push(entry(2 * number + 2, &format!("v{number}@s"), 0));
        }
        let text = drawn(&entries, None);
        assert_eq!(text.lines().count(), entries.len());
        let widest = text.lines().map(str::len).max().unwrap();
        assert!(widest < 3 * DRAWN_DEPTH_MAX + 20, "{widest}");
        assert!(text.lines().any(|line| line == "p/v33 (clone of p/v32@s)"));
        let pool = pool();
        let lineage = Lineage::new(&pool, &entries);
        let json = lineage.json(&lineage.roots(None)).unwrap();
        assert_eq!(json.matches("\"name\"").count(), entries.len());
        assert!(json.ends_with(&format!("{}\n", "]}".repeat(entries.len()) + "]")));
    }

    #[test]
    fn a_hundred_thousand_snapshots_and_clones_take_a_moment() {
        const COUNT: u64 = 100_000;
        let mut entries = vec![entry(1, "a", 0)];
        entries.extend((0..COUNT).map(|number| entry(2 + number, &format!("a@{number}"), 0)));
        // Half of the clones on one snapshot, the others each on one of its own.
        for number in 0..COUNT {
            let of = if number % 2 == 0 { 2 } else { 2 + number };
            entries.push(entry(2 + COUNT + number, &format!("c{number}"), of));
        }
        let text = drawn(&entries, None);
        assert_eq!(text.lines().count(), entries.len());
    }
}
