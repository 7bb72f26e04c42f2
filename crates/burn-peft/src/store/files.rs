//! The two files of an adapter directory, as they belong together.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn_peft_files::{DirectoryWriter, WrongFile, read_together};

use super::{CONFIG_FILE, TENSOR_FILE, adapter_config};
use crate::config::PeftConfig;
use crate::error::PeftError;

pub(super) const PICKLE_FILE: &str = "adapter_model.bin";

/// What can be done about a directory without an adapter.
const GIVE_ADAPTER: &str = "give the directory that PEFT's `save_pretrained` wrote";

/// The files of one adapter, read at one moment.
pub(super) struct AdapterFiles {
    pub(super) config_path: PathBuf,
    pub(super) config: Vec<u8>,
    pub(super) tensor_path: PathBuf,
    tensors: std::io::Result<Vec<u8>>,
}

impl AdapterFiles {
    /// Reads both files. Missing tensors become an error only in [`tensors`](Self::tensors).
    ///
    /// # Errors
    /// [`PeftError::NoAdapter`] if there is no configuration, [`PeftError::Io`].
    pub(super) fn read(directory: &Path) -> Result<Self, PeftError> {
        let (config_path, tensor_path) = (directory.join(CONFIG_FILE), directory.join(TENSOR_FILE));
        let [config, tensors] =
            read_together(directory, [CONFIG_FILE, TENSOR_FILE]).map_err(PeftError::io(directory))?;
        let config = config.map_err(|error| unread_config(directory, error))?;
        Ok(Self { config_path, config, tensor_path, tensors })
    }

    /// The tensor file.
    ///
    /// # Errors
    /// [`PeftError::NoAdapter`] if there is none, or only a pickle; [`PeftError::Io`].
    pub(super) fn tensors(&mut self) -> Result<Vec<u8>, PeftError> {
        let tensors = std::mem::replace(&mut self.tensors, Ok(vec![]));
        tensors.map_err(|error| match error.kind() {
            ErrorKind::NotFound => no_tensors(self.tensor_path.parent().unwrap_or(Path::new("."))),
            _ => PeftError::io(&self.tensor_path)(error),
        })
    }
}

impl PeftConfig {
    /// Reads `adapter_config.json` of an adapter directory. PEFT's `PeftConfig.from_pretrained`.
    ///
    /// [`AdapterDirectory`](crate::AdapterDirectory) also tells what is wrong with a configuration that is refused here.
    ///
    /// # Errors
    /// - [`PeftError::NoAdapter`], [`PeftError::Io`], [`PeftError::Json`]: the file
    /// - [`PeftError::UnsupportedConfig`] with every entry that asks for something that is not computed here
    pub fn from_pretrained(directory: impl AsRef<Path>) -> Result<Self, PeftError> {
        let directory = directory.as_ref();
        let path = directory.join(CONFIG_FILE);
        let [config] = read_together(directory, [CONFIG_FILE]).map_err(PeftError::io(directory))?;
        let config = config.map_err(|error| unread_config(directory, error))?;
        Ok(adapter_config::from_json(&config, &path)?.0)
    }

    /// Writes `adapter_config.json` into a directory, which is created if need be. PEFT's `save_pretrained` of a
    /// configuration.
    ///
    /// # Errors
    /// [`PeftError::Io`].
    pub fn save_pretrained(&self, directory: impl AsRef<Path>) -> Result<(), PeftError> {
        let directory = directory.as_ref();
        let path = directory.join(CONFIG_FILE);
        let config = adapter_config::to_json(self, &path)?;
        let writer = DirectoryWriter::open(directory).map_err(PeftError::io(directory))?;
        let staged = writer.stage_bytes(CONFIG_FILE, &config).map_err(PeftError::io(&path))?;
        staged.put().map_err(PeftError::io(&path))
    }
}

fn unread_config(directory: &Path, error: std::io::Error) -> PeftError {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => no_config(directory),
        _ => PeftError::io(directory.join(CONFIG_FILE))(error),
    }
}

/// The error about a file that could not be made sense of: that it is not what its name says, or else `error`.
pub(super) fn unreadable(path: &Path, bytes: &[u8], error: PeftError) -> PeftError {
    match WrongFile::detect(bytes) {
        Some(found) => PeftError::NotTheFile { path: path.into(), found },
        None => error,
    }
}

/// What a directory without a configuration is instead.
fn no_config(directory: &Path) -> PeftError {
    let no = |reason: &str, hint: String| PeftError::NoAdapter {
        path: directory.into(),
        reason: reason.into(),
        hint,
    };
    if directory.is_file() {
        return no("it is a file", format!("give the directory that it is in; {GIVE_ADAPTER}"));
    }
    if !directory.exists() {
        return no("there is no such directory", GIVE_ADAPTER.into());
    }
    let has = |name: &str| directory.join(name).exists();
    let inside = adapters_inside(directory);
    if !inside.is_empty() {
        let hint = format!("give one of its sub-directories: {}", inside.join(", "));
        return no(&format!("there is no `{CONFIG_FILE}`"), hint);
    }
    if has("adapters.safetensors") || has("adapters.npz") {
        return no("it is an adapter of mlx-lm, which has a format of its own", MLX_HINT.into());
    }
    if has("pytorch_lora_weights.safetensors") {
        let hint = "load it in diffusers and save it with PEFT's `save_pretrained`";
        return no("it is a LoRA of diffusers, which has a format of its own", hint.into());
    }
    if has("config.json") {
        return no(
            "it holds a whole model",
            format!("give it as the base model; for the adapter, {GIVE_ADAPTER}"),
        );
    }
    no(&format!("there is no `{CONFIG_FILE}`"), GIVE_ADAPTER.into())
}

/// What can be done about an adapter of mlx-lm.
pub(super) const MLX_HINT: &str = "fold it into its model with `mlx_lm.fuse --model MODEL --adapter-path DIRECTORY` and use the fused model";

fn no_tensors(directory: &Path) -> PeftError {
    let no = |reason: String, hint: &str| PeftError::NoAdapter {
        path: directory.into(),
        reason,
        hint: hint.into(),
    };
    if directory.join(PICKLE_FILE).exists() {
        return no(
            format!("`{PICKLE_FILE}` is a pickle, which can run code when it is read"),
            "load it in Python and save it again with `safe_serialization=True`",
        );
    }
    no(format!("there is no `{TENSOR_FILE}`"), GIVE_ADAPTER)
}

/// The names of the sub-directories with adapters, a few of them, sorted.
fn adapters_inside(directory: &Path) -> Vec<String> {
    const SHOWN: usize = 8;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join(CONFIG_FILE).exists())
        .map(|entry| format!("`{}`", entry.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.truncate(SHOWN);
    names
}
