//! The tensors of a checkpoint: whether they fit a model, and their numbers.

use std::collections::BTreeSet;
use std::path::Path;

use burn_peft_files::{TensorFiles, closest_key, is_float};

use crate::error::LlamaError;
use crate::file::{open_weights, unread_weights};
use crate::parameters::Parameter;
use crate::problem::WeightProblem;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The files of a checkpoint.
pub(crate) struct Checkpoint {
    files: TensorFiles,
}

impl Checkpoint {
    /// Opens the files of a model directory and reads their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self, LlamaError> {
        Ok(Self { files: open_weights(dir)? })
    }

    /// Whether a model whose configuration ties its output layer to the embedding is to be tied, by the tensors that
    /// are there; see [`from_pretrained_as`](crate::LlamaForCausalLm::from_pretrained_as).
    pub(crate) fn resolve_tied_head(&mut self) -> Result<bool, LlamaError> {
        if self.files.get(HEAD).is_none() {
            return Ok(true);
        }
        if self.files.get(EMBEDDING).is_none() {
            self.files.rename(HEAD, EMBEDDING);
        }
        let tied = self.files.get(HEAD).is_none() || self.are_equal(HEAD, EMBEDDING)?;
        if tied {
            self.files.retain(|name| name != HEAD);
        }
        Ok(tied)
    }

    /// Whether two tensors have the same numbers. As in torch, NaN is none of them.
    fn are_equal(&self, a: &str, b: &str) -> Result<bool, LlamaError> {
        // They can be gigabytes.
        const PIECE: usize = 1 << 18;
        let (Some(shape), true) = (self.shape(a), self.shape(a) == self.shape(b)) else { return Ok(false) };
        let count: usize = shape.iter().product();
        for start in (0..count).step_by(PIECE) {
            let range = start..(start + PIECE).min(count);
            let read = |name| self.files.read(name, range.clone()).map_err(unread_weights(CHANGED));
            if read(a)? != read(b)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Compares the files with what the model needs.
    pub(super) fn check(&mut self, parameters: &[Parameter]) -> Result<(), LlamaError> {
        self.files.retain(|name| !name.ends_with("rotary_emb.inv_freq"));
        let (mut problems, mut missing) = (vec![], vec![]);
        for Parameter { name, shape, .. } in parameters {
            let name = name.clone();
            match self.files.get(&name) {
                None => missing.push(WeightProblem::Missing { name }),
                Some(info) if info.shape != *shape => {
                    let (expected, found) = (shape.clone(), info.shape.clone());
                    problems.push(WeightProblem::Shape { name, expected, found });
                }
                Some(info) if !is_float(info.dtype) => {
                    problems.push(WeightProblem::Type { name, found: info.dtype.to_string() });
                }
                Some(_) => {}
            }
        }
        let known: BTreeSet<&str> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        let unexpected = self.files.tensors().filter(|(name, _)| !known.contains(name));
        for (i, (name, _)) in unexpected.enumerate() {
            // Comparing every name with every other takes long, and a long list is not read.
            let nearest = if i < 20 { closest_key(name, known.iter().copied()) } else { None };
            problems.push(WeightProblem::Unexpected { name: name.to_string(), nearest });
        }
        problems.append(&mut missing);
        if problems.is_empty() { Ok(()) } else { Err(self.misfit(problems)) }
    }

    /// The shape of a tensor of floating-point numbers.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.files.get(name).filter(|info| is_float(info.dtype)).map(|info| &info.shape[..])
    }

    /// The numbers of a tensor that [`check`](Self::check) has seen.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, LlamaError> {
        let mut numbers = Vec::with_capacity(self.count(name));
        self.read_parts(name, 1, |_, part| numbers.extend(part))?;
        Ok(numbers)
    }

    /// As [`read`](Self::read), part after part, for tensors that are not to be in memory twice: each with the index of its
    /// first number, and a multiple of `row` numbers long.
    pub(super) fn read_parts(
        &self,
        name: &str,
        row: usize,
        mut take: impl FnMut(usize, Vec<f32>),
    ) -> Result<(), LlamaError> {
        const PART: usize = 1 << 18;
        let (count, part) = (self.count(name), PART.next_multiple_of(row.max(1)));
        // Once for a tensor without numbers, or none.
        for start in (0..count.max(1)).step_by(part) {
            let range = start..(start + part).min(count);
            let numbers = self.files.read(name, range).map_err(unread_weights(CHANGED))?;
            let missing = || self.misfit(vec![WeightProblem::Missing { name: name.to_string() }]);
            take(start, numbers.ok_or_else(missing)?);
        }
        Ok(())
    }

    fn count(&self, name: &str) -> usize {
        self.files.get(name).map_or(0, |info| info.shape.iter().product())
    }

    fn misfit(&self, problems: Vec<WeightProblem>) -> LlamaError {
        LlamaError::Weights { path: self.files.path().into(), problems }
    }
}

const CHANGED: &str = "the file changed while it was read";

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use burn::tensor::Device;
    use burn_peft_files::{TensorFileError, WEIGHTS_FILE, WrongFile};
    use half::{bf16, f16};
    use safetensors::Dtype;
    use safetensors::tensor::TensorInfo;

    use super::*;
    use crate::config::LlamaConfig;
    use crate::model::LlamaForCausalLm;
    use crate::weights::tests::{config, logits, saved};

    /// The tensors of a file in f32, in file order.
    pub(in crate::weights) fn read(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let files = TensorFiles::open_file(path).unwrap();
        let read = |(name, info): (&str, &TensorInfo)| {
            let numbers = files.read(name, 0..info.shape.iter().product()).unwrap().unwrap();
            (name.to_string(), info.shape.clone(), numbers)
        };
        files.tensors().map(read).collect()
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
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
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
        let text = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err().to_string();
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
        let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));
    }

    #[test]
    fn a_head_beside_tied_embeddings_counts_where_it_differs() {
        let (dir, tied) = saved(&config().with_tie_word_embeddings(true));
        let path = dir.path().join(WEIGHTS_FILE);
        let load = |tensors: &[(String, Vec<usize>, Vec<f32>)], dtype: Dtype| {
            write(&path, tensors, dtype);
            LlamaForCausalLm::from_pretrained(dir.path(), &Device::default())
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
            let same = logits(&same);
            let largest = same.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
            for (own, tied) in logits(&own).iter().zip(same) {
                assert!((own - 2.0 * tied).abs() <= 1e-5 * largest, "{own} {tied}");
            }
            let again = tempfile::tempdir().unwrap();
            own.save_pretrained(again.path()).unwrap();
            let again = LlamaForCausalLm::from_pretrained(again.path(), &Device::default()).unwrap();
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
            LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err()
        };
        assert!(matches!(
            load(&bytes[..bytes.len() - 1]),
            LlamaError::WeightsFile(TensorFileError::Length { .. })
        ));
        assert!(matches!(load(&bytes[..100]), LlamaError::WeightsFile(TensorFileError::Format { .. })));
        assert!(matches!(load(&[1, 2]), LlamaError::WeightsFile(TensorFileError::Format { .. })));
        assert!(matches!(load(&[0xff; 16]), LlamaError::WeightsFile(TensorFileError::Format { .. })));
        assert!(matches!(
            load(b"\x04\0\0\0\0\0\0\0nope"),
            LlamaError::WeightsFile(TensorFileError::Format { .. })
        ));
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
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
        assert!(error.to_string().contains("hint: expected weights as"), "{error}");
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
        assert!(error.to_string().contains("hint: there are PyTorch's weights only"), "{error}");
    }
}
