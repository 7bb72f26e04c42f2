//! Suggestions for names that do not exist.

use strsim::jaro_winkler;

/// The `count` candidates that resemble `name` most, best first; poor matches are left out.
///
/// ```
/// use burn_peft_files::closest;
///
/// assert_eq!(closest("q_prj", ["k_proj", "q_proj", "embed_tokens"], 1), ["q_proj"]);
/// assert!(closest("norm", ["q_proj"], 1).is_empty());
/// ```
pub fn closest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>, count: usize) -> Vec<String> {
    const RESEMBLES: f64 = 0.7;
    let mut scored: Vec<(f64, &str)> = candidates
        .into_iter()
        .map(|candidate| (jaro_winkler(name, candidate), candidate))
        .filter(|(score, _)| *score >= RESEMBLES)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(count).map(|(_, candidate)| candidate.to_string()).collect()
}

/// The key of a tensor among `candidates` that resembles `key` most. One of the same layer is preferred: names differ
/// less between layers than between modules.
pub fn closest_key<'a>(key: &str, candidates: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    let numbers = |key: &str| -> Vec<usize> { key.split('.').filter_map(|part| part.parse().ok()).collect() };
    let own = numbers(key);
    let of_layer = candidates.clone().into_iter().filter(|candidate| numbers(candidate) == own);
    let found = closest(key, of_layer, 1).pop();
    found.or_else(|| closest(key, candidates, 1).pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_the_same_layer_goes_before_a_more_similar_one_of_another() {
        let keys = ["layers.1.q_proj.weight", "layers.2.q_projection.weight", "norm.weight"];
        assert_eq!(
            closest_key("layers.2.q_proj.weight", keys).as_deref(),
            Some("layers.2.q_projection.weight")
        );
        assert_eq!(closest_key("layers.7.q_proj.weight", keys).as_deref(), Some("layers.1.q_proj.weight"));
        assert_eq!(closest_key("xyz", keys), None);
    }

    #[test]
    fn candidates_are_told_once_best_first() {
        assert_eq!(closest("q_prj", ["k_proj", "q_proj", "q_proj"], 3), ["q_proj", "k_proj"]);
    }
}
