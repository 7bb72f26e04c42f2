//! The tensors of a checkpoint: where they lie, whether they fit, what they hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use burn_peft_files::WrongFile;
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::index::{WEIGHTS_FILE, WeightFiles};
use super::parameter::Parameter;
use crate::error::LlamaError;
use crate::file;
use crate::problem::WeightProblem;

/// Longest header that is read, in bytes; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

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
        let mut checkpoint = Self { files: vec![], tensors: BTreeMap::new(), path };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    /// Reads the header of a file.
    fn add(&mut self, path: PathBuf) -> Result<(), LlamaError> {
        let hint = file::hint_for(path.parent().unwrap_or(&path), WEIGHTS_FILE);
        let failed = |source| LlamaError::ReadText { path: path.clone(), source, hint };
        let mut file = File::open(&path).map_err(failed)?;
        let (metadata, start) = match read_header(&path, &mut file, hint) {
            Ok(header) => header,
            Err(error) => {
                let mut beginning = vec![];
                file.rewind()
                    .and_then(|()| file.take(512).read_to_end(&mut beginning))
                    .map_err(|source| LlamaError::ReadText { path: path.clone(), source, hint })?;
                return Err(match WrongFile::detect(&beginning) {
                    Some(found) => LlamaError::WrongFile { path, found },
                    None => error,
                });
            }
        };
        let index = self.files.len();
        for (name, info) in metadata.tensors() {
            let offset = start + info.data_offsets.0 as u64;
            self.tensors.insert(name, Entry { file: index, offset, info: info.clone() });
        }
        self.files.push(WeightsFile { path, file });
        Ok(())
    }

    /// Whether a model whose configuration ties its output layer to the embedding is to be tied, by the tensors that
    /// are there; see [`from_pretrained_as`](crate::LlamaForCausalLm::from_pretrained_as).
    pub(super) fn resolve_tied_head(&mut self) -> Result<bool, LlamaError> {
        let Some(head) = self.tensors.get(HEAD).cloned() else { return Ok(true) };
        let tied = match self.tensors.get(EMBEDDING).cloned() {
            Some(embedding) => self.are_equal(&head, &embedding)?,
            None => {
                self.tensors.insert(EMBEDDING.to_string(), head);
                true
            }
        };
        if tied {
            self.tensors.remove(HEAD);
        }
        Ok(tied)
    }

    /// Whether two tensors have the same numbers. As in torch, NaN is none of them.
    fn are_equal(&mut self, a: &Entry, b: &Entry) -> Result<bool, LlamaError> {
        // They can be gigabytes.
        const PIECE: usize = 1 << 18;
        if a.info.shape != b.info.shape || !is_read(a.info.dtype) || !is_read(b.info.dtype) {
            return Ok(false);
        }
        let count: usize = a.info.shape.iter().product();
        for start in (0..count).step_by(PIECE) {
            let end = (start + PIECE).min(count);
            if self.numbers(a, start, end)? != self.numbers(b, start, end)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Compares the files with what the model needs.
    pub(super) fn check(&mut self, parameters: &[Parameter]) -> Result<(), LlamaError> {
        self.tensors.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
        let (mut problems, mut missing) = (vec![], vec![]);
        for Parameter { name, shape, .. } in parameters {
            let name = name.clone();
            match self.tensors.get(&name) {
                None => missing.push(WeightProblem::Missing { name }),
                Some(Entry { info, .. }) if info.shape != *shape => {
                    let (expected, found) = (shape.clone(), info.shape.clone());
                    problems.push(WeightProblem::Shape { name, expected, found });
                }
                Some(Entry { info, .. }) if !is_read(info.dtype) => {
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
        if problems.is_empty() {
            Ok(())
        } else {
            Err(LlamaError::Weights { path: self.path.clone(), problems })
        }
    }

    /// The numbers of a tensor that [`check`](Self::check) has seen.
    pub(super) fn read(&mut self, name: &str) -> Result<Vec<f32>, LlamaError> {
        let Some(entry) = self.tensors.get(name).cloned() else {
            let problems = vec![WeightProblem::Missing { name: name.to_string() }];
            return Err(LlamaError::Weights { path: self.path.clone(), problems });
        };
        let count = entry.info.shape.iter().product();
        self.numbers(&entry, 0, count)
    }

    /// The numbers of a tensor from `start` up to but not including `end`.
    fn numbers(&mut self, entry: &Entry, start: usize, end: usize) -> Result<Vec<f32>, LlamaError> {
        let dtype = entry.info.dtype;
        let size = dtype.bitsize() / 8;
        let WeightsFile { path, file } = &mut self.files[entry.file];
        let mut bytes = vec![0; (end - start) * size];
        let hint = "the file changed while it was read";
        file.seek(SeekFrom::Start(entry.offset + (start * size) as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| LlamaError::ReadText { path: path.clone(), source, hint })?;
        let two = |bytes: &[u8]| [bytes[0], bytes[1]];
        Ok(match dtype {
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(two(b)).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(two(b)).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        })
    }
}

/// Reads the header of a safetensors file; the tensors begin at the position behind it.
fn read_header(path: &Path, file: &mut File, hint: &'static str) -> Result<(Metadata, u64), LlamaError> {
    let failed = |source| LlamaError::ReadText { path: path.into(), source, hint };
    let malformed = |source| LlamaError::WeightsFile { path: path.into(), source };
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
    if expected == length {
        Ok((metadata, start))
    } else {
        Err(LlamaError::WeightsLength { path: path.into(), expected, found: length })
    }
}

/// Whether tensors of this type are read.
fn is_read(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The most similar of `names`, if it is similar at all.
fn nearest(name: &str, names: &BTreeSet<&str>) -> Option<String> {
    let similarity = |other: &str| strsim::normalized_levenshtein(name, other);
    let best = names.iter().map(|other| (similarity(other), other)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.6).then(|| (*best.1).to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use burn::tensor::Device;

    use super::*;
    use crate::config::LlamaConfig;
    use crate::model::LlamaForCausalLm;
    use crate::weights::tests::{config, logits, saved};

    /// The tensors of a file in f32, in file order.
    pub(in crate::weights) fn read(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let files = WeightFiles { path: path.into(), files: vec![path.into()] };
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
                    tensor.0 = "model.layers.0.self_attn.q_prj.weight".to_string();
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
        let (dir, model) = saved(&config());
        let path = dir.path().join(WEIGHTS_FILE);
        let mut tensors = read(&path);
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_string(), vec![1], vec![9.0]));
        write(&path, &tensors, Dtype::F32);
        let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));
    }

    #[test]
    fn a_head_beside_tied_embeddings_counts_where_it_differs() {
        let (dir, tied) = saved(&config().with_tie_word_embeddings(true));
        let path = dir.path().join(WEIGHTS_FILE);
        let load = |tensors: &[(String, Vec<usize>, Vec<f32>)], dtype: Dtype| {
            write(&path, tensors, dtype);
            LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex())
        };
        let tensors = read(&path);
        let embedding = tensors.iter().position(|tensor| tensor.0 == EMBEDDING).unwrap();
        let head = |change: fn(&mut Vec<f32>)| {
            let mut values = tensors[embedding].2.clone();
            change(&mut values);
            (HEAD.to_string(), vec![11, 8], values)
        };
        let with = |head: (String, Vec<usize>, Vec<f32>)| [tensors.clone(), vec![head]].concat();

        let equal = load(&with(head(|_| {})), Dtype::F32).unwrap();
        assert!(equal.lm_head.is_none() && equal.config().tie_word_embeddings);
        assert_eq!(logits(&equal), logits(&tied));

        // The last number alone, by as little as the type of the file can tell.
        let last = |values: &mut Vec<f32>| values[87] = f32::from_bits(values[87].to_bits() + 1);
        let own = load(&with(head(last)), Dtype::F32).unwrap();
        assert!(own.lm_head.is_some() && !own.config().tie_word_embeddings);
        assert!(LlamaConfig::load(dir.path()).unwrap().tie_word_embeddings);
        let half = load(&with(head(last)), Dtype::BF16).unwrap();
        assert!(half.lm_head.is_none(), "equal in the file");

        let doubled = |values: &mut Vec<f32>| values.iter_mut().for_each(|value| *value *= 2.0);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let own = load(&with(head(doubled)), dtype).unwrap();
            let same = load(&tensors, dtype).unwrap();
            for (own, tied) in logits(&own).iter().zip(logits(&same)) {
                assert!((own - 2.0 * tied).abs() <= 1e-5 * tied.abs(), "{own} {tied}");
            }
            let again = tempfile::tempdir().unwrap();
            own.save_pretrained(again.path()).unwrap();
            let again = LlamaForCausalLm::from_pretrained(again.path(), &Device::flex()).unwrap();
            assert_eq!(logits(&again), logits(&own));
        }

        let not_a_number = |values: &mut Vec<f32>| values[3] = f32::NAN;
        assert!(load(&with(head(not_a_number)), Dtype::F32).unwrap().lm_head.is_some());

        // A head alone is the embedding.
        let mut alone = tensors.clone();
        alone[embedding].0 = HEAD.to_string();
        assert_eq!(logits(&load(&alone, Dtype::F32).unwrap()), logits(&tied));

        let text =
            load(&with((HEAD.to_string(), vec![10, 8], vec![0.0; 80])), Dtype::F32).unwrap_err().to_string();
        assert!(text.contains("`lm_head.weight`: expected shape [11, 8], found [10, 8]"), "{text}");
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
        for (bytes, found) in [
            (
                &b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"[..],
                WrongFile::LfsPointer,
            ),
            (b"PK\x03\x04\0\0\0\0\0\0", WrongFile::Zip),
            (b"", WrongFile::Empty),
        ] {
            let error = load(bytes);
            assert!(matches!(&error, LlamaError::WrongFile { found: it, .. } if *it == found), "{error}");
        }
        fs::remove_file(&path).unwrap();
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("hint: expected weights as"), "{error}");
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap_err();
        assert!(error.to_string().contains("hint: there are PyTorch's weights only"), "{error}");
    }
}
