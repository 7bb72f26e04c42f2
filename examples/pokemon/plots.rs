//! The plots of the report: accuracy, forgetting, loss.

use std::path::Path;
use std::sync::Once;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::arms::{Arm, Point};
use crate::output;
use crate::summary::Findings;

const REGULAR: &str = "inter";
/// A family of its own: plotters does not find a registered bold style of a family.
const BOLD: &str = "inter semibold";
const INK: RGBColor = RGBColor(31, 41, 55);
const SOFT: RGBColor = RGBColor(107, 114, 128);
const GRID: RGBColor = RGBColor(229, 231, 235);
const SIZE: (u32, u32) = (1600, 900);
/// Height at which the legend stands.
const LEGEND: i32 = 178;

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Writes accuracy.png, and where something was trained forgetting.png and loss.png, into `dir`. Where it was not, plots
/// of these names are those of an earlier run and are removed.
pub fn write(findings: &Findings, dir: &Path) -> Result<()> {
    register_fonts()?;
    let draw = |name: &str, plot: fn(&Findings, &Area<'_>) -> Result<()>| {
        output::replace(&dir.join(name), |path| {
            let area = BitMapBackend::new(path, SIZE).into_drawing_area();
            area.fill(&WHITE).map_err(failed)?;
            plot(findings, &area)?;
            area.present().map_err(failed)
        })
    };
    draw("accuracy.png", accuracy)?;
    if findings.rows().iter().any(|row| row.trained) {
        draw("forgetting.png", forgetting)?;
    } else {
        output::remove(&dir.join("forgetting.png"))?;
    }
    if findings.results.iter().any(|result| result.training.is_some()) {
        draw("loss.png", loss)
    } else {
        output::remove(&dir.join("loss.png"))
    }
}

/// plotters' errors borrow from the drawing area.
fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot cannot be drawn: {error}")
}

/// The fonts are part of the program: not every machine has some.
fn register_fonts() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        let regular = register_font(REGULAR, FontStyle::Normal, include_bytes!("assets/inter-400.ttf"));
        let bold = register_font(BOLD, FontStyle::Normal, include_bytes!("assets/inter-600.ttf"));
        if regular.and(bold).is_err() {
            result = Err(anyhow!("the embedded font is damaged"));
        }
    });
    result
}

fn color(arm: Arm) -> RGBColor {
    match arm {
        Arm::ZeroShot => RGBColor(156, 163, 175),
        Arm::FewShot => RGBColor(100, 116, 139),
        Arm::Full => RGBColor(234, 124, 60),
        Arm::Lora | Arm::Adapter => RGBColor(37, 99, 235),
    }
}

/// A line of text whose letters are centred on `y`; `x` is its left end, middle or right end.
fn text(
    area: &Area<'_>,
    text: &str,
    font: &str,
    size: u32,
    color: RGBColor,
    h: HPos,
    (x, y): (i32, i32),
) -> Result<()> {
    let style = (font, size).into_font().color(&color).pos(Pos::new(h, VPos::Center));
    // What plotters centres has room for descenders; most labels have none.
    area.draw_text(text, &style, (x, y + size as i32 / 7)).map_err(failed)
}

fn width(area: &Area<'_>, text: &str, font: &str, size: u32) -> Result<i32> {
    let style = (font, size).into_text_style(area);
    Ok(area.estimate_text_size(text, &style).map_err(failed)?.0 as i32)
}

fn head(area: &Area<'_>, title: &str, subtitle: &str) -> Result<()> {
    text(area, title, BOLD, 42, INK, HPos::Left, (70, 62))?;
    text(area, subtitle, REGULAR, 26, SOFT, HPos::Left, (70, 114))
}

/// The place of a plot: percent on the vertical axis, a grid line every 20, nothing else.
struct Percent {
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
}

impl Percent {
    const PLACE: Self = Self { left: 150, right: 1540, top: 256, bottom: 810 };

    fn y(&self, share: f64) -> i32 {
        self.bottom - (share * f64::from(self.bottom - self.top)).round() as i32
    }

    /// Middle of the `index`-th of `count` equal columns.
    fn x(&self, index: usize, count: usize) -> i32 {
        let column = f64::from(self.right - self.left) / count.max(1) as f64;
        self.left + (column * (index as f64 + 0.5)).round() as i32
    }

    fn grid(&self, area: &Area<'_>) -> Result<()> {
        for step in 0..=5 {
            let share = f64::from(step) / 5.0;
            let y = self.y(share);
            let style = if step == 0 { SOFT.stroke_width(2) } else { GRID.stroke_width(2) };
            area.draw(&PathElement::new(vec![(self.left, y), (self.right, y)], style)).map_err(failed)?;
            let label = format!("{:.0} %", 100.0 * share);
            text(area, &label, REGULAR, 25, SOFT, HPos::Right, (self.left - 16, y))?;
        }
        Ok(())
    }

    fn bar(&self, area: &Area<'_>, x: i32, half: i32, share: f64, color: &RGBColor) -> Result<()> {
        // A bar of no height would look like a missing one.
        let top = self.y(share).min(self.bottom - 3);
        area.draw(&Rectangle::new([(x - half, top), (x + half, self.bottom)], color.filled())).map_err(failed)
    }
}

fn accuracy(findings: &Findings, area: &Area<'_>) -> Result<()> {
    head(
        area,
        if findings.split_is_known {
            "Types of species that were never fine-tuned on"
        } else {
            "Types of species"
        },
        "Answers that name exactly the right types, with 95 % intervals (Wilson)",
    )?;
    let place = Percent::PLACE;
    place.grid(area)?;
    let rows = findings.rows();
    let mut marked = false;
    for (index, row) in rows.iter().enumerate() {
        let x = place.x(index, rows.len());
        place.bar(area, x, 85, row.exact.mean, &color(row.arm))?;
        let (low, high) = (place.y(row.exact.interval.0), place.y(row.exact.interval.1));
        let stroke = INK.stroke_width(3);
        for line in [[(x, low), (x, high)], [(x - 14, low), (x + 14, low)], [(x - 14, high), (x + 14, high)]]
        {
            area.draw(&PathElement::new(line.to_vec(), stroke)).map_err(failed)?;
        }
        let label = format!("{:.1} %", 100.0 * row.exact.mean);
        // The label would otherwise be crossed by a grid line.
        let half = width(area, &label, BOLD, 32)? / 2 + 8;
        let behind = [(x - half, high - 48), (x + half, high - 14)];
        area.draw(&Rectangle::new(behind, WHITE.filled())).map_err(failed)?;
        text(area, &label, BOLD, 32, INK, HPos::Center, (x, high - 32))?;
        text(area, row.arm.title(), REGULAR, 28, INK, HPos::Center, (x, place.bottom + 38))?;
        if let Some(share) = row.arm.article_share() {
            marked = true;
            diamond(area, (x + 62, place.y(share)))?;
        }
    }
    if marked {
        diamond(area, (place.left + 14, LEGEND))?;
        let note =
            "the original article, on Llama-3.2-1B-Instruct: another base, not to be compared digit by digit";
        text(area, note, REGULAR, 25, SOFT, HPos::Left, (place.left + 36, LEGEND))?;
    }
    Ok(())
}

fn diamond(area: &Area<'_>, (x, y): (i32, i32)) -> Result<()> {
    let corners = |r: i32| vec![(x, y - r), (x + r, y), (x, y + r), (x - r, y)];
    area.draw(&Polygon::new(corners(14), INK.filled())).map_err(failed)?;
    area.draw(&Polygon::new(corners(10), WHITE.filled())).map_err(failed)
}

fn forgetting(findings: &Findings, area: &Area<'_>) -> Result<()> {
    head(
        area,
        "What else the model can still do",
        "Right answers to questions that fine-tuning was not about",
    )?;
    let place = Percent::PLACE;
    place.grid(area)?;
    let mut groups = vec![("before training", RGBColor(156, 163, 175), findings.before.clone())];
    for row in findings.rows().into_iter().filter(|row| row.trained) {
        groups.push((row.arm.title(), color(row.arm), row.abilities));
    }
    let half = 250 / groups.len() as i32 / 2;
    for (probe, name) in findings.probes.iter().enumerate() {
        let middle = place.x(probe, findings.probes.len());
        for (index, (_, color, scores)) in groups.iter().enumerate() {
            let x = middle + (2 * index as i32 + 1 - groups.len() as i32) * (half + 8);
            let share = scores.get(probe).copied().unwrap_or_default().share();
            place.bar(area, x, half, share, color)?;
            let label = format!("{:.0}", 100.0 * share);
            text(area, &label, BOLD, 26, INK, HPos::Center, (x, place.y(share) - 24))?;
        }
        text(area, name, REGULAR, 28, INK, HPos::Center, (middle, place.bottom + 38))?;
    }
    legend(area, &groups.iter().map(|(title, color, _)| (*title, *color)).collect::<Vec<_>>())
}

/// Entries in one line below the title.
fn legend(area: &Area<'_>, entries: &[(&str, RGBColor)]) -> Result<()> {
    let mut x = 150;
    for (title, color) in entries {
        let sample = [(x, LEGEND - 6), (x + 36, LEGEND + 6)];
        area.draw(&Rectangle::new(sample, color.filled())).map_err(failed)?;
        text(area, title, REGULAR, 25, INK, HPos::Left, (x + 50, LEGEND))?;
        x += 50 + width(area, title, REGULAR, 25)? + 48;
    }
    Ok(())
}

/// Loss over the share of the training that is done, in percent.
struct Curve {
    arm: Arm,
    held_out: bool,
    points: Vec<(f64, f64)>,
}

/// Curves of the first seed. A loss in training is the mean of some steps and stands in their middle: at their end it
/// would seem to lag behind the held-out loss, which is measured at one step.
fn loss(findings: &Findings, area: &Area<'_>) -> Result<()> {
    head(
        area,
        "Loss of the answer tokens during fine-tuning",
        "Full line: species trained on. Dashed: held-out species",
    )?;
    let mut curves = Vec::new();
    for arm in [Arm::Full, Arm::Lora] {
        if let Some(training) = findings.of(arm).find_map(|result| result.training.as_ref()) {
            let percent = |step: f64| 100.0 * step / training.steps.max(1) as f64;
            let held_out = training.held_out.iter().map(|point| (percent(point.step as f64), point.loss));
            let mut before = 0;
            let middle = |point: &Point| {
                let middle = (before + 1 + point.step) as f64 / 2.0;
                before = point.step;
                (percent(middle), point.loss)
            };
            let points = training.train.iter().map(middle).collect();
            curves.push(Curve { arm, held_out: false, points });
            curves.push(Curve { arm, held_out: true, points: held_out.collect() });
        }
    }
    let highest = curves.iter().flat_map(|curve| &curve.points).map(|point| point.1).fold(0.1, f64::max);
    let plot = area.margin(222, 24, 60, 60);
    let mut chart = ChartBuilder::on(&plot)
        .x_label_area_size(90)
        .y_label_area_size(90)
        .build_cartesian_2d(0.0..100.0, 0.0..highest * 1.05)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(2))
        .axis_style(SOFT.stroke_width(2))
        .label_style((REGULAR, 25).into_font().color(&SOFT))
        .axis_desc_style((REGULAR, 26).into_font().color(&SOFT))
        .x_label_formatter(&|share| format!("{share:.0} %"))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .x_desc("share of the training")
        .y_labels(6)
        .draw()
        .map_err(failed)?;
    let mut entries = Vec::new();
    for Curve { arm, held_out, points } in &curves {
        let style = color(*arm).stroke_width(4);
        if !held_out {
            entries.push((arm.title(), color(*arm)));
            chart.draw_series(LineSeries::new(points.iter().copied(), style)).map_err(failed)?;
        } else {
            chart
                .draw_series(DashedLineSeries::new(points.iter().copied(), 14, 10, style))
                .map_err(failed)?;
            let dots = points.iter().map(|point| Circle::new(*point, 7, color(*arm).filled()));
            chart.draw_series(dots).map_err(failed)?;
        }
    }
    legend(area, &entries)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::summary::tests::findings;

    #[test]
    fn plots_are_images_of_the_size() {
        let dir = tempfile::tempdir().unwrap();
        write(&findings(), dir.path()).unwrap();
        for name in ["accuracy.png", "forgetting.png", "loss.png"] {
            let bytes = fs::read(dir.path().join(name)).unwrap();
            assert_eq!(&bytes[1..4], b"PNG");
            let side = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!((side(16), side(20)), SIZE, "{name}");
        }
    }

    #[test]
    fn what_was_not_trained_has_no_plot() {
        let dir = tempfile::tempdir().unwrap();
        let mut findings = findings();
        for earlier in ["loss.png", "forgetting.png", "mine.png"] {
            std::fs::write(dir.path().join(earlier), "of an earlier run").unwrap();
        }
        findings.results.truncate(2);
        write(&findings, dir.path()).unwrap();
        assert!(dir.path().join("accuracy.png").exists() && !dir.path().join("loss.png").exists());
        assert!(!dir.path().join("forgetting.png").exists() && dir.path().join("mine.png").exists());
    }
}
