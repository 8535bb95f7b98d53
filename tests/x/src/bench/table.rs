//! The results as a table, and its place in docs/performance.md.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Requests per second: by job, by target, one for each time it was measured.
#[derive(Debug, Default)]
pub(super) struct Results(BTreeMap<String, BTreeMap<String, Vec<f64>>>);

impl Results {
    /// Reads the lines `@bench TARGET JOB TERSE`, where TERSE is fio's own format 3.
    pub(super) fn read(output: &str) -> Result<Self> {
        let mut results = Self::default();
        for line in output
            .lines()
            .filter_map(|line| line.strip_prefix("@bench "))
        {
            let mut words = line.splitn(3, ' ');
            let (Some(target), Some(job), Some(terse)) = (words.next(), words.next(), words.next())
            else {
                bail!("not a result: {line}");
            };
            let fields: Vec<_> = terse.split(';').collect();
            let number = |index: usize| {
                fields
                    .get(index)
                    .and_then(|field| field.parse::<f64>().ok())
            };
            // fio(1), terse output: 4 is the error, 7 the reads per second, 48 the writes.
            let (Some(error), Some(reads), Some(writes)) = (number(4), number(7), number(48))
            else {
                bail!("not a result of fio: {line}");
            };
            if error != 0.0 {
                bail!("fio failed: {line}");
            }
            let by_target = results.0.entry(job.to_owned()).or_default();
            by_target
                .entry(target.to_owned())
                .or_default()
                .push(reads + writes);
        }
        if results.0.is_empty() {
            bail!("the guest printed no results:\n{output}");
        }
        Ok(results)
    }

    /// Every single measurement, for whoever waits at the terminal.
    pub(super) fn show_turns(&self) {
        for (job, by_target) in &self.0 {
            for (target, values) in by_target {
                eprintln!("x: {job}, {target}: {values:?}");
            }
        }
    }

    /// The table and how it came about, in Markdown.
    pub(super) fn text(&self, kernel: &str, targets: &[String]) -> String {
        let mut columns: Vec<&String> = Vec::new();
        for target in targets {
            if !columns.contains(&target) {
                columns.push(target);
            }
        }
        let mut text = String::from("| job, requests per second |");
        for column in &columns {
            text += &format!(" {column} |");
        }
        text += " ublkctl : rublk |\n|---|";
        text += &"---:|".repeat(columns.len() + 1);
        text.push('\n');
        for (job, by_target) in &self.0 {
            let middle = |target: &str| median(by_target.get(target)?);
            text += &format!("| `{job}` |");
            for column in &columns {
                text += &middle(column)
                    .map_or_else(|| " |".to_owned(), |value| format!(" {value:.0} |"));
            }
            match (middle("ublkctl"), middle("rublk")) {
                (Some(ours), Some(peers)) => text += &format!(" {:.2} |\n", ours / peers),
                _ => text += " |\n",
            }
        }
        let spread = self
            .0
            .values()
            .flat_map(BTreeMap::values)
            .map(|values| spread(values))
            .fold(0.0, f64::max);
        writeln!(
            text,
            "\nMeasured with `cargo x bench`: `rublk add loop` of rublk 0.2.15 and a volume of one pool, both on the same \
             RAM disk (brd), 2 queues of depth 128, each target in the order {}. The median is shown; the same \
             target differed by at most {:.1} % between its turns. Linux {kernel}, qemu with \
             `-smp 2 -accel tcg,thread=single -icount shift=1,sleep=off`: the guest's clock counts instructions, so \
             these are not the speeds of real hardware, and only the ratios mean something.",
            targets.join(", "),
            spread * 100.0
        )
        .unwrap_or_default();
        text
    }
}

/// One turn in which the scheduler placed a thread badly does not move it.
fn median(values: &[f64]) -> Option<f64> {
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

/// How far apart the lowest and the highest are, as a share of the lowest.
fn spread(values: &[f64]) -> f64 {
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(0.0, f64::max);
    if lowest > 0.0 {
        highest / lowest - 1.0
    } else {
        0.0
    }
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

/// Replaces what stands between the markers of this part; the rest of the page is written by people.
pub(super) fn write(page: &Path, part: &str, text: &str) -> Result<()> {
    let begin = format!("<!-- cargo x bench, {part}: begin -->");
    let end = format!("<!-- cargo x bench, {part}: end -->");
    let mut old = fs::read_to_string(page).unwrap_or_else(|_| "# Performance\n".to_owned());
    if !old.contains(&begin) {
        old += &format!("\n{begin}\n{end}\n");
    }
    let parts = old
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let Some((before, after)) = parts else {
        bail!("{}: the line {end} is missing", page.display());
    };
    if let Some(folder) = page.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let new = format!("{before}{begin}\n{text}{end}{after}");
    fs::write(page, new).with_context(|| format!("cannot write {}", page.display()))
}

#[cfg(test)]
mod tests {
    use super::Results;

    #[test]
    fn the_table_shows_medians_and_the_ratio() {
        let terse = |reads: &str| {
            let mut fields = vec!["0"; 130];
            fields[7] = reads;
            fields.join(";")
        };
        let output = format!(
            "noise\n@bench rublk j {}\n@bench rublk j {}\n@bench ublkctl j {}\n",
            terse("100"),
            terse("200"),
            terse("300")
        );
        let results = Results::read(&output).unwrap();
        let text = results.text("7.3", &["rublk".to_owned(), "ublkctl".to_owned()]);
        assert!(text.contains("| `j` | 150 | 300 | 2.00 |"), "{text}");
    }
}
