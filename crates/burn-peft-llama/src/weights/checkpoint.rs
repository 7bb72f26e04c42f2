//! The tensors of a checkpoint: where they lie, whether they fit, what they hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{
    Dtype, SafeTensorError,
    tensor::{Metadata, TensorInfo},
};

use super::{WeightProblem, index::WeightFiles, parameter::Parameter};
use crate::LlamaError;

/// Longest header that is read, in bytes; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// The files of a checkpoint and where each tensor lies.
pub(super) struct Checkpoint {
    files: Vec<WeightsFile>,
    tensors: BTreeMap<String, Entry>,
    /// The file to name in errors about the whole.
    path: PathBuf,
}

struct WeightsFile {
    path: PathBuf,
    file: File,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    /// Position in the file, in bytes.
    offset: u64,
    info: TensorInfo,
}

impl Checkpoint {
    /// Opens the files of a model directory and reads their headers.
    pub(super) fn open(dir: &Path) -> Result<Self, LlamaError> {
        Self::of(WeightFiles::find(dir)?)
    }

    fn of(WeightFiles { path, files }: WeightFiles) -> Result<Self, LlamaError> {
        let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new(), path };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    /// Reads the header of a file.
    fn add(&mut self, path: PathBuf) -> Result<(), LlamaError> {
        let hint = "expected weights as `model.safetensors` or as shards with `model.safetensors.index.json`";
        let failed = |source| LlamaError::ReadText { path: path.clone(), source, hint };
        let malformed = |source| LlamaError::WeightsFile { path: path.clone(), source };
        let mut file = File::open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(malformed(SafeTensorError::HeaderTooSmall));
        }
        file.read_exact(&mut prefix).map_err(failed)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER {
            return Err(malformed(SafeTensorError::HeaderTooLarge));
        }
        if header_length > length - 8 {
            return Err(malformed(SafeTensorError::InvalidHeaderLength));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|source| malformed(SafeTensorError::InvalidHeaderDeserialization(source)))?;
        let start = 8 + header_length;
        let expected = start.saturating_add(metadata.data_len() as u64);
        if expected != length {
            return Err(LlamaError::WeightsLength { path, expected, found: length });
        }
        let index = self.files.len();
        for (name, info) in metadata.tensors() {
            let offset = start + info.data_offsets.0 as u64;
            self.tensors.insert(name, Entry { file: index, offset, info: info.clone() });
        }
        self.files.push(WeightsFile { path, file });
        Ok(())
    }

    /// Compares the files with what the model needs.
    pub(super) fn check(&mut self, parameters: &[Parameter], tied: bool) -> Result<(), LlamaError> {
        self.tensors
            .retain(|name, _| !(name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight")));
        let (mut problems, mut missing) = (Vec::new(), Vec::new());
        for Parameter { name, shape, .. } in parameters {
            let name = name.clone();
            match self.tensors.get(&name) {
                None => missing.push(WeightProblem::Missing { name }),
                Some(Entry { info, .. }) if info.shape != *shape => {
                    let (expected, found) = (shape.clone(), info.shape.clone());
                    problems.push(WeightProblem::Shape { name, expected, found });
                }
                Some(Entry { info, .. }) if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                    problems.push(WeightProblem::Type { name, found: info.dtype.to_string() });
                }
                Some(_) => {}
            }
        }
        let known: BTreeSet<&str> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        let unexpected = self.tensors.keys().filter(|name| !known.contains(name.as_str()));
        for (i, name) in unexpected.enumerate() {
            // Comparing every name with every other takes long, and nobody reads that many.
            let nearest = if i < 20 { nearest(name, &known) } else { None };
            problems.push(WeightProblem::Unexpected { name: name.clone(), nearest });
        }
        problems.append(&mut missing);
        match problems.is_empty() {
            true => Ok(()),
            false => Err(LlamaError::Weights { path: self.path.clone(), problems }),
        }
    }

    /// The numbers of a tensor that [`check`](Self::check) has seen.
    pub(super) fn read(&mut self, name: &str) -> Result<Vec<f32>, LlamaError> {
        let Some(Entry { file, offset, info }) = self.tensors.get(name) else {
            let problems = vec![WeightProblem::Missing { name: name.to_owned() }];
            return Err(LlamaError::Weights { path: self.path.clone(), problems });
        };
        let WeightsFile { path, file } = &mut self.files[*file];
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        let hint = "the file changed while it was read";
        file.seek(SeekFrom::Start(*offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| LlamaError::ReadText { path: path.clone(), source, hint })?;
        let two = |bytes: &[u8]| [bytes[0], bytes[1]];
        Ok(match info.dtype {
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(two(b)).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(two(b)).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        })
    }
}

/// The most similar of `names`, if it is similar at all.
fn nearest(name: &str, names: &BTreeSet<&str>) -> Option<String> {
    let similarity = |other: &str| strsim::normalized_levenshtein(name, other);
    let best = names.iter().map(|other| (similarity(other), other)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.6).then(|| (*best.1).to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use burn::tensor::Device;

    use super::*;
    use crate::{
        LlamaForCausalLm,
        weights::{
            index::WEIGHTS_FILE,
            tests::{config, logits, saved},
        },
    };

    /// The tensors of a file in f32, in file order.
    pub(in crate::weights) fn read(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let files = WeightFiles { path: path.to_owned(), files: vec![path.to_owned()] };
        let mut checkpoint = Checkpoint::of(files).unwrap();
        let names: Vec<_> =
            checkpoint.tensors.iter().map(|(name, e)| (name.clone(), e.info.shape.clone())).collect();
        names
            .into_iter()
            .map(|(name, shape)| (name.clone(), shape, checkpoint.read(&name).unwrap()))
            .collect()
    }

    pub(in crate::weights) fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)], dtype: Dtype) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| match dtype {
                Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                Dtype::I32 => values.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
            (name.clone(), view)
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    #[test]
    fn all_problems_come_in_one_error_with_the_nearest_name() {
        let (dir, _) = saved(&config());
        let path = dir.path().join(WEIGHTS_FILE);
        let mut tensors = read(&path);
        for tensor in &mut tensors {
            match tensor.0.as_str() {
                "model.layers.0.self_attn.q_proj.weight" => {
                    tensor.0 = "model.layers.0.self_attn.q_prj.weight".to_owned();
                }
                "model.layers.1.mlp.up_proj.weight" => tensor.1 = vec![8, 12],
                _ => {}
            }
        }
        write(&path, &tensors, Dtype::F32);
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
        let text = error.to_string();
        let LlamaError::Weights { problems, .. } = error else { panic!("{text}") };
        assert_eq!(problems.len(), 3, "{text}");
        for line in [
            "`model.layers.0.self_attn.q_proj.weight` is missing",
            "`model.layers.0.self_attn.q_prj.weight` is unexpected; the nearest name is \
             `model.layers.0.self_attn.q_proj.weight`",
            "`model.layers.1.mlp.up_proj.weight`: expected shape [12, 8], found [8, 12]",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
        tensors.retain(|tensor| tensor.0 == "model.norm.weight");
        write(&path, &tensors, Dtype::I32);
        let text = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err().to_string();
        assert!(text.contains("`model.norm.weight`: expected f32, f16 or bf16, found I32"), "{text}");
        assert!(text.contains("and ") && text.contains(" more"), "{text}");
    }

    #[test]
    fn relics_of_old_files_are_ignored() {
        let (dir, model) = saved(&config().with_tie_word_embeddings(true));
        let path = dir.path().join(WEIGHTS_FILE);
        let mut tensors = read(&path);
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![1], vec![9.0]));
        tensors.push(("lm_head.weight".to_owned(), vec![11, 8], vec![9.0; 88]));
        write(&path, &tensors, Dtype::F32);
        let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));
    }

    #[test]
    fn malformed_files_are_errors() {
        let (dir, _) = saved(&config());
        let path = dir.path().join(WEIGHTS_FILE);
        let bytes = fs::read(&path).unwrap();
        let load = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err()
        };
        assert!(matches!(load(&bytes[..bytes.len() - 1]), LlamaError::WeightsLength { .. }));
        assert!(matches!(load(&bytes[..100]), LlamaError::WeightsFile { .. }));
        assert!(matches!(load(&[1, 2]), LlamaError::WeightsFile { .. }));
        assert!(matches!(load(&[0xff; 16]), LlamaError::WeightsFile { .. }));
        assert!(matches!(load(b"\x04\0\0\0\0\0\0\0nope"), LlamaError::WeightsFile { .. }));
        fs::remove_file(&path).unwrap();
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("hint: expected weights as"), "{error}");
    }
}
