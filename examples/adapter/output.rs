//! The directory of a merged model: all of it, or nothing.
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn_peft_files::StagedDirectory;
use burn_peft_llama::LlamaForCausalLm;
use serde_json::{Map, Value, json};

const CONFIG_FILE: &str = "config.json";

/// Files beside the weights that a merged model shares with its base: the tokenizer's, and what generation needs.
const SHARED_FILES: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// A place for a model directory.
pub struct Output {
    directory: PathBuf,
}

impl Output {
    /// # Errors
    /// `directory` exists and holds something, or no directory can be made there.
    pub fn new(directory: &Path) -> Result<Self> {
        let shown = directory.display();
        match std::fs::read_dir(directory).map(|mut entries| entries.next().is_some()) {
            Ok(false) => {}
            Ok(true) => {
                bail!("`{shown}` is not empty\nhint: give `--out` a directory that does not exist yet")
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot write to `{shown}`")),
        }
        let output = Self { directory: directory.into() };
        // A place that cannot be written to shows here, before the work.
        output.stage()?;
        Ok(output)
    }

    /// An empty directory beside the place, removed again unless it is moved there.
    fn stage(&self) -> Result<StagedDirectory> {
        let context = || format!("cannot write beside `{}`", self.directory.display());
        StagedDirectory::beside(&self.directory).with_context(context)
    }

    /// Writes `model` with the files that it shares with `base`, and returns the names and sizes of all files. The
    /// directory appears when it is complete.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn write(&self, model: &LlamaForCausalLm, dtype: &str, base: &Path) -> Result<Vec<(String, u64)>> {
        let staged = self.stage()?;
        let path = staged.path();
        model.save_pretrained(path)?;
        for name in SHARED_FILES.iter().filter(|name| base.join(name).exists()) {
            let context = || format!("cannot copy `{}`", base.join(name).display());
            std::fs::copy(base.join(name), path.join(name)).with_context(context)?;
        }
        write_config(base, path, dtype, model.config().tie_word_embeddings)?;
        let context = || format!("cannot write to `{}`", self.directory.display());
        let mut files = vec![];
        for entry in std::fs::read_dir(path).with_context(context)? {
            let entry = entry.with_context(context)?;
            let size = entry.metadata().with_context(context)?.len();
            files.push((entry.file_name().to_string_lossy().into_owned(), size));
        }
        files.sort();
        staged.put().with_context(context)?;
        Ok(files)
    }
}

/// The base's own configuration, entries of other programs included, with what merging changed.
fn write_config(base: &Path, directory: &Path, dtype: &str, tied: bool) -> Result<()> {
    let path = base.join(CONFIG_FILE);
    let context = || format!("cannot read `{}`", path.display());
    let text = std::fs::read_to_string(&path).with_context(context)?;
    let mut config: Map<String, Value> = serde_json::from_str(&text).with_context(context)?;
    // Until transformers 5 the key was `torch_dtype`: whoever reads the base should read the merged model.
    let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    config.insert(key.into(), json!(dtype));
    config.insert("tie_word_embeddings".into(), json!(tied));
    let text = format!("{:#}\n", Value::Object(config));
    let path = directory.join(CONFIG_FILE);
    std::fs::write(&path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
