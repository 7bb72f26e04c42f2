//! `pretrain`: makes a base model as the embedded one from scratch with the same crates that fine-tune it.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, FloatDType, Tensor};
use burn_peft_llama::{
    Collator, Example, Labels, LlamaConfig, LlamaForCausalLm, Schedule, Tokenizer, Trainer, TrainingConfig,
};

use crate::base::Kind;
use crate::cli::PretrainArgs;
use crate::corpus::{Corpus, Document};
use crate::data;
use crate::forgetting::Probe;
use crate::vocabulary;
use burn_peft_examples::arguments::Precision;
use burn_peft_examples::output;
use burn_peft_examples::progress::Progress;

/// Documents that the vocabulary is trained on: 40 for each of a thousand species.
const VOCABULARY_DOCUMENTS: usize = 40_000;

/// Makes a base model and writes it to `args.out`: the files of the Hugging Face layout and `training.csv`. Nothing is
/// written before all of it is made.
pub fn run(args: &PretrainArgs) -> Result<()> {
    let device = args.device.open("pokemon", Precision::F32)?;
    let species = data::load(args.data.as_deref())?;
    make_empty_directory(&args.out)?;
    let start = Instant::now();

    let mut corpus = Corpus::new(&species, args.seed);
    let documents = (0..VOCABULARY_DOCUMENTS).map(|_| corpus.document());
    let tokenizer = vocabulary::train(documents, args.vocab_size)?;

    // Another seed than the vocabulary's, whose documents need not come again.
    let mut corpus = Corpus::new(&species, args.seed.wrapping_add(1));
    let sequences = pack(&mut corpus, &tokenizer, args.steps * args.batch_size, args.length)?;

    let config = model_config(args, &tokenizer);
    let pad = tokenizer.pad_token_id().unwrap_or_default();
    device.seed(args.seed);
    let (model, log) = train(args, config.init(&device.clone().autodiff()), sequences, pad)?;
    tokenizer.save(&args.out)?;
    output::write(&args.out.join("training.csv"), log)?;
    // Every device can hold f32, not every one f16. `config.json` comes last: where it is, everything is.
    let halved = model.valid().to_device(&Device::flex()).map(&mut Halve);
    halved.save_pretrained(&args.out)?;

    let seconds = start.elapsed().as_secs_f64();
    println!("made `{}` in {:.1} min", args.out.display(), seconds / 60.0);
    let model = LlamaForCausalLm::from_pretrained(&args.out, &device)?;
    for probe in Probe::of(Kind::Pretrained, &species) {
        let score = probe.run(&model, &tokenizer, 32)?;
        println!("{}: {:.1} % of {}", probe.name, 100.0 * score.share(), score.total);
    }
    Ok(())
}

fn make_empty_directory(dir: &Path) -> Result<()> {
    output::make_directory(dir)?;
    let used =
        fs::read_dir(dir).with_context(|| format!("`{}` cannot be read", dir.display()))?.next().is_some();
    if used {
        bail!("`{}` is not empty\nhint: remove it, or give another directory with `--out`", dir.display());
    }
    Ok(())
}

/// 8 heads, 4 of them for keys and values, and a feed-forward width of 2.7 times the model's, rounded to 16.
fn model_config(args: &PretrainArgs, tokenizer: &Tokenizer) -> LlamaConfig {
    let size = args.hidden_size;
    let mut config = LlamaConfig::new(tokenizer.vocab_size(), size, args.layers)
        .with_heads(8, 4)
        .with_intermediate_size((size * 43 / 16).next_multiple_of(16))
        .with_tie_word_embeddings(true);
    config.max_position_embeddings = 512;
    config.rms_norm_eps = 1e-5;
    config.bos_token_id = tokenizer.bos_token_id();
    config.eos_token_ids = tokenizer.eos_token_id().into_iter().collect();
    config.pad_token_id = tokenizer.pad_token_id();
    config
}

/// The corpus as `count` sequences of `length` tokens, cut without regard to where documents end: no padding.
fn pack(corpus: &mut Corpus<'_>, tokenizer: &Tokenizer, count: usize, length: usize) -> Result<Vec<Example>> {
    let mut sequences = Vec::with_capacity(count);
    let mut rest: Vec<u32> = Vec::new();
    while sequences.len() < count {
        while rest.len() < length {
            let document = match corpus.document() {
                Document::Text(text) => tokenizer.encode_document(&vocabulary::start(&text))?,
                Document::Chat(messages) => tokenizer.encode_conversation(&messages, Labels::Everything)?,
            };
            rest.extend(document.input_ids);
        }
        let input_ids: Vec<u32> = rest.drain(..length).collect();
        let labels = input_ids.iter().map(|id| i64::from(*id)).collect();
        sequences.push(Example { input_ids, labels });
    }
    Ok(sequences)
}

/// The trained model, and the log of its training as CSV.
fn train(
    args: &PretrainArgs,
    mut model: LlamaForCausalLm,
    sequences: Vec<Example>,
    pad: u32,
) -> Result<(LlamaForCausalLm, Vec<u8>)> {
    let config = TrainingConfig::new()
        .with_learning_rate(args.learning_rate)
        .with_epochs(1)
        .with_batch_size(args.batch_size)
        .with_warmup_steps(args.warmup)
        .with_schedule(Schedule::Cosine)
        .with_weight_decay(0.01)
        .with_seed(args.seed)
        .with_log_every(args.log_every);
    let mut logged = Vec::new();
    let progress = Progress::new("pretraining", args.steps);
    let mut trainer = Trainer::new(&config, sequences, &Collator::new(pad))?;
    while let Some(report) = trainer.step(&mut model)? {
        if let Some(loss) = report.loss {
            progress.report(report.step, &format!("loss {loss:.4}"));
            logged.push((
                report.step,
                format!("{:.1}", report.elapsed.as_secs_f64()),
                report.num_tokens,
                format!("{:.3e}", report.learning_rate),
                format!("{loss:.4}"),
            ));
        }
    }
    progress.finish();
    let mut log = csv::Writer::from_writer(Vec::new());
    log.write_record(["step", "seconds", "tokens", "learning_rate", "loss"])?;
    for row in logged {
        log.serialize(row)?;
    }
    Ok((model, log.into_inner()?))
}

/// Half precision: half the size of f32, with three more bits of mantissa than bfloat16 would leave.
struct Halve;

impl ModuleMapper for Halve {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(FloatDType::F16))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_base_is_made_whole_and_in_half_precision() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (data, out) = (path("species.csv"), path("base"));
        let rows = "4,Charmander,Fire,,1,Charmander\n7,Squirtle,Water,,1,Squirtle\n";
        fs::write(&data, format!("number,name,primary,secondary,generation,family\n{rows}")).unwrap();
        let small = "--steps 2 --batch-size 2 --length 32 --vocab-size 512 --hidden-size 16 --layers 1";
        let arguments = ["pokemon", "pretrain", "--log-every", "1", "--data", &data, "--out", &out];
        let cli = Cli::try_parse_from(arguments.into_iter().chain(small.split(' '))).unwrap();
        crate::run(&cli).unwrap();

        let out = Path::new(&out);
        let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut expected = vec!["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"];
        expected.extend(["tokenizer_config.json", "training.csv"]);
        assert_eq!(names.collect::<BTreeSet<_>>(), expected.into_iter().map(String::from).collect());

        let log = fs::read_to_string(out.join("training.csv")).unwrap();
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!((lines.len(), lines[0]), (3, "step,seconds,tokens,learning_rate,loss"));
        assert!(lines[2].starts_with("2,") && lines[2].split(',').nth(2) == Some("128"), "{log}");

        let model = LlamaForCausalLm::from_pretrained(out, &Device::flex()).unwrap();
        assert_eq!(Kind::of(&Tokenizer::load(out).unwrap()), Kind::Pretrained);
        let size = fs::metadata(out.join("model.safetensors")).unwrap().len() as usize;
        assert!((2 * model.num_params()..3 * model.num_params()).contains(&size), "{size}");
        assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"float16\""));

        let again = crate::run(&cli).unwrap_err().to_string();
        assert!(again.contains("is not empty") && again.contains("`--out`"), "{again}");
    }
}
