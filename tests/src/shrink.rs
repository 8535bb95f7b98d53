//! The shortest history that still fails: delta debugging, `ddmin` of Zeller and Hildebrandt, "Simplifying and Isolating
//! Failure-Inducing Input" (IEEE Transactions on Software Engineering 28(2), 2002).

/// Leaves steps of `0..count` out as long as the rest still `fails`, which all of them do; at most `runs_max` tries.
/// Gives the steps that stay: without any single one of them nothing fails, unless the tries ran out.
pub fn shortest(count: u32, runs_max: u32, mut fails: impl FnMut(&[u32]) -> bool) -> Vec<u32> {
    let mut kept: Vec<u32> = (0..count).collect();
    let mut parts = 2;
    let mut runs = 0;
    while kept.len() > 1 {
        let length = kept.len().div_ceil(parts);
        let mut shorter = None;
        for start in (0..kept.len()).step_by(length) {
            if runs == runs_max {
                return kept;
            }
            runs += 1;
            let mut rest = kept.clone();
            rest.drain(start..(start + length).min(kept.len()));
            if fails(&rest) {
                shorter = Some(rest);
                break;
            }
        }
        match shorter {
            Some(rest) => {
                kept = rest;
                parts = (parts - 1).max(2);
            }
            None if length == 1 => break,
            None => parts = (parts * 2).min(kept.len()),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::shortest;

    #[test]
    fn only_the_steps_that_matter_stay() {
        let matters = [17, 180, 181, 499];
        let kept = shortest(500, 10_000, |kept| {
            matters.iter().all(|step| kept.contains(step))
        });
        assert_eq!(kept, matters);
    }

    #[test]
    fn it_ends_when_the_tries_run_out() {
        let mut runs = 0;
        let kept = shortest(500, 5, |kept| {
            runs += 1;
            kept.contains(&3)
        });
        assert!(kept.contains(&3));
        assert_eq!(runs, 5);
    }
}
