//! What must hold before the first step.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Tensor},
};

use crate::{Collator, Example, LlamaError};

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

pub(super) fn check_trainable<M: Module>(model: &M, device: &Device) -> Result<(), LlamaError> {
    struct AnyTrainable(bool);
    impl ModuleVisitor for AnyTrainable {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.is_require_grad();
        }
    }
    if !device.is_autodiff() {
        let hint = "the model is not on an autodiff device; load it on `device.autodiff()`";
        return Err(LlamaError::NotTrainable { hint });
    }
    let mut any = AnyTrainable(false);
    model.visit(&mut any);
    if any.0 {
        Ok(())
    } else {
        Err(LlamaError::NotTrainable { hint: "all parameters are frozen; add an adapter" })
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::{
        StepReport, fit,
        train::tests::{Bigram, autodiff, config, examples},
    };

    #[test]
    fn what_cannot_be_trained_is_an_error_before_the_first_step() {
        let never = |_: &StepReport, _: &Bigram| -> ControlFlow<()> { panic!("a step was made") };
        let fit =
            |model, examples: &[Example], config| fit(model, examples, &Collator::new(7), &config, never);
        let model = || Bigram::new(&autodiff());
        assert!(matches!(fit(model(), &[], config()), Err(LlamaError::EmptyBatch)));
        let unlabelled = [Example { input_ids: vec![1, 2], labels: vec![-100, -100] }];
        assert!(matches!(fit(model(), &unlabelled, config()), Err(LlamaError::NoLabels { index: 0 })));
        let option = |config| match fit(model(), &examples(), config) {
            Err(LlamaError::TrainingOption { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        assert_eq!(option(config().with_batch_size(0)), "batch_size");
        assert_eq!(option(config().with_epochs(0)), "epochs");
        assert_eq!(option(config().with_learning_rate(f64::NAN)), "learning_rate");
        let plain = fit(Bigram::new(&Device::flex()), &examples(), config()).unwrap_err().to_string();
        assert!(plain.contains("autodiff()"), "{plain}");
        let frozen = fit(model().no_grad(), &examples(), config()).unwrap_err().to_string();
        assert!(frozen.contains("frozen"), "{frozen}");
    }
}
