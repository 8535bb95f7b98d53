//! A chart for each group of jobs, as SVG: a bar for each target.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::results::{OURS, Results};

/// Jobs that are shown side by side, because their speeds are of the same order.
const GROUPS: [(&str, &str, &[&str]); 4] = [
    (
        "random-4k",
        "4 KiB random, depth 32",
        &[
            "randread-4k",
            "randwrite-4k-overwrite",
            "randwrite-4k-fill",
            "randwrite-4k-after-snapshot",
            "randread-4k-under-snapshots",
        ],
    ),
    (
        "latency-4k",
        "4 KiB, one at a time",
        &["randread-4k-depth1", "randwrite-4k-overwrite-depth1"],
    ),
    (
        "sequential-256k",
        "256 KiB sequential, depth 8",
        &["read-256k", "write-256k-overwrite", "write-256k-fill"],
    ),
    (
        "fdatasync",
        "4 KiB, each with fdatasync",
        &["randwrite-4k-fdatasync", "randwrite-4k-fdatasync-8jobs"],
    ),
];

const WIDTH: u32 = 960;
const BAR: u32 = 18;
const MARGIN: u32 = 60;

/// Writes the charts into a folder; the names of those that have anything to show.
pub(super) fn write(results: &Results, folder: &Path) -> Result<Vec<(&'static str, &'static str)>> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut written = Vec::new();
    for (name, title, jobs) in GROUPS {
        let bars = bars(results, jobs);
        if bars.is_empty() {
            continue;
        }
        let path = folder.join(format!("{name}.svg"));
        draw(&path, title, &bars).with_context(|| format!("cannot draw {}", path.display()))?;
        written.push((name, title));
    }
    Ok(written)
}

struct Bar {
    label: String,
    speed: f64,
    is_ours: bool,
}

/// The bars from top to bottom.
fn bars(results: &Results, jobs: &[&str]) -> Vec<Bar> {
    let mut bars = Vec::new();
    for job in jobs {
        for target in results.targets() {
            if let Some(speed) = results.speed(&target, job) {
                bars.push(Bar {
                    label: format!("{job}, {target}"),
                    speed,
                    is_ours: target == OURS,
                });
            }
        }
    }
    bars
}

fn draw(path: &Path, title: &str, bars: &[Bar]) -> Result<()> {
    let count = u32::try_from(bars.len())?;
    let root = SVGBackend::new(path, (WIDTH, count * BAR + 2 * MARGIN)).into_drawing_area();
    root.fill(&WHITE)?;
    let fastest = bars.iter().map(|bar| bar.speed).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(330)
        .build_cartesian_2d(0.0..fastest * 1.1, (0..count).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("requests per second, on a clock that counts instructions")
        .y_labels(bars.len())
        .y_label_formatter(&|place| label(bars, count, place))
        .draw()?;
    chart.draw_series(bars.iter().zip(0..).map(|(bar, index)| {
        let row = count - 1 - index;
        let color = if bar.is_ours { &RED } else { &BLUE };
        let mut rectangle = Rectangle::new(
            [
                (0.0, SegmentValue::Exact(row)),
                (bar.speed, SegmentValue::Exact(row + 1)),
            ],
            color.mix(0.6).filled(),
        );
        rectangle.set_margin(3, 3, 0, 0);
        rectangle
    }))?;
    root.present()?;
    Ok(())
}

/// The first bar is at the top, and so has the highest place.
fn label(bars: &[Bar], count: u32, place: &SegmentValue<u32>) -> String {
    match place {
        SegmentValue::CenterOf(row) if *row < count => bars
            .get((count - 1 - row) as usize)
            .map_or_else(String::new, |bar| bar.label.clone()),
        _ => String::new(),
    }
}
