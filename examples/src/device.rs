//! Where to compute: the devices of Burn that this program can be built with.

use anyhow::Result;
use burn::tensor::Device;
use clap::ValueEnum;

/// A device by name. All but the CPU need a cargo feature of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// All cores of the CPU
    Cpu,
    /// NVIDIA GPU through CUDA
    Cuda,
    /// Any GPU, through the graphics API of the system
    Wgpu,
    /// GPU through Vulkan
    Vulkan,
    /// Apple GPU through Metal
    Metal,
}

impl DeviceName {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
        }
    }

    /// Opens the device, for inference; `Device::autodiff` makes one to train on. The error names the `example`.
    ///
    /// # Errors
    /// The program was built without the feature that this device needs.
    pub fn open(self, example: &str) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(0)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Ok(Device::wgpu(Default::default())),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Ok(Device::vulkan(Default::default())),
            #[cfg(feature = "metal")]
            Self::Metal => Ok(Device::metal(Default::default())),
            #[allow(unreachable_patterns, reason = "with every feature there is no other device left")]
            other => anyhow::bail!(
                "the device `{0}` was not compiled in\nhint: cargo run --release --features {0} --example {example} -- --device {0}",
                other.name()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        assert!(DeviceName::Cpu.open("pokemon").is_ok());
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_missing_device_names_its_feature() {
        let text = DeviceName::Cuda.open("pokemon").unwrap_err().to_string();
        assert!(text.contains("`cuda`") && text.contains("--features cuda"), "{text}");
    }
}
