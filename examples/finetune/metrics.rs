//! `metrics.jsonl`: what happened, one JSON object in each line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use burn_peft_examples::output;
use serde::{Deserialize, Serialize};

/// The name of the file.
pub const FILE: &str = "metrics.jsonl";

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Optimizer steps made.
    pub step: usize,
    /// Passes over the examples.
    pub epoch: f64,
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Event {
    /// Steps were made.
    Trained {
        /// Mean loss per labelled token since the line before.
        loss: f64,
        learning_rate: f64,
        grad_norm: Option<f64>,
        tokens: usize,
        tokens_per_second: f64,
    },
    /// The loss on held-out examples was measured.
    Evaluated { eval_loss: f64 },
    /// A checkpoint is on disk.
    Saved { checkpoint: String },
}

/// The open file.
pub struct Metrics {
    file: File,
    /// All lines.
    pub lines: Vec<Metric>,
}

impl Metrics {
    /// Opens the file in `directory`. Lines of steps after `step` are of work that was lost, and are removed; so is a line
    /// that was being written when the program was killed.
    pub fn open(directory: &Path, step: usize) -> Result<Self> {
        let path = directory.join(FILE);
        let mut lines = read(&path)?;
        lines.retain(|line| step > 0 && line.step <= step);
        let mut text = String::new();
        for line in &lines {
            text += &(serde_json::to_string(line)? + "\n");
        }
        output::write(&path, text)?;
        let open = OpenOptions::new().append(true).open(&path);
        let file = open.with_context(|| format!("`{}` cannot be opened", path.display()))?;
        Ok(Self { file, lines })
    }

    /// Adds a line.
    pub fn push(&mut self, metric: Metric) -> Result<()> {
        let text = serde_json::to_string(&metric)? + "\n";
        self.file.write_all(text.as_bytes()).with_context(|| format!("`{FILE}` cannot be written"))?;
        self.lines.push(metric);
        Ok(())
    }
}

/// The lines of a file; none if there is no file. A line that is no metric ends it.
pub fn read(path: &Path) -> Result<Vec<Metric>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error).with_context(|| format!("`{}` cannot be read", path.display())),
    }
}
