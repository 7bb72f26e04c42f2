//! Reading and writing `model.safetensors`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Component, Path, PathBuf},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};
use half::{bf16, f16};
use safetensors::{
    Dtype, SafeTensorError,
    tensor::{Metadata, TensorInfo},
};
use serde::Deserialize;

use crate::{LlamaConfig, LlamaError, LlamaForCausalLm, config::CONFIG_FILE, file, model::ParameterSource};

const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest header that is read, in bytes; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a checkpoint that does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightProblem {
    /// The model needs a tensor that the files do not have.
    Missing {
        /// Its name.
        name: String,
    },
    /// The files have a tensor that the model does not know.
    Unexpected {
        /// Its name.
        name: String,
        /// The most similar name that the model needs.
        nearest: Option<String>,
    },
    /// A tensor has another shape than the configuration says.
    Shape {
        /// Its name.
        name: String,
        /// The shape by the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is not of type f32, f16 or bf16.
    Type {
        /// Its name.
        name: String,
        /// Its type.
        found: String,
    },
}

impl std::fmt::Display for WeightProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "`{name}` is missing"),
            Self::Unexpected { name, nearest: None } => write!(f, "`{name}` is unexpected"),
            Self::Unexpected { name, nearest: Some(nearest) } => {
                write!(f, "`{name}` is unexpected; the nearest name is `{nearest}`")
            }
            Self::Shape { name, expected, found } => {
                write!(f, "`{name}`: expected shape {expected:?}, found {found:?}")
            }
            Self::Type { name, found } => write!(f, "`{name}`: expected f32, f16 or bf16, found {found}"),
        }
    }
}

impl LlamaForCausalLm {
    /// Loads a model directory in the Hugging Face layout in f32; see
    /// [`from_pretrained_as`](Self::from_pretrained_as).
    ///
    /// # Errors
    ///
    /// As [`from_pretrained_as`](Self::from_pretrained_as).
    pub fn from_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<Self, LlamaError> {
        Self::from_pretrained_as(dir, device, FloatDType::F32)
    }

    /// Loads a model directory in the Hugging Face layout: `config.json` and either `model.safetensors` or the shards
    /// that `model.safetensors.index.json` lists, in f32, f16 or bf16.
    ///
    /// Weights are read one tensor at a time and converted to `dtype`. Loading is strict: the files must hold the
    /// model's tensors, no fewer and no more, save for `rotary_emb.inv_freq` of old files and an `lm_head.weight`
    /// beside tied embeddings, which are ignored.
    ///
    /// # Errors
    ///
    /// - as [`LlamaConfig::load`],
    /// - [`LlamaError::ReadText`] if a file cannot be read,
    /// - [`LlamaError::ConfigJson`] if the index is malformed,
    /// - [`LlamaError::ShardName`] if the index leads out of the directory,
    /// - [`LlamaError::WeightsFile`] and [`LlamaError::WeightsLength`] if a file of weights is malformed,
    /// - [`LlamaError::Weights`] with all missing, unexpected and misshapen tensors.
    pub fn from_pretrained_as(
        dir: impl AsRef<Path>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let config = LlamaConfig::load(dir)?;
        let mut checkpoint = Checkpoint::open(dir)?;
        // Parameters are made when they are first used, so this model costs nothing.
        checkpoint.check(&parameters(&config.init(device)), config.tie_word_embeddings)?;
        Self::build(&config, &mut Loader { checkpoint, device, dtype: dtype.into() })
    }

    /// Writes `config.json` and `model.safetensors` as transformers 5 reads them, in the type of the parameters. The
    /// directory is made if it does not exist. Each file appears complete or not at all.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::AdaptersAttached`] if the model has adapters: they belong in files of their own,
    /// - [`LlamaError::WriteText`] if a file cannot be written,
    /// - [`LlamaError::WeightsFile`] if the weights have a type that the format does not know,
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let mut parameters = parameters(self);
        if let Some(adapter) = parameters.iter().find(|parameter| parameter.adapter) {
            return Err(LlamaError::AdaptersAttached { path: adapter.name.clone() });
        }
        fs::create_dir_all(dir).map_err(|source| LlamaError::WriteText { path: dir.to_owned(), source })?;
        // Wider types first keeps every tensor aligned.
        parameters.sort_by_key(|parameter| std::cmp::Reverse(parameter.dtype.size()));
        let dtype = match self.model.embed_tokens.weight.base().dtype() {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F64 => "float64",
            _ => "float32",
        };
        write_weights(&dir.join(WEIGHTS_FILE), &parameters)?;
        let config = self.config().to_json(dtype);
        file::write(&dir.join(CONFIG_FILE), &format!("{config:#}\n"))
    }
}

/// A parameter of a model.
struct Parameter {
    name: String,
    /// As in a file.
    shape: Vec<usize>,
    dtype: DType,
    /// Whether the model holds it transposed.
    transposed: bool,
    /// Whether it belongs to an adapter.
    adapter: bool,
    /// Reads it, as the model holds it.
    read: Box<dyn Fn() -> Result<TensorData, LlamaError>>,
}

/// Lists the parameters of a model without making those that do not exist yet.
fn parameters(model: &LlamaForCausalLm) -> Vec<Parameter> {
    #[derive(Default)]
    struct Reader {
        path: Vec<String>,
        containers: Vec<String>,
        parameters: Vec<Parameter>,
    }

    impl ModuleVisitor for Reader {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.push(name.to_owned());
            self.containers.push(container.to_owned());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
            self.containers.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let mut shape = param.lazy_shape().to_vec();
            let transposed = D == 2 && self.containers.last().is_some_and(|last| last == "Struct:Linear");
            if transposed {
                shape.reverse();
            }
            let dtype = if param.is_initialized() { param.base().dtype() } else { DType::F32 };
            let param = param.clone();
            let read = move || {
                let read = |source| LlamaError::DeviceRead { source: Box::new(source) };
                param.base().try_into_data().map_err(read)
            };
            let name = self.path.join(".");
            // The parameters of a module end with `weight` or `bias`; what lies below is an adapter.
            let adapter = !matches!(self.path.last().map(String::as_str), Some("weight" | "bias"));
            let read = Box::new(read);
            self.parameters.push(Parameter { name, shape, dtype, transposed, adapter, read });
        }
    }

    let mut reader = Reader::default();
    model.visit(&mut reader);
    reader.parameters
}

/// The files of a checkpoint and where each tensor lies.
struct Checkpoint {
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

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    fn open(dir: &Path) -> Result<Self, LlamaError> {
        let index = dir.join(INDEX_FILE);
        let single = dir.join(WEIGHTS_FILE);
        // Like transformers: the single file goes first.
        let text = match single.exists() {
            true => None,
            false => file::read_optional(&index, "it lists the files of weights")?,
        };
        let Some(text) = text else {
            let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new(), path: single.clone() };
            checkpoint.add(single)?;
            return Ok(checkpoint);
        };
        let json: Index = serde_json::from_str(&text)
            .map_err(|source| LlamaError::ConfigJson { path: index.clone(), source })?;
        let mut names: Vec<String> = json.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new(), path: index.clone() };
        for name in names {
            let mut components = Path::new(&name).components();
            let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
            if !plain || name.contains(['/', '\\']) {
                return Err(LlamaError::ShardName { path: index, name });
            }
            checkpoint.add(dir.join(name))?;
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
    fn check(&mut self, parameters: &[Parameter], tied: bool) -> Result<(), LlamaError> {
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
    fn read(&mut self, name: &str) -> Result<Vec<f32>, LlamaError> {
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

/// The parameters of a checkpoint.
struct Loader<'a> {
    checkpoint: Checkpoint,
    device: &'a Device,
    dtype: DType,
}

impl Loader<'_> {
    fn param<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        let data = TensorData::new(values, shape);
        Param::from_tensor(Tensor::from_data(data, (self.device, self.dtype)))
    }
}

impl ParameterSource for Loader<'_> {
    type Error = LlamaError;

    fn linear(
        &mut self,
        path: &str,
        shape @ [d_in, d_out]: [usize; 2],
    ) -> Result<Param<Tensor<2>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(transpose(&values, [d_out, d_in]), shape))
    }

    fn embedding(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(values, shape))
    }

    fn norm(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(values, [d]))
    }

    fn bias(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, LlamaError> {
        self.norm(path, d)
    }
}

/// Row-major `[rows, columns]` to row-major `[columns, rows]`, in tiles that stay in the cache.
fn transpose<T: Copy + Default>(values: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![T::default(); values.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for column in left..(left + TILE).min(columns) {
                for row in top..(top + TILE).min(rows) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

/// Writes tensors one after the other, by way of a temporary file.
fn write_weights(path: &Path, parameters: &[Parameter]) -> Result<(), LlamaError> {
    let failed = |source| LlamaError::WriteText { path: path.to_owned(), source };
    let malformed = |source| LlamaError::WeightsFile { path: path.to_owned(), source };
    let mut offset = 0;
    let mut infos = Vec::with_capacity(parameters.len());
    for Parameter { name, shape, dtype, .. } in parameters {
        let dtype = match dtype {
            DType::F64 => Dtype::F64,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::F32 | DType::Flex32 => Dtype::F32,
            _ => return Err(malformed(SafeTensorError::TensorInvalidInfo)),
        };
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        infos.push((name.clone(), TensorInfo { dtype, shape: shape.clone(), data_offsets: (offset, end) }));
        offset = end;
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(malformed)?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| failed(io::Error::from(error)))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = file::temporary(path)?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
    writer.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    writer.write_all(&header).map_err(failed)?;
    for parameter in parameters {
        let data = (parameter.read)()?;
        let size = parameter.dtype.size();
        let bytes = match (parameter.transposed, parameter.shape.as_slice()) {
            (true, &[rows, columns]) => transpose_bytes(data.as_bytes(), [columns, rows], size),
            _ => data.as_bytes().to_vec(),
        };
        writer.write_all(&bytes).map_err(failed)?;
    }
    writer.flush().map_err(failed)?;
    drop(writer);
    file::persist(file, path)
}

/// [`transpose`] of elements of `size` bytes.
fn transpose_bytes(bytes: &[u8], dims: [usize; 2], size: usize) -> Vec<u8> {
    match size {
        2 => transpose(bytes.as_chunks::<2>().0, dims).into_flattened(),
        8 => transpose(bytes.as_chunks::<8>().0, dims).into_flattened(),
        _ => transpose(bytes.as_chunks::<4>().0, dims).into_flattened(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Int;
    use serde_json::json;

    fn config() -> LlamaConfig {
        let config = LlamaConfig::new(11, 8, 2).with_heads(4, 2).with_intermediate_size(12);
        LlamaConfig { attention_bias: true, initializer_range: 0.3, ..config }
    }

    fn saved(config: &LlamaConfig) -> (tempfile::TempDir, LlamaForCausalLm) {
        let dir = tempfile::tempdir().unwrap();
        let model = config.init(&Device::flex());
        model.save_pretrained(dir.path()).unwrap();
        (dir, model)
    }

    fn logits(model: &LlamaForCausalLm) -> Vec<f32> {
        let ids = Tensor::<2, Int>::from_data([[1, 5, 10, 2]], &Device::flex());
        model.forward(ids, None).cast(DType::F32).into_data().iter::<f32>().collect()
    }

    /// The tensors of a file in f32, in file order.
    fn read(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut checkpoint = Checkpoint { files: vec![], tensors: BTreeMap::new(), path: path.to_owned() };
        checkpoint.add(path.to_owned()).unwrap();
        let names: Vec<_> =
            checkpoint.tensors.iter().map(|(name, e)| (name.clone(), e.info.shape.clone())).collect();
        names
            .into_iter()
            .map(|(name, shape)| (name.clone(), shape, checkpoint.read(&name).unwrap()))
            .collect()
    }

    fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)], dtype: Dtype) {
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
    fn a_saved_model_loads_equal_tied_and_untied() {
        for tied in [false, true] {
            let (dir, model) = saved(&config().with_tie_word_embeddings(tied));
            let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap();
            assert_eq!(loaded.config(), model.config());
            assert_eq!(logits(&loaded), logits(&model));
            let names: Vec<_> =
                read(&dir.path().join(WEIGHTS_FILE)).into_iter().map(|tensor| tensor.0).collect();
            assert_eq!(names.contains(&"lm_head.weight".to_owned()), !tied);
            assert!(names.contains(&"model.layers.1.self_attn.q_proj.bias".to_owned()), "{names:?}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
        }
    }

    #[test]
    fn linear_weights_are_stored_transposed_with_the_format_of_torch() {
        let (dir, model) = saved(&config());
        let tensors = read(&dir.path().join(WEIGHTS_FILE));
        let down = tensors.iter().find(|tensor| tensor.0 == "model.layers.1.mlp.down_proj.weight").unwrap();
        assert_eq!(down.1, [8, 12]);
        let weight: Vec<f32> =
            model.model.layers[1].mlp.down_proj.weight.base().into_data().iter::<f32>().collect();
        assert!(
            (0..8).all(|row| (0..12).all(|column| down.2[row * 12 + column] == weight[column * 8 + row]))
        );
        let bytes = fs::read(dir.path().join(WEIGHTS_FILE)).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn half_precision_files_and_models_work() {
        let (dir, model) = saved(&config());
        let tensors = read(&dir.path().join(WEIGHTS_FILE));
        let exact = logits(&model);
        let close = |model: &LlamaForCausalLm, tolerance: f32| {
            let logits = logits(model);
            let largest = exact.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest < tolerance && largest > 0.0, "{largest}");
        };
        for (dtype, float, tolerance) in
            [(Dtype::F16, FloatDType::F16, 0.02), (Dtype::BF16, FloatDType::BF16, 0.1)]
        {
            write(&dir.path().join(WEIGHTS_FILE), &tensors, dtype);
            close(&LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap(), tolerance);
            let half = LlamaForCausalLm::from_pretrained_as(dir.path(), &Device::flex(), float).unwrap();
            assert_eq!(half.model.norm.weight.base().dtype(), DType::from(float));
            close(&half, 2.0 * tolerance);
            let again = tempfile::tempdir().unwrap();
            half.save_pretrained(again.path()).unwrap();
            let loaded = LlamaForCausalLm::from_pretrained_as(again.path(), &Device::flex(), float).unwrap();
            assert_eq!(logits(&loaded), logits(&half));
            let text = fs::read_to_string(again.path().join(CONFIG_FILE)).unwrap();
            let name = if dtype == Dtype::F16 { "\"float16\"" } else { "\"bfloat16\"" };
            assert!(text.contains(name), "{text}");
        }
    }

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

    #[test]
    fn adapters_are_not_lost_in_silence() {
        use burn_peft::{LoraConfig, PeftModel};
        let mut model = config().init(&Device::flex());
        model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj"])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = model.save_pretrained(dir.path()).unwrap_err();
        assert!(
            matches!(&error, LlamaError::AdaptersAttached { path } if path.contains("q_proj")),
            "{error}"
        );
        model.merge_and_unload().unwrap();
        model.save_pretrained(dir.path()).unwrap();
    }
}
