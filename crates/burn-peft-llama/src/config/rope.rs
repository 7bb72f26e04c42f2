//! Rotary embedding in `config.json`, the fields of both generations.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::problem::ConfigProblem;
use crate::rope::{RopeConfig, RopeScaling};

/// `rope_parameters`, or `rope_scaling` of files before transformers 5.
#[derive(Default, PartialEq)]
pub(super) struct RopeJson {
    pub(super) rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The name of `rope_type` in the oldest files.
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

impl RopeJson {
    pub(super) fn read(json: &Map<String, Value>, problems: &mut Vec<ConfigProblem>) -> Self {
        let mut fields = Fields::new(json);
        let rope = Self {
            rope_theta: fields.number("rope_theta"),
            rope_type: fields.text("rope_type").map(str::to_string),
            old_type: fields.text("type").map(str::to_string),
            factor: fields.number("factor"),
            low_freq_factor: fields.number("low_freq_factor"),
            high_freq_factor: fields.number("high_freq_factor"),
            original_max_position_embeddings: fields.size("original_max_position_embeddings"),
        };
        problems.append(&mut fields.problems);
        rope
    }

    /// What counts where a file has both. As in transformers, that is `rope_scaling` unless it is empty, and then
    /// nothing of the other is used, not even its `rope_theta`.
    pub(super) fn of(rope_scaling: Option<Self>, rope_parameters: Option<Self>) -> Self {
        let scaling = rope_scaling.filter(|scaling| *scaling != Self::default());
        scaling.or(rope_parameters).unwrap_or_default()
    }

    pub(super) fn scaling(&self, problems: &mut Vec<ConfigProblem>) -> RopeScaling {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => RopeScaling::Default,
            Some("llama3") => {
                let mut number = |field, value: Option<f64>| match value {
                    Some(value) if value > 0.0 && value.is_finite() => value,
                    other => {
                        let found = other.map_or("none".to_string(), |value| value.to_string());
                        let expected = "a positive number, as `rope_type` is `llama3`";
                        problems.push(ConfigProblem::new(field, expected, found));
                        1.0
                    }
                };
                let factor = number("factor", self.factor);
                let low_freq_factor = number("low_freq_factor", self.low_freq_factor);
                let high_freq_factor = number("high_freq_factor", self.high_freq_factor);
                let length = self.original_max_position_embeddings.map(|length| length as f64);
                let length = number("original_max_position_embeddings", length);
                if high_freq_factor < low_freq_factor {
                    problems.push(ConfigProblem::new(
                        "high_freq_factor",
                        format!("at least `low_freq_factor` ({low_freq_factor})"),
                        high_freq_factor.to_string(),
                    ));
                }
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: length as usize,
                }
            }
            Some(other) => {
                problems.push(ConfigProblem::new("rope_type", "`default` or `llama3`", format!("`{other}`")));
                RopeScaling::Default
            }
        }
    }
}

/// `rope_parameters`.
pub(super) fn to_json(rope: &RopeConfig) -> Value {
    let mut json = json!({ "rope_theta": rope.rope_theta });
    match rope.scaling {
        RopeScaling::Default => json["rope_type"] = json!("default"),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            json["rope_type"] = json!("llama3");
            json["factor"] = json!(factor);
            json["low_freq_factor"] = json!(low_freq_factor);
            json["high_freq_factor"] = json!(high_freq_factor);
            json["original_max_position_embeddings"] = json!(original_max_position_embeddings);
        }
    }
    json
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::tests::read;

    pub(in crate::config) const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    #[test]
    fn both_generations_of_rope_fields_are_read() {
        let llama3 = r#""factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192"#;
        let texts = [
            format!(
                r#"{{"model_type": "llama", "rope_parameters": {{"rope_theta": 5e5, "rope_type": "llama3", {llama3}}}}}"#
            ),
            format!(
                r#"{{"model_type": "llama", "rope_theta": 500000, "rope_scaling": {{"rope_type": "llama3", {llama3}}}}}"#
            ),
            format!(
                r#"{{"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {{"type": "llama3", {llama3}}}}}"#
            ),
        ];
        for text in texts {
            let config = read(&text, None).unwrap();
            assert_eq!(config.rope, RopeConfig { rope_theta: 5e5, scaling: LLAMA3 });
        }
        let plain =
            read(r#"{"model_type": "llama", "rope_theta": 7.0, "rope_scaling": null}"#, None).unwrap();
        assert_eq!(plain.rope, RopeConfig { rope_theta: 7.0, scaling: RopeScaling::Default });
    }

    #[test]
    fn rope_scaling_wins_over_rope_parameters_unless_it_is_empty() {
        let rope =
            |fields: &str| read(&format!(r#"{{"model_type": "llama", {fields}}}"#), None).unwrap().rope;
        let parameters = r#""rope_parameters": {"rope_type": "default", "rope_theta": 5e5}"#;
        let scaling = r#""rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;
        let both = rope(&format!("{parameters}, {scaling}"));
        assert_eq!(both, RopeConfig { rope_theta: 10_000.0, scaling: LLAMA3 });
        let both = rope(&format!(r#"{parameters}, {scaling}, "rope_theta": 7.0"#));
        assert_eq!(both, RopeConfig { rope_theta: 7.0, scaling: LLAMA3 });
        for empty in ["null", "{}"] {
            let one = rope(&format!(r#"{parameters}, "rope_scaling": {empty}, "rope_theta": 7.0"#));
            assert_eq!(one, RopeConfig { rope_theta: 5e5, scaling: RopeScaling::Default });
        }
    }
}
