//! Writing safetensors files.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use burn::tensor::DType;
use burn_peft_files::{DirectoryWriter, StagedFile, TensorFileError};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::transpose::transpose_bytes;
use crate::error::LlamaError;
use crate::file::{self, unwritten};
use crate::parameters::Parameter;

/// A tensor on its way into a file.
pub(crate) struct Entry {
    pub(crate) name: String,
    /// As in the file.
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
    /// Its bytes in the order of the file.
    pub(crate) read: Box<dyn Fn() -> Result<Vec<u8>, LlamaError>>,
}

impl From<Parameter> for Entry {
    fn from(parameter: Parameter) -> Self {
        let Parameter { name, shape, dtype, transposed, read, .. } = parameter;
        let matrix = match shape[..] {
            [rows, columns] if transposed => Some([columns, rows]),
            _ => None,
        };
        let bytes = move || {
            let data = read()?;
            Ok(match matrix {
                Some(shape) => transpose_bytes(data.as_bytes(), shape, dtype.size()),
                None => data.as_bytes().to_vec(),
            })
        };
        Self { name, shape, dtype, read: Box::new(bytes) }
    }
}

/// Writes tensors one after the other into a file that has yet to be moved to `path`.
pub(crate) fn write(
    directory: &DirectoryWriter,
    path: &Path,
    mut entries: Vec<Entry>,
) -> Result<StagedFile, LlamaError> {
    let failed = unwritten(path);
    let malformed = |source| LlamaError::WeightsFile(TensorFileError::Format { path: path.into(), source });
    // Wider types first keeps every tensor aligned.
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.size()));
    let mut offset = 0;
    let mut infos = Vec::with_capacity(entries.len());
    for Entry { name, shape, dtype, .. } in &entries {
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
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(format), infos).map_err(malformed)?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| failed(io::Error::from(error)))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = directory.stage(&file::name(path)).map_err(&failed)?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, &mut file);
    writer.write_all(&(header.len() as u64).to_le_bytes()).map_err(&failed)?;
    writer.write_all(&header).map_err(&failed)?;
    for entry in &entries {
        writer.write_all(&(entry.read)()?).map_err(&failed)?;
    }
    writer.flush().map_err(&failed)?;
    drop(writer);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::weights::checkpoint::tests::read;
    use crate::weights::tests::{config, saved};
    use burn_peft_files::WEIGHTS_FILE;

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
}
