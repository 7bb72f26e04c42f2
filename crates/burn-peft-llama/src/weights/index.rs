//! Which files hold the weights of a model directory: one, or the shards that an index lists.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::LlamaError;
use crate::file;

pub(super) const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The files of weights of a model directory.
pub(super) struct WeightFiles {
    /// The file to name in errors about the whole: the only one, or the index.
    pub(super) path: PathBuf,
    pub(super) files: Vec<PathBuf>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Finds the files of `dir`; that they exist is seen when they are opened.
    pub(super) fn find(dir: &Path) -> Result<Self, LlamaError> {
        let index = dir.join(INDEX_FILE);
        let single = dir.join(WEIGHTS_FILE);
        // Like transformers: the single file goes first.
        let text = if single.exists() {
            None
        } else {
            file::read_optional(&index, "it lists the files of weights")?
        };
        let Some(text) = text else {
            return Ok(Self { path: single.clone(), files: vec![single] });
        };
        let json: Index = file::parse(&index, &text, |path, source| LlamaError::ConfigJson { path, source })?;
        let mut names: Vec<String> = json.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            let mut components = Path::new(&name).components();
            let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
            if !plain || name.contains(['/', '\\']) {
                return Err(LlamaError::ShardName { path: index, name });
            }
            files.push(dir.join(name));
        }
        Ok(Self { path: index, files })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::tensor::Device;
    use safetensors::Dtype;
    use serde_json::json;

    use super::*;
    use crate::model::LlamaForCausalLm;
    use crate::weights::checkpoint::tests::{read, write};
    use crate::weights::tests::{config, logits, saved};

    #[test]
    fn shards_load_and_may_not_leave_the_directory() {
        let (dir, model) = saved(&config());
        let single = dir.path().join(WEIGHTS_FILE);
        let tensors = read(&single);
        fs::remove_file(&single).unwrap();
        let (first, second) = tensors.split_at(9);
        write(&dir.path().join("a.safetensors"), first, Dtype::F32);
        write(&dir.path().join("b.safetensors"), second, Dtype::F32);
        let mut map = json!({});
        for (tensors, file) in [(first, "a.safetensors"), (second, "b.safetensors")] {
            for (name, _, _) in tensors {
                map[name] = json!(file);
            }
        }
        let index = |map: &serde_json::Value| {
            let text = json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string();
            fs::write(dir.path().join(INDEX_FILE), text).unwrap();
        };
        index(&map);
        let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));

        for name in ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", ""] {
            map["model.norm.weight"] = json!(name);
            index(&map);
            let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
            assert!(matches!(&error, LlamaError::ShardName { name: found, .. } if found == name), "{error}");
        }
        map["model.norm.weight"] = json!("c.safetensors");
        index(&map);
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("c.safetensors"), "{error}");
    }
}
