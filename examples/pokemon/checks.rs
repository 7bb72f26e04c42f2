//! What must hold before anything takes time.

use std::path::Path;

use anyhow::{Context, Result, bail};
use burn_peft_examples::arguments::Precision;
use burn_peft_llama::{LlamaForCausalLm, Tokenizer, evaluate};

use crate::arms::Arm;
use crate::base::Base;
use crate::data::Species;
use crate::prompt::Prompt;
use crate::setting;

/// AdamW divides by the root of a mean of squared gradients plus 1e-8: in f16 both are 0 for most weights.
pub fn precision(precision: Precision, arms: &[Arm]) -> Result<()> {
    if precision == Precision::F16 && arms.iter().any(|arm| matches!(arm, Arm::Careless | Arm::Full)) {
        bail!(
            "all weights cannot be trained in f16: squared gradients are too small for it\nhint: choose `--dtype f32` or `--dtype bf16`; the experiment may leave `careless` and `full` out: `--arms zero-shot,few-shot,lora`"
        );
    }
    Ok(())
}

/// Every weight of a LLaMA has the model's width on one side, so no update of it has a higher rank.
pub fn rank(rank: usize, option: &str, model: &LlamaForCausalLm) -> Result<()> {
    let width = model.config().hidden_size;
    if rank > width {
        bail!(
            "`{option} {rank}`: expected at most {width}, the width of this model\nhint: 8 to 64 are usual"
        );
    }
    Ok(())
}

/// The chat template takes what the model will be asked; some refuse a role.
pub fn prompts(
    base: &Base,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    arms: &[Arm],
    species: &[Species],
) -> Result<()> {
    let file = base.chat_template();
    let ask = |prompt: &Prompt| tokenizer.encode_prompt(&prompt.question(&species[0]));
    if let Err(error) = ask(prompt) {
        let hint = match ask(&Prompt::new("")) {
            Ok(_) => "\nhint: it takes no system text; `--system \"\"` sends none",
            Err(_) => "",
        };
        return Err(error).with_context(|| format!("`{}` has no form for a question{hint}", file.display()));
    }
    if arms.contains(&Arm::FewShot) {
        ask(&prompt.clone().with_shots(&species[1..2])).with_context(|| {
            format!(
                "`{}` has no form for answered examples\nhint: leave `few-shot` out: `--arms zero-shot,careless,full,lora`",
                file.display()
            )
        })?;
    }
    Ok(())
}

/// Every conversation has tokens to learn from, and the model takes them and the padding.
pub fn training(
    base: &Base,
    model: &LlamaForCausalLm,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    species: &[Species],
) -> Result<()> {
    let problem = |file: &Path| {
        format!(
            "`{}` is not fit for training\nhint: prompting does without: `--arms zero-shot,few-shot`",
            file.display()
        )
    };
    let examples =
        setting::examples(tokenizer, prompt, species).with_context(|| problem(&base.chat_template()))?;
    setting::collator(tokenizer)
        .and_then(|collator| Ok(evaluate(model, &examples[..1], &collator, 1)?))
        .map(drop)
        .with_context(|| problem(&base.path().join("tokenizer_config.json")))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::tensor::Device;

    use super::*;
    use burn_peft_examples::failure;

    use crate::data;

    /// Changes a file.
    fn edit(path: &Path, change: impl Fn(String) -> String) {
        fs::write(path, change(fs::read_to_string(path).unwrap())).unwrap();
    }

    /// What the checks say of the embedded base after a change to its directory.
    fn checked(change: impl Fn(&Path), system: &str) -> Result<(), String> {
        let base = Base::new(None).unwrap();
        change(base.path());
        let species = data::load(None).unwrap();
        let tokenizer = Tokenizer::load(base.path()).unwrap();
        let model = LlamaForCausalLm::from_pretrained(base.path(), &Device::flex()).unwrap();
        let prompt = Prompt::new(system);
        prompts(&base, &tokenizer, &prompt, &Arm::ALL, &species)
            .and_then(|()| training(&base, &model, &tokenizer, &prompt, &species))
            .map_err(|error| failure::text(&error))
    }

    /// What they say with another chat template.
    fn with_template(change: impl Fn(String) -> String, system: &str) -> Result<(), String> {
        checked(|dir| edit(&dir.join("chat_template.jinja"), &change), system)
    }

    #[test]
    fn the_embedded_base_passes() {
        assert_eq!(checked(|_| (), "system"), Ok(()));
    }

    #[test]
    fn a_template_that_refuses_roles_is_told_with_the_way_out() {
        let no_system =
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}";
        let refusing = |text| format!("{no_system}{text}");
        let text = with_template(refusing, "system").unwrap_err();
        for expected in ["chat_template.jinja`", "no system role", "hint: ", "`--system \"\"`"] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        assert_eq!(with_template(refusing, ""), Ok(()));

        let one_turn = "{% if messages | length > 3 %}{{ raise_exception('one turn') }}{% endif %}";
        let text = with_template(|text| format!("{one_turn}{text}"), "system").unwrap_err();
        assert!(text.contains("one turn") && text.contains("leave `few-shot` out"), "{text}");
        assert!(!text.contains("--system"), "{text}");
    }

    #[test]
    fn what_cannot_be_trained_on_is_told_with_the_file() {
        let no_end = |text: String| text.replace(" + '<|end|>'", "");
        let no_prefix = |text: String| text.replace("{{ '<|assistant|>' }}", "{{ '<|user|>' }}");
        let config = "tokenizer_config.json";
        let no_padding = |dir: &Path| edit(&dir.join(config), |_| "{}".into());
        let beyond_the_model = |dir: &Path| {
            edit(&dir.join(config), |text| text.replace("<|pad|>", "[PAD]"));
            edit(&dir.join("tokenizer.json"), |text| {
                let token = "{\"id\": 2048, \"content\": \"[PAD]\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true},";
                text.replacen("\"added_tokens\": [", &format!("\"added_tokens\": [{token}"), 1)
            });
        };
        for (told, file, expected) in [
            (with_template(no_end, "system"), "chat_template.jinja", "no end token"),
            (with_template(no_prefix, "system"), "chat_template.jinja", "does not start with its prompt"),
            (checked(no_padding, "system"), config, "`eos_token`"),
            (checked(beyond_the_model, "system"), config, "below 2048"),
        ] {
            let text = told.unwrap_err();
            for expected in [&format!("{file}` is not fit for training"), expected, "hint: prompting"] {
                assert!(text.contains(expected), "{expected} in {text}");
            }
        }
    }

    #[test]
    fn adapters_may_be_trained_on_any_precision() {
        assert!(precision(Precision::F16, &[Arm::ZeroShot, Arm::Lora]).is_ok());
        assert!(precision(Precision::Bf16, &Arm::ALL).is_ok());
    }
}
