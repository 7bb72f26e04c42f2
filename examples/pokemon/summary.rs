//! Results of all seeds, put together by arm.

use serde::Serialize;

use crate::arms::{Arm, ArmResult};
use crate::base::Kind;
use crate::evaluation::{Outcome, Score, distinct};

/// Everything that a run found out.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// What was run, as a command.
    pub command: String,
    /// Which base model.
    pub base: String,
    /// What it has read.
    pub kind: Kind,
    /// Species trained on and held out, of the first seed.
    pub species: (usize, usize),
    /// Whether the held-out species are those that the adapter was not trained on; not so for a foreign adapter.
    pub split_is_known: bool,
    /// Names of the probes.
    pub probes: Vec<&'static str>,
    /// What the base scores in them.
    pub before: Vec<Score>,
    pub results: Vec<ArmResult>,
    /// Directories beside the report that have adapters of earlier runs.
    pub earlier_adapters: Vec<String>,
    pub seconds: f64,
}

/// One arm over all its seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub arm: Arm,
    pub exact: Spread,
    pub any: Spread,
    pub ordered: Spread,
    /// Mean number of distinct answers.
    pub distinct: f64,
    /// For each probe the answers after training, all seeds together; those of the base for an arm that trains nothing.
    pub abilities: Vec<Score>,
    /// Whether the arm changes the model.
    pub trained: bool,
    /// Mean time of a seed, in seconds.
    pub seconds: f64,
}

/// A share in several seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub mean: f64,
    pub lowest: f64,
    pub highest: f64,
    /// All seeds together.
    pub pooled: Score,
    /// Wilson's 95 % interval of the pooled share.
    pub interval: (f64, f64),
}

impl Spread {
    fn of(scores: &[Score]) -> Self {
        let shares: Vec<f64> = scores.iter().map(|score| score.share()).collect();
        let pooled = Score::pooled(scores.iter().copied());
        Self {
            mean: shares.iter().sum::<f64>() / shares.len().max(1) as f64,
            lowest: shares.iter().copied().fold(f64::INFINITY, f64::min),
            highest: shares.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            pooled,
            interval: pooled.interval(),
        }
    }
}

impl Findings {
    /// The arms in the order they were run first.
    pub fn rows(&self) -> Vec<Row> {
        let mut arms: Vec<Arm> = Vec::new();
        for result in &self.results {
            if !arms.contains(&result.arm) {
                arms.push(result.arm);
            }
        }
        arms.into_iter().map(|arm| self.row(arm)).collect()
    }

    /// Results of one arm, by seed.
    pub fn of(&self, arm: Arm) -> impl Iterator<Item = &ArmResult> {
        self.results.iter().filter(move |result| result.arm == arm)
    }

    fn row(&self, arm: Arm) -> Row {
        let spread = |test: fn(&Outcome) -> bool| {
            Spread::of(&self.of(arm).map(|result| Score::of(&result.outcomes, test)).collect::<Vec<_>>())
        };
        let count = self.of(arm).count().max(1) as f64;
        let trained = self.of(arm).all(|result| !result.abilities.is_empty());
        let after = |probe: usize| {
            Score::pooled(self.of(arm).filter_map(|result| result.abilities.get(probe)).copied())
        };
        Row {
            arm,
            exact: spread(|one| one.exact),
            any: spread(|one| one.any),
            ordered: spread(|one| one.ordered),
            distinct: self.of(arm).map(|result| distinct(&result.outcomes) as f64).sum::<f64>() / count,
            abilities: if trained {
                (0..self.probes.len()).map(after).collect()
            } else {
                self.before.clone()
            },
            trained,
            seconds: self.of(arm).map(|result| result.seconds).sum::<f64>() / count,
        }
    }

    /// Number of different right answers among the held-out species.
    pub fn distinct_truths(&self) -> usize {
        let first = self.results.first().map_or(&[][..], |result| &result.outcomes);
        first.iter().map(|one| &one.truth).collect::<std::collections::HashSet<_>>().len()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::setting::{Point, Training};

    fn outcomes(hits: usize, total: usize) -> Vec<Outcome> {
        let outcome = |index| Outcome {
            species: format!("Species {index}"),
            truth: "Fire".into(),
            answer: if index < hits { "Fire" } else { "Water, \"maybe\"" }.into(),
            exact: index < hits,
            any: index < hits,
            ordered: index < hits,
        };
        (0..total).map(outcome).collect()
    }

    /// Findings of two seeds of all arms.
    pub fn findings() -> Findings {
        let result = |arm, seed, hits, after: &[usize]| ArmResult {
            arm,
            seed,
            outcomes: outcomes(hits, 40),
            abilities: after.iter().map(|hits| Score { hits: *hits, total: 100 }).collect(),
            training: (!after.is_empty()).then(|| Training {
                steps: 100,
                seconds: 50.0,
                settings: "peak learning rate 1e-3".into(),
                trainable: "trainable params: 1 || all params: 2 || trainable%: 50.0000".into(),
                train: (1..=10).map(|k| Point { step: 10 * k, loss: 3.0 / k as f64 }).collect(),
                held_out: (1..=5).map(|k| Point { step: 20 * k, loss: 0.3 + 3.0 / k as f64 }).collect(),
            }),
            seconds: 60.0,
        };
        Findings {
            command: "pokemon --seeds 2".into(),
            base: "the embedded base".into(),
            kind: Kind::Pretrained,
            species: (160, 40),
            split_is_known: true,
            probes: vec!["generation questions", "number questions", "sentence completion"],
            before: vec![
                Score { hits: 100, total: 100 },
                Score { hits: 98, total: 100 },
                Score { hits: 99, total: 100 },
            ],
            results: vec![
                result(Arm::ZeroShot, 0, 0, &[]),
                result(Arm::FewShot, 0, 4, &[]),
                result(Arm::Careless, 0, 24, &[0, 0, 30]),
                result(Arm::Full, 0, 30, &[98, 92, 98]),
                result(Arm::Lora, 0, 30, &[99, 90, 98]),
                result(Arm::ZeroShot, 1, 0, &[]),
                result(Arm::FewShot, 1, 6, &[]),
                result(Arm::Careless, 1, 26, &[2, 0, 20]),
                result(Arm::Full, 1, 32, &[96, 92, 96]),
                result(Arm::Lora, 1, 32, &[97, 90, 96]),
            ],
            earlier_adapters: Vec::new(),
            seconds: 300.0,
        }
    }

    #[test]
    fn seeds_are_averaged_and_pooled() {
        let rows = findings().rows();
        assert_eq!(rows.iter().map(|row| row.arm).collect::<Vec<_>>(), Arm::ALL);
        let lora = &rows[4];
        assert_eq!((lora.exact.mean, lora.exact.lowest, lora.exact.highest), (0.775, 0.75, 0.8));
        assert_eq!(lora.exact.pooled, Score { hits: 62, total: 80 });
        assert_eq!(lora.exact.interval, lora.exact.pooled.interval());
        assert_eq!(lora.abilities[0], Score { hits: 196, total: 200 });
        assert_eq!(lora.distinct, 2.0);
    }

    #[test]
    fn an_arm_that_trains_nothing_keeps_the_abilities_of_the_base() {
        let findings = findings();
        let rows = findings.rows();
        assert!(!rows[0].trained && rows[2].trained);
        assert_eq!(rows[0].abilities, findings.before);
        assert_eq!(findings.distinct_truths(), 1);
    }
}
