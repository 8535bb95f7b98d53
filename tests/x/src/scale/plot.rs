//! Two plots as SVG: what a snapshot takes, and how fast the volume is read, against the number of its snapshots.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

const SIZE: (u32, u32) = (800, 400);

/// What was found with so many snapshots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    snapshots: f64,
    /// The median of the last hundred, in microseconds.
    microseconds: f64,
    reads_per_second: f64,
}

/// Reads lines `SNAPSHOTS NANOSECONDS READS-PER-SECOND`.
pub(super) fn read(text: &str) -> Result<Vec<Point>> {
    text.lines()
        .map(|line| {
            let words: Vec<f64> = line
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| format!("not a point: {line}"))?;
            let [snapshots, nanoseconds, reads_per_second] = words.as_slice() else {
                anyhow::bail!("not a point: {line}");
            };
            Ok(Point {
                snapshots: *snapshots,
                microseconds: nanoseconds / 1000.0,
                reads_per_second: *reads_per_second,
            })
        })
        .collect()
}

/// Draws both into a folder; their names and titles.
pub(super) fn write(points: &[Point], folder: &Path) -> Result<[(&'static str, &'static str); 2]> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let plots = [
        (
            "snapshot-time",
            "Time of a snapshot, against the number of snapshots",
        ),
        (
            "read-speed",
            "4k random reads, against the number of snapshots",
        ),
    ];
    let [times, speeds] = plots;
    draw(folder, times, "microseconds", points, |point| {
        point.microseconds
    })?;
    draw(folder, speeds, "reads per second", points, |point| {
        point.reads_per_second
    })?;
    Ok(plots)
}

fn draw(
    folder: &Path,
    (name, title): (&str, &str),
    unit: &str,
    points: &[Point],
    value: impl Fn(&Point) -> f64,
) -> Result<()> {
    let path = folder.join(format!("{name}.svg"));
    let drawn: Vec<(f64, f64)> = points
        .iter()
        .map(|point| (point.snapshots, value(point)))
        .collect();
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(1.0, f64::max);
    let right = most(&mut drawn.iter().map(|point| point.0)).max(10.0);
    let top = most(&mut drawn.iter().map(|point| point.1)) * 1.25;
    let root = SVGBackend::new(&path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(90)
        .build_cartesian_2d((1.0..right).log_scale(), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("snapshots of the volume")
        .y_desc(unit)
        .x_label_formatter(&|value| score::number(*value))
        .y_label_formatter(&|value| score::number(*value))
        .draw()?;
    let dots = drawn
        .iter()
        .map(|point| Circle::new(*point, 4, RED.filled()));
    chart.draw_series(dots)?;
    chart.draw_series([PathElement::new(drawn.clone(), RED.stroke_width(2))])?;
    root.present()
        .with_context(|| format!("cannot draw {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_read_and_drawn() {
        let points = read("1 1500 300000\n10 2000 290000\n").unwrap();
        assert_eq!(points[0].microseconds, 1.5);
        assert!(read("1 2\n").is_err() && read("a b c\n").is_err());
        let folder = std::env::temp_dir().join(format!("x-plot-{}", std::process::id()));
        write(&points, &folder).unwrap();
        let drawn = std::fs::read_to_string(folder.join("read-speed.svg")).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(
            drawn.contains("300,000") && drawn.contains("circle"),
            "{drawn}"
        );
    }
}
