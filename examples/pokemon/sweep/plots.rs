//! The plots of the sweep: accuracy against what is kept, and both by learning rate.

use std::path::Path;

use anyhow::Result;
use burn_peft_examples::canvas::{self, Area, GRID, INK, Percent, REGULAR, SOFT, failed, head, legend, text};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::{Findings, Method, Point, frontier};

pub(super) const FRONTIER: &str = "frontier.png";
pub(super) const RATES: &str = "rates.png";

/// Writes both plots into `dir`.
pub(super) fn write(findings: &Findings, dir: &Path) -> Result<()> {
    canvas::draw(&dir.join(FRONTIER), |area| frontiers(findings, area))?;
    canvas::draw(&dir.join(RATES), |area| rates(findings, area))
}

/// Full fine-tuning is orange; ranks are blue, the higher the darker.
fn color(method: Method, methods: &[Method]) -> RGBColor {
    if method == Method::Full {
        return RGBColor(234, 124, 60);
    }
    let ranks: Vec<&Method> = methods.iter().filter(|method| **method != Method::Full).collect();
    let place = ranks.iter().position(|one| **one == method).unwrap_or_default();
    let dark = if ranks.len() > 1 { place as f64 / (ranks.len() - 1) as f64 } else { 0.5 };
    let mix = |light: f64, deep: f64| (light + dark * (deep - light)).round() as u8;
    RGBColor(mix(125.0, 23.0), mix(190.0, 60.0), mix(250.0, 150.0))
}

fn entries(methods: &[Method]) -> Vec<(String, RGBColor)> {
    methods.iter().map(|method| (method.to_string(), color(*method, methods))).collect()
}

fn named(area: &Area<'_>, methods: &[Method]) -> Result<()> {
    let entries = entries(methods);
    legend(area, &entries.iter().map(|(title, color)| (title.as_str(), *color)).collect::<Vec<_>>())
}

fn line(area: &Area<'_>, points: Vec<(i32, i32)>, color: RGBColor, stroke: u32, dashed: bool) -> Result<()> {
    let style = color.stroke_width(stroke);
    if dashed {
        area.draw(&DashedPathElement::new(points, 12, 9, style)).map_err(failed)
    } else {
        area.draw(&PathElement::new(points, style)).map_err(failed)
    }
}

fn frontiers(findings: &Findings, area: &Area<'_>) -> Result<()> {
    head(
        area,
        "Accuracy, and what the model can still do",
        "Each point is a learning rate. Lines: what no other training of the kind is better than in both",
    )?;
    let place = Percent { left: 190, ..Percent::PLACE };
    place.grid(area)?;
    let width = f64::from(place.right - place.left - 40);
    let at = |point: &Point| (place.left + 20 + (point.kept() * width).round() as i32, place.y(point.exact));
    for step in 0..=5 {
        let share = f64::from(step) / 5.0;
        let x = place.left + 20 + (share * width).round() as i32;
        let tick = [(x, place.bottom), (x, place.bottom + 8)].to_vec();
        area.draw(&PathElement::new(tick, SOFT.stroke_width(2))).map_err(failed)?;
        let label = format!("{:.0} %", 100.0 * share);
        text(area, &label, REGULAR, 25, SOFT, HPos::Center, (x, place.bottom + 28))?;
    }
    let middle = (place.left + place.right) / 2;
    let axis = "right answers to what fine-tuning was not about, of those before training";
    text(area, axis, REGULAR, 26, SOFT, HPos::Center, (middle, place.bottom + 66))?;
    text(area, "exact", REGULAR, 26, SOFT, HPos::Right, (place.left - 16, place.top - 36))?;

    let (methods, points) = (findings.methods(), findings.points());
    let is_full = |point: &&Point| point.method == Method::Full;
    let full = frontier(points.iter().filter(is_full));
    let lora = frontier(points.iter().filter(|point| !is_full(point)));
    let of_all_ranks = RGBColor(37, 99, 235);
    // The wide line shows beside the narrow one where they are the same.
    for (best, color, stroke) in [(full, color(Method::Full, &methods), 12), (lora, of_all_ranks, 4)] {
        line(area, best.iter().map(at).collect(), color, stroke, false)?;
    }
    for point in &points {
        let color = color(point.method, &methods);
        area.draw(&Circle::new(at(point), 11, WHITE.filled())).map_err(failed)?;
        area.draw(&Circle::new(at(point), 9, color.filled())).map_err(failed)?;
    }
    named(area, &methods)
}

fn rates(findings: &Findings, area: &Area<'_>) -> Result<()> {
    head(
        area,
        "By learning rate",
        "Full line: answers that are exactly right. Dashed: what the model can still do besides",
    )?;
    let place = Percent::PLACE;
    place.grid(area)?;
    let (methods, points) = (findings.methods(), findings.points());
    let mut rates: Vec<f64> = points.iter().map(|point| point.learning_rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let (lowest, highest) = (rates[0].ln(), rates[rates.len() - 1].ln());
    let (left, width) = (place.left + 60, f64::from(place.right - place.left - 120));
    let x = |rate: f64| {
        let share = if highest > lowest { (rate.ln() - lowest) / (highest - lowest) } else { 0.5 };
        left + (share * width).round() as i32
    };
    for rate in &rates {
        let line = [(x(*rate), place.top), (x(*rate), place.bottom)].to_vec();
        area.draw(&PathElement::new(line, GRID.stroke_width(1))).map_err(failed)?;
        text(area, &format!("{rate:e}"), REGULAR, 25, INK, HPos::Center, (x(*rate), place.bottom + 28))?;
    }
    let middle = (place.left + place.right) / 2;
    text(area, "peak learning rate", REGULAR, 26, SOFT, HPos::Center, (middle, place.bottom + 66))?;
    for method in &methods {
        let color = color(*method, &methods);
        let own: Vec<&Point> = points.iter().filter(|point| point.method == *method).collect();
        let kept = own.iter().map(|point| (x(point.learning_rate), place.y(point.kept())));
        line(area, kept.collect(), color, 4, true)?;
        let exact: Vec<(i32, i32)> =
            own.iter().map(|point| (x(point.learning_rate), place.y(point.exact))).collect();
        for at in &exact {
            area.draw(&Circle::new(*at, 8, color.filled())).map_err(failed)?;
        }
        line(area, exact, color, 4, false)?;
    }
    named(area, &methods)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::findings;

    #[test]
    fn higher_ranks_are_darker_and_full_fine_tuning_is_not_blue() {
        let ranks = [4, 16, 64].map(|rank| Method::Lora { rank });
        let methods = [&[Method::Full], &ranks[..]].concat();
        let brightness = ranks.map(|rank| color(rank, &methods).0);
        assert!(brightness.is_sorted_by(|a, b| a > b), "{brightness:?}");
        assert!(color(Method::Full, &methods).0 > color(Method::Full, &methods).2);
    }

    #[test]
    fn one_learning_rate_is_enough_for_a_plot() {
        let dir = tempfile::tempdir().unwrap();
        let mut findings = findings();
        findings.trials.truncate(1);
        write(&findings, dir.path()).unwrap();
        assert!(dir.path().join("rates.png").is_file() && dir.path().join("frontier.png").is_file());
    }
}
