//! What must hold before the first step.

use burn::module::Module;
use burn::tensor::{DType, Device};
use burn_peft::PeftModel;

use crate::batch::Collator;
use crate::conversation::Example;
use crate::error::LlamaError;
use crate::parameters::parameters;

pub(super) fn check_examples(
    examples: &[Example],
    collator: &Collator,
    vocab_size: Option<usize>,
) -> Result<(), LlamaError> {
    if examples.is_empty() {
        return Err(LlamaError::EmptyBatch);
    }
    for (index, example) in examples.iter().enumerate() {
        collator.check(index, example)?;
        // Labels are tokens of the example or masked; padding may stand beside it.
        let mut ids = example.input_ids.iter().chain([&collator.pad_token_id]);
        let vocab_size = vocab_size.unwrap_or(usize::MAX);
        if let Some(&id) = ids.find(|&&id| id as usize >= vocab_size) {
            return Err(LlamaError::ExampleTokenOutOfRange { index, id, vocab_size });
        }
    }
    Ok(())
}

pub(super) fn device<M: Module>(model: &M) -> Result<Device, LlamaError> {
    model.devices().first().cloned().ok_or(LlamaError::NotTrainable { hint: "the model has no parameters" })
}

/// Something must be trainable, and all of it in a type that AdamW works in.
pub(super) fn check_trainable<M: Module>(model: &M, device: &Device) -> Result<(), LlamaError> {
    if !device.is_autodiff() {
        let hint = "the model is not on an autodiff device; load it on `device.autodiff()`";
        return Err(LlamaError::NotTrainable { hint });
    }
    let trained: Vec<_> = parameters(model).into_iter().filter(|parameter| parameter.is_trained()).collect();
    if let Some(parameter) = trained.iter().find(|parameter| parameter.dtype == DType::F16) {
        return Err(LlamaError::TrainableF16 { parameter: parameter.name.clone() });
    }
    if trained.is_empty() || !takes_part(model) {
        return Err(LlamaError::NotTrainable { hint: hint(model) });
    }
    Ok(())
}

/// Whether something that is trained has a part in the forward pass: merged adapters are constants there.
fn takes_part<M: Module>(model: &M) -> bool {
    let adapters = model.adapters();
    if adapters.iter().any(|adapter| adapter.active && !adapter.merged) {
        return true;
    }
    let of_adapters: usize =
        adapters.iter().filter(|adapter| adapter.active).map(|adapter| adapter.num_params).sum();
    model.trainable_parameters().trainable > of_adapters
}

/// Why nothing is trained, and the remedy.
pub(crate) fn hint<M: Module>(model: &M) -> &'static str {
    let adapters = model.adapters();
    if adapters.iter().any(|adapter| adapter.merged) {
        "the adapters are merged; call `unmerge_adapter`"
    } else if model.batch_rows().is_some() {
        "the rows of the batch name their adapters, which is for inference; train the model that \
         `for_rows` was called on"
    } else if !adapters.is_empty() && adapters.iter().all(|adapter| !adapter.active) {
        "no adapter is active; call `set_adapter`"
    } else {
        "all parameters are frozen; add an adapter"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tests::{Bigram, autodiff, config, examples, fit};

    #[test]
    fn what_cannot_be_trained_is_an_error_before_the_first_step() {
        let fit = |mut model: Bigram, examples: &[Example], config| fit(&mut model, examples, &config);
        let model = || Bigram::new(&autodiff());
        assert!(matches!(fit(model(), &[], config()), Err(LlamaError::EmptyBatch)));
        let unlabelled = [Example { input_ids: vec![1, 2], labels: vec![-100, -100] }];
        assert!(matches!(fit(model(), &unlabelled, config()), Err(LlamaError::NoLabels { index: 0 })));
        let option = |config| match fit(model(), &examples(), config) {
            Err(LlamaError::InvalidOption { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        assert_eq!(option(config().with_batch_size(0)), "batch_size");
        assert_eq!(option(config().with_epochs(0)), "epochs");
        assert_eq!(option(config().with_learning_rate(f64::NAN)), "learning_rate");
        let plain = fit(Bigram::new(&Device::default()), &examples(), config()).unwrap_err().to_string();
        assert!(plain.contains("autodiff()"), "{plain}");
        let frozen = fit(model().no_grad(), &examples(), config()).unwrap_err().to_string();
        assert!(frozen.contains("frozen"), "{frozen}");
    }

    #[test]
    fn adapters_that_are_not_trained_are_an_error_that_names_the_cause() {
        use crate::model::LlamaForCausalLm;
        use crate::testing::{add_drawn_adapter, model};
        use crate::train::evaluate;
        use burn_peft::LoraConfig;
        let mut model = model(&autodiff(), false);
        let lora = LoraConfig::new(2).with_lora_alpha(6.0).with_target_modules(["q_proj", "lm_head"]);
        add_drawn_adapter(&mut model, "one", &lora);
        let train = |model: &LlamaForCausalLm| {
            fit(&mut model.clone(), &examples(), &config().with_max_steps(Some(1)))
        };
        let message = |model: &LlamaForCausalLm| train(model).unwrap_err().to_string();
        let loss =
            |model: &LlamaForCausalLm| evaluate(model, &examples(), &Collator::new(7), 8).unwrap().loss;
        assert!(train(&model).is_ok());
        let (adapted, bare) = (loss(&model), loss(&model.without_adapters().unwrap()));
        assert!((adapted - bare).abs() > 1e-2);

        let mut merged = model.clone();
        merged.merge_adapter().unwrap();
        let expected = "no parameter is trainable\nhint: the adapters are merged; call `unmerge_adapter`";
        assert_eq!(message(&merged), expected);
        assert!((loss(&merged) - adapted).abs() < 1e-5);
        merged.unmerge_adapter().unwrap();
        assert!(train(&merged).is_ok());

        let inactive = model.without_adapters().unwrap();
        let expected = "no parameter is trainable\nhint: no adapter is active; call `set_adapter`";
        assert_eq!(message(&inactive), expected);

        let mixed = model.for_rows(&[Some("one"), None]).unwrap();
        assert!(message(&mixed).contains("`for_rows`"), "{}", message(&mixed));

        // Something else is trained beside the merged adapter.
        model.merge_adapter().unwrap();
        model.model.norm.weight = model.model.norm.weight.set_require_grad(true);
        assert!(train(&model).is_ok());
    }

    #[test]
    fn what_is_trained_may_be_bf16_but_not_f16() {
        let with_head = |dtype: DType, trained: bool| {
            let mut model = Bigram::new(&autodiff());
            model.head.weight = model.head.weight.map(|w| w.cast(dtype).detach().set_require_grad(trained));
            check_trainable(&model, &autodiff())
        };
        assert!(with_head(DType::BF16, true).is_ok());
        assert!(with_head(DType::F16, false).is_ok());
        let error = with_head(DType::F16, true).unwrap_err();
        assert!(
            matches!(&error, LlamaError::TrainableF16 { parameter } if parameter == "head.weight"),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.contains("hint: train in f32 or bf16") && text.contains("LoRA"), "{text}");
    }
}
