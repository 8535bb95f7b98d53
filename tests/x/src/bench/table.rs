//! The results as tables in Markdown, and their place in docs/performance.md.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::results::{OURS, Results, median};
use crate::figures;

/// The peers whose ratio to us is shown beside the speeds.
const COMPARED: [&str; 2] = ["loop-z", "dm-thin"];

/// What the issue of speed asks for: a job of ours, held against another figure.
struct Goal {
    what: &'static str,
    job: &'static str,
    peer: (&'static str, &'static str),
    at_least: f64,
}

/// Ours against a peer in the same job.
const fn against(what: &'static str, job: &'static str, peer: &'static str, at_least: f64) -> Goal {
    Goal {
        what,
        job,
        peer: (peer, job),
        at_least,
    }
}

/// Ours in one job against ours in another.
const fn within(what: &'static str, job: &'static str, other: &'static str, at_least: f64) -> Goal {
    Goal {
        what,
        job,
        peer: (OURS, other),
        at_least,
    }
}

const GOALS: [Goal; 22] = [
    against("4k random read, depth 32", "randread-4k", "loop-z", 0.97),
    against("4k random read, depth 32", "randread-4k", "dm-thin", 1.0),
    against(
        "4k random overwrite, depth 32",
        "randwrite-4k-overwrite",
        "loop-z",
        0.97,
    ),
    against(
        "4k random overwrite, depth 32",
        "randwrite-4k-overwrite",
        "dm-thin",
        1.0,
    ),
    against("4k read, depth 1", "randread-4k-depth1", "loop-z", 0.97),
    against("4k read, depth 1", "randread-4k-depth1", "dm-thin", 1.0),
    against(
        "4k overwrite, depth 1",
        "randwrite-4k-overwrite-depth1",
        "loop-z",
        0.97,
    ),
    against(
        "4k overwrite, depth 1",
        "randwrite-4k-overwrite-depth1",
        "dm-thin",
        1.0,
    ),
    against("256k read", "read-256k", "loop-z", 0.97),
    against("256k read", "read-256k", "dm-thin", 1.0),
    against("256k overwrite", "write-256k-overwrite", "loop-z", 0.97),
    against("256k overwrite", "write-256k-overwrite", "dm-thin", 1.0),
    against("256k first fill", "write-256k-fill", "loop-z", 0.9),
    against("256k first fill", "write-256k-fill", "dm-thin", 1.0),
    within(
        "4k random first fill, against overwrite",
        "randwrite-4k-fill",
        "randwrite-4k-overwrite",
        0.85,
    ),
    within(
        "4k random write after a snapshot, against overwrite",
        "randwrite-4k-after-snapshot",
        "randwrite-4k-overwrite",
        0.85,
    ),
    against(
        "4k random write after a snapshot",
        "randwrite-4k-after-snapshot",
        "dm-thin",
        1.5,
    ),
    within(
        "4k random read under 1,000 snapshots, against none",
        "randread-4k-under-snapshots",
        "randread-4k",
        0.98,
    ),
    within(
        "4k random read on a clone 100 deep, against none",
        "randread-4k-deep-clone",
        "randread-4k",
        0.98,
    ),
    against(
        "4k overwrite + fdatasync, depth 1",
        "randwrite-4k-fdatasync",
        "loop-z",
        1.0,
    ),
    against(
        "4k overwrite + fdatasync, 8 jobs",
        "randwrite-4k-fdatasync-8jobs",
        "loop-z",
        1.0,
    ),
    against(
        "4k overwrite + fdatasync, depth 1",
        "randwrite-4k-fdatasync",
        "dm-thin",
        1.0,
    ),
];

/// Requests per second of every target, and ours as a share of those that matter most.
pub(super) fn speeds(results: &Results) -> String {
    let targets = results.targets();
    let compared: Vec<_> = COMPARED
        .into_iter()
        .filter(|peer| targets.iter().any(|target| target == peer))
        .collect();
    let mut text = String::from("| job, requests per second |");
    for target in &targets {
        text += &format!(" {target} |");
    }
    for peer in &compared {
        text += &format!(" {OURS} : {peer} |");
    }
    text += "\n|---|";
    text += &"---:|".repeat(targets.len() + compared.len());
    text.push('\n');
    for job in results.jobs() {
        text += &format!("| `{job}` |");
        for target in &targets {
            text += &cell(results.speed(target, &job), |value| format!("{value:.0}"));
        }
        for peer in &compared {
            let ratio = ratio(results.speed(OURS, &job), results.speed(peer, &job));
            text += &cell(ratio, |value| format!("{value:.2}"));
        }
        text.push('\n');
    }
    text
}

/// What was aimed at, and what came out.
pub(super) fn goals(results: &Results) -> String {
    let mut text =
        String::from("| goal | against | at least | measured | |\n|---|---|---:|---:|---|\n");
    for goal in &GOALS {
        let (peer, job) = goal.peer;
        let Some(ratio) = ratio(results.speed(OURS, goal.job), results.speed(peer, job)) else {
            continue;
        };
        let shown = if peer == OURS { job } else { peer };
        let verdict = if ratio >= goal.at_least {
            "reached"
        } else {
            "missed"
        };
        text += &format!(
            "| {} | {shown} | {:.2} | {ratio:.2} | {verdict} |\n",
            goal.what, goal.at_least
        );
    }
    text
}

/// Ours at an earlier commit and now: requests per second, or the daemon's instructions for each.
pub(super) fn since(
    commit: &str,
    before: &Results,
    after: &Results,
    is_instructions: bool,
) -> String {
    let unit = if is_instructions {
        "instructions of the daemon per request"
    } else {
        "requests per second"
    };
    let mut text =
        format!("| job, {unit} | {commit} | now | now : {commit} |\n|---|---:|---:|---:|\n");
    for job in after.jobs() {
        let figure = |results: &Results| {
            if is_instructions {
                results.instructions(OURS, &job)
            } else {
                results.speed(OURS, &job)
            }
        };
        let (then, now) = (figure(before), figure(after));
        text += &format!("| `{job}` |");
        text += &cell(then, |value| format!("{value:.0}"));
        text += &cell(now, |value| format!("{value:.0}"));
        text += &cell(ratio(now, then), |value| format!("{value:.3}"));
        text.push('\n');
    }
    text
}

/// Processor time of the servers per request: with one processor and a clock that counts instructions, instructions.
pub(super) fn instructions(results: &Results) -> String {
    let peers: Vec<_> = results
        .targets()
        .into_iter()
        .filter(|target| results.has_spent(target))
        .collect();
    let mut text = String::from("| job, instructions of the daemon per request |");
    for peer in &peers {
        text += &format!(" {peer} |");
    }
    text += &format!(" {OURS} : loop-z |\n|---|");
    text += &"---:|".repeat(peers.len() + 1);
    text.push('\n');
    for job in results.jobs() {
        text += &format!("| `{job}` |");
        for peer in &peers {
            text += &cell(results.instructions(peer, &job), |value| {
                format!("{value:.0}")
            });
        }
        let ratio = ratio(
            results.instructions(OURS, &job),
            results.instructions("loop-z", &job),
        );
        text += &cell(ratio, |value| format!("{value:.2}"));
        text.push('\n');
    }
    text
}

fn ratio(ours: Option<f64>, peers: Option<f64>) -> Option<f64> {
    Some(ours? / peers?)
}

fn cell(value: Option<f64>, show: impl FnOnce(f64) -> String) -> String {
    value.map_or_else(|| " |".to_owned(), |value| format!(" {} |", show(value)))
}

/// The lines `@snapshot GIB-MAPPED SNAPSHOTS-BEFORE MICROSECONDS...` as a table.
pub(super) fn snapshots(output: &str, kernel: &str) -> Result<String> {
    let mut text = String::from(
        "| mapped | snapshots before | `ublkctl snapshot`, median of 5 |\n|---:|---:|---:|\n",
    );
    let mut rows = 0;
    for line in output
        .lines()
        .filter_map(|line| line.strip_prefix("@snapshot "))
    {
        let words: Vec<_> = line.split_whitespace().collect();
        let [mapped, before, times @ ..] = words.as_slice() else {
            bail!("not a result: {line}");
        };
        let times: Vec<f64> = times
            .iter()
            .map(|time| time.parse())
            .collect::<Result<_, _>>()
            .context("not a time")?;
        let median = median(&times).with_context(|| format!("not a result: {line}"))?;
        eprintln!("x: {mapped} GiB, {before} snapshots: {times:?} us");
        writeln!(
            text,
            "| {mapped} GiB | {before} | {:.1} ms |",
            median / 1000.0
        )?;
        rows += 1;
    }
    if rows == 0 {
        bail!("the guest printed no results:\n{output}");
    }
    writeln!(
        text,
        "\nMeasured with `cargo x bench --snapshots`: the whole command, on a volume that is attached and written all over. \
         The pool lies on zram. Linux {kernel}, qemu with `-smp 2 -accel tcg,thread=single -icount shift=1,sleep=off`."
    )?;
    Ok(text)
}

/// Puts the text of a part into the page.
pub(super) fn write(page: &Path, part: &str, text: &str) -> Result<()> {
    figures::put(page, &format!("cargo x bench, {part}"), text)
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::output;
    use super::*;

    #[test]
    fn the_tables_show_medians_and_ratios() {
        let results = Results::read(&output(&[
            ("loop-z", "randread-4k", 100),
            ("loop-z", "randread-4k", 200),
            ("ublkctl", "randread-4k", 300),
        ]))
        .unwrap();
        let text = speeds(&results);
        assert!(
            text.contains("| `randread-4k` | 150 | 300 | 2.00 |"),
            "{text}"
        );
        let text = goals(&results);
        assert!(
            text.contains("| loop-z | 0.97 | 2.00 | reached |"),
            "{text}"
        );
    }
}
