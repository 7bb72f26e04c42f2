//! Writing `model.safetensors`.

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

/// Writes tensors one after the other into a file that has yet to be moved to `path`.
pub(super) fn write(
    directory: &DirectoryWriter,
    path: &Path,
    parameters: &[Parameter],
) -> Result<StagedFile, LlamaError> {
    let failed = unwritten(path);
    let malformed = |source| LlamaError::WeightsFile(TensorFileError::Format { path: path.into(), source });
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
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(format), infos).map_err(malformed)?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| failed(io::Error::from(error)))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = directory.stage(&file::name(path)).map_err(&failed)?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, &mut file);
    writer.write_all(&(header.len() as u64).to_le_bytes()).map_err(&failed)?;
    writer.write_all(&header).map_err(&failed)?;
    for parameter in parameters {
        let data = (parameter.read)()?;
        let size = parameter.dtype.size();
        let bytes = match (parameter.transposed, parameter.shape.as_slice()) {
            (true, &[rows, columns]) => transpose_bytes(data.as_bytes(), [columns, rows], size),
            _ => data.as_bytes().to_vec(),
        };
        writer.write_all(&bytes).map_err(&failed)?;
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
