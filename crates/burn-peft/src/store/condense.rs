//! Long lists of targets made short.

use std::collections::BTreeSet;

/// PEFT shortens lists of this many targets.
pub(super) const MANY_TARGETS: usize = 20;

/// The shortest ends of `targets`, cut at dots, that match all of them and none of `others`, as PEFT's
/// `_find_minimal_target_modules` chooses them: `q_proj` for every `….q_proj`.
pub(super) fn condensed<'a>(
    targets: &BTreeSet<String>,
    others: impl IntoIterator<Item = &'a str>,
) -> BTreeSet<String> {
    let taken: BTreeSet<&str> = others.into_iter().flat_map(ends).collect();
    let mut by_ends: Vec<(Vec<&str>, &str)> =
        targets.iter().map(|target| (ends(target).collect(), target.as_str())).collect();
    by_ends.sort();
    let mut chosen: BTreeSet<&str> = BTreeSet::new();
    for (ends, target) in by_ends {
        for end in ends {
            if chosen.contains(end) || taken.contains(end) {
                continue;
            }
            let is_covered = chosen
                .iter()
                .any(|chosen| target.strip_suffix(chosen).is_some_and(|front| front.ends_with('.')));
            if !is_covered {
                chosen.insert(end);
                break;
            }
        }
    }
    chosen.into_iter().map(str::to_string).collect()
}

/// The ends of a name, the shortest first.
fn ends(name: &str) -> impl Iterator<Item = &str> {
    name.rmatch_indices('.').map(|(dot, _)| &name[dot + 1..]).chain([name])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(stacks: &[&str], modules: &[&str]) -> BTreeSet<String> {
        let layer = |stack: &str, i: usize, module: &str| format!("{stack}.layers.{i}.{module}");
        let of_stack =
            |stack| modules.iter().flat_map(move |module| (0..3).map(move |i| layer(stack, i, module)));
        stacks.iter().flat_map(|stack| of_stack(*stack)).collect()
    }

    /// What PEFT 0.21.2 gives for the same lists.
    #[test]
    fn the_shortest_ends_that_mean_no_other_module_are_chosen() {
        let text = |targets: &BTreeSet<String>, others: &[String]| {
            condensed(targets, others.iter().map(String::as_str)).into_iter().collect::<Vec<_>>().join(" ")
        };
        let targets = names(&["model"], &["self_attn.q_proj", "self_attn.v_proj"]);
        assert_eq!(text(&targets, &["lm_head".into(), "model.norm".into()]), "q_proj v_proj");
        let others: Vec<String> = names(&["vision"], &["attn.q_proj"]).into_iter().collect();
        assert_eq!(text(&targets, &others), "self_attn.q_proj v_proj");
        let others: Vec<String> = names(&["vision"], &["self_attn.q_proj"]).into_iter().collect();
        assert_eq!(
            text(&targets, &others),
            "model.layers.0.self_attn.q_proj model.layers.1.self_attn.q_proj model.layers.2.self_attn.q_proj v_proj"
        );
        assert_eq!(text(&["lm_head".to_string()].into(), &[]), "lm_head");
    }
}
