//! The plots of the report: accuracy, forgetting, loss.

use std::path::Path;

use anyhow::Result;
use burn_peft_examples::canvas::{
    self, Area, BOLD, Curve, INK, LEGEND, Percent, REGULAR, SOFT, failed, head, in_the_middle, legend,
    loss_curves, text, width,
};
use burn_peft_examples::output;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use crate::arms::Arm;
use crate::summary::Findings;

/// Writes accuracy.png, and where something was trained forgetting.png and loss.png, into `dir`. Where it was not, plots
/// of these names are those of an earlier run and are removed.
pub fn write(findings: &Findings, dir: &Path) -> Result<()> {
    let draw = |name: &str, plot: fn(&Findings, &Area<'_>) -> Result<()>| {
        canvas::draw(&dir.join(name), |area| plot(findings, area))
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

fn color(arm: Arm) -> RGBColor {
    match arm {
        Arm::ZeroShot => RGBColor(156, 163, 175),
        Arm::FewShot => RGBColor(100, 116, 139),
        Arm::Careless => RGBColor(234, 124, 60),
        Arm::Full => RGBColor(13, 148, 136),
        Arm::Lora | Arm::Adapter => RGBColor(37, 99, 235),
    }
}

/// A bar of a [`Percent`].
fn bar(area: &Area<'_>, place: &Percent, x: i32, half: i32, share: f64, color: &RGBColor) -> Result<()> {
    // A bar of no height would look like a missing one.
    let top = place.y(share).min(place.bottom - 3);
    area.draw(&Rectangle::new([(x - half, top), (x + half, place.bottom)], color.filled())).map_err(failed)
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
        bar(area, &place, x, 85, row.exact.mean, &color(row.arm))?;
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
            bar(area, &place, x, half, share, color)?;
            let label = format!("{:.0}", 100.0 * share);
            text(area, &label, BOLD, 26, INK, HPos::Center, (x, place.y(share) - 24))?;
        }
        text(area, name, REGULAR, 28, INK, HPos::Center, (middle, place.bottom + 38))?;
    }
    legend(area, &groups.iter().map(|(title, color, _)| (*title, *color)).collect::<Vec<_>>())
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
    for arm in [Arm::Careless, Arm::Full, Arm::Lora] {
        if let Some(training) = findings.of(arm).find_map(|result| result.training.as_ref()) {
            let percent = |step: f64| 100.0 * step / training.steps.max(1) as f64;
            let held_out = training.held_out.iter().map(|point| (percent(point.step as f64), point.loss));
            let train = training.train.iter().map(|point| (point.step, point.loss));
            let points = in_the_middle(train).map(|(step, loss)| (percent(step), loss)).collect();
            let (title, color) = (arm.title(), color(arm));
            curves.push(Curve { title, color, dashed: false, points });
            curves.push(Curve { title, color, dashed: true, points: held_out.collect() });
        }
    }
    loss_curves(area, &curves, 100.0, "share of the training", |share| format!("{share:.0} %"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use burn_peft_examples::canvas::SIZE;

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
