//! What the guest measured: by job and target, one figure for each turn.

use anyhow::{Result, bail};

/// The target that is this project's own.
pub(super) const OURS: &str = "ublkctl";
/// What an instruction takes on the guest's clock: `-icount shift=1`.
const NS_PER_INSTRUCTION: f64 = 2.0;

/// One job on one target, in one turn.
#[derive(Clone, Debug, serde::Serialize)]
struct Turn {
    target: String,
    job: String,
    requests_per_second: f64,
    /// Time of the target's daemon on a processor, per request.
    daemon_ns_per_request: Option<f64>,
}

/// All turns, in their order.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct Results(Vec<Turn>);

impl Results {
    /// Reads the lines `@bench TARGET JOB TERSE` and `@spent TARGET JOB NANOSECONDS TERSE`, where TERSE is fio's own format 3.
    pub(super) fn read(output: &str) -> Result<Self> {
        let mut results = Self::default();
        for line in output.lines() {
            if let Some(rest) = line.strip_prefix("@bench ") {
                let mut words = rest.splitn(3, ' ');
                let (Some(target), Some(job), Some(terse)) =
                    (words.next(), words.next(), words.next())
                else {
                    bail!("not a result: {line}");
                };
                results.0.push(Turn {
                    target: target.to_owned(),
                    job: job.to_owned(),
                    requests_per_second: Terse::read(terse)?.per_second,
                    daemon_ns_per_request: None,
                });
            } else if let Some(rest) = line.strip_prefix("@spent ") {
                let mut words = rest.splitn(4, ' ').skip(2);
                let (Some(ns), Some(terse), Some(turn)) =
                    (words.next(), words.next(), results.0.last_mut())
                else {
                    bail!("not a result: {line}");
                };
                let ns: f64 = ns.parse()?;
                turn.daemon_ns_per_request = Some(ns / Terse::read(terse)?.requests);
            }
        }
        if results.0.is_empty() {
            bail!("the guest printed no results:\n{output}");
        }
        Ok(results)
    }

    /// Every single measurement, for whoever waits at the terminal.
    pub(super) fn show_turns(&self) {
        for job in self.jobs() {
            for target in self.targets() {
                let speeds = self.speeds(&target, &job);
                if !speeds.is_empty() {
                    eprintln!("x: {job}, {target}: {speeds:?}");
                }
            }
        }
    }

    /// Each target once, in the order of its first turn.
    pub(super) fn targets(&self) -> Vec<String> {
        each_once(self.0.iter().map(|turn| &turn.target))
    }

    /// Each job once, in the order of its first turn.
    pub(super) fn jobs(&self) -> Vec<String> {
        each_once(self.0.iter().map(|turn| &turn.job))
    }

    fn turns(&self, target: &str, job: &str) -> impl Iterator<Item = &Turn> {
        (self.0.iter()).filter(move |turn| turn.target == target && turn.job == job)
    }

    fn speeds(&self, target: &str, job: &str) -> Vec<f64> {
        self.turns(target, job)
            .map(|turn| turn.requests_per_second)
            .collect()
    }

    /// Requests per second: the median of the turns.
    pub(super) fn speed(&self, target: &str, job: &str) -> Option<f64> {
        median(&self.speeds(target, job))
    }

    /// Whether a daemon serves the target.
    pub(super) fn has_spent(&self, target: &str) -> bool {
        (self.0.iter()).any(|turn| turn.target == target && turn.daemon_ns_per_request.is_some())
    }

    /// Instructions of the target's daemon per request, in the kernel and in itself.
    pub(super) fn instructions(&self, target: &str, job: &str) -> Option<f64> {
        let spent: Vec<_> = self
            .turns(target, job)
            .filter_map(|turn| turn.daemon_ns_per_request)
            .collect();
        Some(median(&spent)? / NS_PER_INSTRUCTION)
    }

    /// How far apart the turns of the same target and job are at most, as a share of the lowest.
    pub(super) fn spread(&self) -> f64 {
        let mut widest = 0.0_f64;
        for job in self.jobs() {
            for target in self.targets() {
                widest = widest.max(spread(&self.speeds(&target, &job)));
            }
        }
        widest
    }
}

fn each_once<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        if !seen.contains(name) {
            seen.push(name.clone());
        }
    }
    seen
}

/// fio(1), terse output: 4 is the error; 7 the reads per second and 48 the writes; 5 the KiB read and 46 those written, 6
/// and 47 KiB per second.
struct Terse {
    per_second: f64,
    requests: f64,
}

impl Terse {
    fn read(terse: &str) -> Result<Self> {
        let fields: Vec<_> = terse.split(';').collect();
        let number = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<f64>().ok())
        };
        let (Some(error), Some(reads), Some(writes)) = (number(4), number(7), number(48)) else {
            bail!("not a result of fio: {terse}");
        };
        if error != 0.0 {
            bail!("fio failed: {terse}");
        }
        // 8 and 49: how long the job read and wrote, in milliseconds.
        let seconds = (number(8).unwrap_or(0.0) + number(49).unwrap_or(0.0)) / 1000.0;
        let per_second = reads + writes;
        Ok(Self {
            per_second,
            requests: (per_second * seconds).max(1.0),
        })
    }
}

/// One turn in which the scheduler placed a thread badly does not move it.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(upper, sorted[middle - 1])
    })
}

fn spread(values: &[f64]) -> f64 {
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(0.0, f64::max);
    if lowest > 0.0 && lowest.is_finite() {
        highest / lowest - 1.0
    } else {
        0.0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The guest's lines for these turns.
    pub(in super::super) fn output(turns: &[(&str, &str, u32)]) -> String {
        let mut text = String::from("noise\n");
        for (target, job, reads) in turns {
            let mut fields = vec!["0".to_owned(); 130];
            fields[7] = reads.to_string();
            fields[8] = "1000".to_owned();
            let terse = fields.join(";");
            text +=
                &format!("@bench {target} {job} {terse}\n@spent {target} {job} 400000 {terse}\n");
        }
        text
    }

    #[test]
    fn time_on_the_processor_becomes_instructions_per_request() {
        let results = Results::read(&output(&[("ublkctl", "j", 100)])).unwrap();
        assert_eq!(results.instructions("ublkctl", "j"), Some(2000.0));
        assert_eq!(results.speed("ublkctl", "j"), Some(100.0));
    }

    #[test]
    fn a_failed_job_is_no_result() {
        let failed = output(&[("ublkctl", "j", 100)]).replace("0;0;0;0;0;", "0;0;0;0;5;");
        assert!(Results::read(&failed).is_err());
    }
}
