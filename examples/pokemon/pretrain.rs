//! `pretrain`: makes the base model from scratch with the same crates that fine-tune it.
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn_peft_llama::{
    Collator, Example, Labels, LlamaConfig, LlamaForCausalLm, RopeConfig, Schedule, Tokenizer,
    TrainingConfig, fit,
};
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::cli::PretrainArgs;
use crate::corpus::{Corpus, Document};
use crate::data;
use crate::forgetting::Probe;
use crate::progress::Progress;
use crate::vocabulary;

/// Documents that the vocabulary is trained on: 40 for each of a thousand species.
const VOCABULARY_DOCUMENTS: usize = 40_000;

/// Makes a base model and writes it to `args.out`: the files of the Hugging Face layout and `training.csv`.
pub fn run(args: &PretrainArgs) -> Result<()> {
    let device = args.device.open()?;
    let species = data::load(args.data.as_deref())?;
    make_empty_directory(&args.out)?;
    let start = Instant::now();

    let mut corpus = Corpus::new(&species, args.seed);
    let documents = (0..VOCABULARY_DOCUMENTS).map(|_| corpus.document());
    let tokenizer = vocabulary::train(documents, args.vocab_size)?;
    tokenizer.save(&args.out)?;

    // Another seed than the vocabulary's, whose documents need not come again.
    let mut corpus = Corpus::new(&species, args.seed.wrapping_add(1));
    let sequences = pack(&mut corpus, &tokenizer, args.steps * args.batch_size, args.length)?;

    let config = model_config(args, &tokenizer);
    let pad = tokenizer.pad_token_id().unwrap_or_default();
    device.seed(args.seed);
    let model = train(args, config.init(&device.clone().autodiff()), &sequences, pad)?;
    model.save_pretrained(&args.out)?;
    halve(&args.out)?;

    let seconds = start.elapsed().as_secs_f64();
    println!("made `{}` in {:.1} min", args.out.display(), seconds / 60.0);
    let model = LlamaForCausalLm::from_pretrained(&args.out, &device)?;
    for probe in Probe::of_the_embedded_base(&species, 0) {
        let score = probe.run(&model, &tokenizer, 32)?;
        println!("{}: {:.1} % of {}", probe.name, 100.0 * score.share(), score.total);
    }
    Ok(())
}

fn make_empty_directory(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("`{}` cannot be made", dir.display()))?;
    let used =
        fs::read_dir(dir).with_context(|| format!("`{}` cannot be read", dir.display()))?.next().is_some();
    if used {
        bail!("`{}` is not empty\nhint: remove it, or give another directory with `--out`", dir.display());
    }
    Ok(())
}

/// 8 heads, 4 of them for keys and values, and a feed-forward width of 2.7 times the model's, rounded to 16.
fn model_config(args: &PretrainArgs, tokenizer: &Tokenizer) -> LlamaConfig {
    LlamaConfig {
        vocab_size: tokenizer.vocab_size(),
        hidden_size: args.hidden_size,
        intermediate_size: (args.hidden_size * 43 / 16).next_multiple_of(16),
        num_hidden_layers: args.layers,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: args.hidden_size / 8,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope: RopeConfig::default(),
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        bos_token_id: tokenizer.bos_token_id(),
        eos_token_ids: tokenizer.eos_token_id().into_iter().collect(),
        pad_token_id: tokenizer.pad_token_id(),
        initializer_range: 0.02,
    }
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

fn train(
    args: &PretrainArgs,
    model: LlamaForCausalLm,
    sequences: &[Example],
    pad: u32,
) -> Result<LlamaForCausalLm> {
    let config = TrainingConfig::new()
        .with_learning_rate(args.learning_rate)
        .with_epochs(1)
        .with_batch_size(args.batch_size)
        .with_warmup_steps(args.warmup)
        .with_schedule(Schedule::Cosine)
        .with_weight_decay(0.01)
        .with_seed(args.seed)
        .with_log_every(args.log_every);
    let mut log = csv::Writer::from_path(args.out.join("training.csv"))?;
    log.write_record(["step", "seconds", "tokens", "learning_rate", "loss"])?;
    let progress = Progress::new("pretraining", args.steps);
    let mut written = Ok(());
    let model = fit(model, sequences, &Collator::new(pad), &config, |report, _| {
        let Some(loss) = report.loss else { return ControlFlow::Continue(()) };
        progress.report(report.step, &format!("loss {loss:.4}"));
        let seconds = report.elapsed.as_secs_f64();
        let rate = report.learning_rate;
        written = log
            .serialize((
                report.step,
                format!("{seconds:.1}"),
                report.num_tokens,
                format!("{rate:.3e}"),
                format!("{loss:.4}"),
            ))
            .and_then(|()| Ok(log.flush()?));
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    progress.finish();
    written?;
    Ok(model)
}

/// Rewrites the weights in half precision: half the size, with three more bits of mantissa than bfloat16 would leave.
fn halve(dir: &Path) -> Result<()> {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let mut halved = Vec::new();
    for (name, view) in tensors.iter() {
        if view.dtype() != Dtype::F32 {
            bail!("`{name}` is {:?}, expected F32", view.dtype());
        }
        let data: Vec<u8> = view
            .data()
            .chunks_exact(4)
            .flat_map(|b| f16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes())
            .collect();
        halved.push((name.to_string(), view.shape().to_vec(), data));
    }
    let views = halved
        .iter()
        .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F16, shape.clone(), data)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    fs::write(&path, safetensors::serialize(views, Some(metadata))?)?;

    let path = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    config["dtype"] = "float16".into();
    fs::write(&path, format!("{config:#}\n"))?;
    Ok(())
}
