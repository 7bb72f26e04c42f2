//! Batches of questions in one row, on trained models: the experiment's base and, if `BURN_PEFT_SMOLLM2` names its
//! directory, SmolLM2-135M-Instruct.

use std::path::PathBuf;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use burn_peft::{InitLoraWeights, LoraConfig, PeftModel, TargetModules};
use burn_peft_llama::{Collator, Example, Labels, LlamaForCausalLm, Message, Packing, Tokenizer};
use burn_peft_tests::parameters::with_fixed_factors;
use burn_peft_tests::tolerance::{PACKED_GRADIENT, PACKED_LOSS, assert_close, assert_close_number};

/// Questions that begin alike, with answers of so different lengths that it pays to leave padding out.
fn examples(tokenizer: &Tokenizer) -> Vec<Example> {
    let answers = [
        ("Pikachu", "Electric"),
        ("Bulbasaur", "Grass, Poison"),
        ("Ho-Oh", "Fire, Flying, and that is all there is to say about the types of this legendary bird"),
        ("Mew", "Psychic"),
    ];
    let example = |(name, answer): (&str, &str)| {
        let question =
            format!("Answer with one or two types and nothing else. What are the types of {name}?");
        let system = Message::system("You know all about Pokémon.");
        let conversation = [system, Message::user(question), Message::assistant(answer)];
        tokenizer.encode_conversation(&conversation, Labels::LastAnswer).unwrap()
    };
    answers.map(example).into()
}

/// The loss, and the gradients of all parameters that have one.
fn results(model: &LlamaForCausalLm, examples: &[Example], packing: Packing) -> (f32, Vec<f32>) {
    struct Read(Gradients, Vec<f32>);
    impl ModuleVisitor for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = param.base().grad(&self.0);
            self.1.extend(
                gradient.into_iter().flat_map(|tensor| tensor.into_data().iter::<f32>().collect::<Vec<_>>()),
            );
        }
    }
    let batch = Collator::new(0).with_packing(packing).collate(examples, &model.devices()[0]).unwrap();
    assert_eq!(batch.packed.is_some(), packing != Packing::Padded, "{packing:?}");
    if let Some(packed) = &batch.packed {
        println!(
            "{packing:?}: {} of {} positions",
            packed.tree.len(),
            batch.shape().iter().product::<usize>()
        );
    }
    let loss = model.loss(&batch);
    let mut read = Read(loss.clone().backward(), vec![]);
    model.visit(&mut read);
    (loss.into_scalar(), read.1)
}

/// With gradient checkpointing as well.
#[test]
fn a_packed_batch_has_the_loss_and_gradients_of_padded_rows() {
    let mut bases = vec![PathBuf::from("../examples/pokemon/base")];
    match std::env::var_os("BURN_PEFT_SMOLLM2") {
        Some(path) => bases.push(path.into()),
        None => println!("SmolLM2 skipped: `BURN_PEFT_SMOLLM2` is not set"),
    }
    for base in bases {
        let device = Device::default().autodiff();
        let mut model = LlamaForCausalLm::from_pretrained(&base, &device).unwrap();
        let config = LoraConfig::new(8)
            .with_lora_alpha(2.0)
            .with_target_modules(TargetModules::AllLinear)
            .with_init_lora_weights(InitLoraWeights::Random);
        model.add_adapter("default", &config).unwrap();
        let mut model = with_fixed_factors(model, "default");
        let examples = examples(&Tokenizer::load(&base).unwrap());
        let (expected_loss, expected) = results(&model, &examples, Packing::Padded);
        assert!(expected.iter().any(|gradient| gradient.abs() > 1e-3));
        for (packing, is_checkpointing) in [
            (Packing::Padded, true),
            (Packing::Packed, false),
            (Packing::SharedPrefix, false),
            (Packing::SharedPrefix, true),
        ] {
            model.set_gradient_checkpointing(is_checkpointing);
            let (loss, found) = results(&model, &examples, packing);
            let case = format!("{}, {packing:?}, checkpointing: {is_checkpointing}", base.display());
            let loss = assert_close_number(&case, loss.into(), expected_loss.into(), PACKED_LOSS);
            let data = |gradients: &[f32]| TensorData::new(gradients.to_vec(), [gradients.len()]);
            let gradients = assert_close(&case, &data(&found), &data(&expected), PACKED_GRADIENT);
            println!("{case}: loss {loss:.1e} off, gradients {gradients:.1e}");
        }
    }
}
