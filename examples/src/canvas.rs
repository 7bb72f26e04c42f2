//! Drawing plots.

use std::path::Path;
use std::sync::Once;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::output;

/// The font of most texts.
pub const REGULAR: &str = "inter";
/// A family of its own: plotters does not find a registered bold style of a family.
pub const BOLD: &str = "inter semibold";
/// Texts.
pub const INK: RGBColor = RGBColor(31, 41, 55);
/// Axes and less important texts.
pub const SOFT: RGBColor = RGBColor(107, 114, 128);
/// Lines of the grid.
pub const GRID: RGBColor = RGBColor(229, 231, 235);
/// Width and height of an image.
pub const SIZE: (u32, u32) = (1600, 900);
/// Height at which the legend stands.
pub const LEGEND: i32 = 178;

/// What is drawn on.
pub type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Writes an image file.
pub fn draw(path: &Path, plot: impl Fn(&Area<'_>) -> Result<()>) -> Result<()> {
    register_fonts()?;
    output::replace(path, |path| {
        let area = BitMapBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        plot(&area)?;
        area.present().map_err(failed)
    })
}

/// plotters' errors borrow from the drawing area.
pub fn failed(error: impl std::fmt::Display) -> anyhow::Error {
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

/// A line of text whose letters are centred on `y`; `x` is its left end, middle or right end.
pub fn text(
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

/// How long a line of text is.
pub fn width(area: &Area<'_>, text: &str, font: &str, size: u32) -> Result<i32> {
    let style = (font, size).into_text_style(area);
    Ok(area.estimate_text_size(text, &style).map_err(failed)?.0 as i32)
}

/// Title and subtitle.
pub fn head(area: &Area<'_>, title: &str, subtitle: &str) -> Result<()> {
    text(area, title, BOLD, 42, INK, HPos::Left, (70, 62))?;
    text(area, subtitle, REGULAR, 26, SOFT, HPos::Left, (70, 114))
}

/// Entries in one line below the title.
pub fn legend(area: &Area<'_>, entries: &[(&str, RGBColor)]) -> Result<()> {
    let mut x = 150;
    for (title, color) in entries {
        let sample = [(x, LEGEND - 6), (x + 36, LEGEND + 6)];
        area.draw(&Rectangle::new(sample, color.filled())).map_err(failed)?;
        text(area, title, REGULAR, 25, INK, HPos::Left, (x + 50, LEGEND))?;
        x += 50 + width(area, title, REGULAR, 25)? + 48;
    }
    Ok(())
}

/// The place of a plot: percent on the vertical axis, a grid line every 20, nothing else.
pub struct Percent {
    /// Left end of the axis.
    pub left: i32,
    /// Right end.
    pub right: i32,
    /// Where 100 % is.
    pub top: i32,
    /// Where 0 % is.
    pub bottom: i32,
}

impl Percent {
    /// Below title and legend, with room for a label below.
    pub const PLACE: Self = Self { left: 150, right: 1540, top: 256, bottom: 810 };

    /// Height of a share of 0 to 1.
    pub fn y(&self, share: f64) -> i32 {
        self.bottom - (share * f64::from(self.bottom - self.top)).round() as i32
    }

    /// Middle of the `index`-th of `count` equal columns.
    pub fn x(&self, index: usize, count: usize) -> i32 {
        let column = f64::from(self.right - self.left) / count.max(1) as f64;
        self.left + (column * (index as f64 + 0.5)).round() as i32
    }

    /// Draws the lines and their labels.
    pub fn grid(&self, area: &Area<'_>) -> Result<()> {
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
}

/// A loss over the course of a training.
pub struct Curve<'a> {
    /// Its entry in the legend; only curves that are not dashed have one.
    pub title: &'a str,
    /// Its color.
    pub color: RGBColor,
    /// Dashed, with a dot at each point.
    pub dashed: bool,
    /// How far the training was, and the loss.
    pub points: Vec<(f64, f64)>,
}

/// Losses that are means since the one before, each in the middle of its steps: at their end it would seem to lag behind
/// losses that are measured at one step.
pub fn in_the_middle(losses: impl Iterator<Item = (usize, f64)>) -> impl Iterator<Item = (f64, f64)> {
    let mut before = 0;
    losses.map(move |(step, loss)| {
        let middle = (before + 1 + step) as f64 / 2.0;
        before = step;
        (middle, loss)
    })
}

/// Draws curves from 0 to `end`.
pub fn loss_curves(
    area: &Area<'_>,
    curves: &[Curve<'_>],
    end: f64,
    axis: &str,
    label: impl Fn(f64) -> String,
) -> Result<()> {
    let highest = curves.iter().flat_map(|curve| &curve.points).map(|point| point.1).fold(0.1, f64::max);
    let plot = area.margin(222, 24, 60, 60);
    let mut chart = ChartBuilder::on(&plot)
        .x_label_area_size(90)
        .y_label_area_size(90)
        .build_cartesian_2d(0.0..end, 0.0..highest * 1.05)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(2))
        .axis_style(SOFT.stroke_width(2))
        .label_style((REGULAR, 25).into_font().color(&SOFT))
        .axis_desc_style((REGULAR, 26).into_font().color(&SOFT))
        .x_label_formatter(&|position| label(*position))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .x_desc(axis)
        .y_labels(6)
        .draw()
        .map_err(failed)?;
    let mut entries = Vec::new();
    for Curve { title, color, dashed, points } in curves {
        let style = color.stroke_width(4);
        if !dashed {
            entries.push((*title, *color));
            chart.draw_series(LineSeries::new(points.iter().copied(), style)).map_err(failed)?;
        } else {
            chart
                .draw_series(DashedLineSeries::new(points.iter().copied(), 14, 10, style))
                .map_err(failed)?;
            let dots = points.iter().map(|point| Circle::new(*point, 7, color.filled()));
            chart.draw_series(dots).map_err(failed)?;
        }
    }
    legend(area, &entries)
}
