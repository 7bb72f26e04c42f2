//! Where to compute: the devices of Burn that this program can be built with.

use std::fmt;

use anyhow::{Result, ensure};
use burn::tensor::{Device, FloatDType};
use burn_peft::{DeviceCheck, DeviceInfo, check_device, device_info};
use clap::ValueEnum;

use crate::arguments::Precision;

/// A device by name. All but the CPU need a cargo feature of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The first GPU that passes the check, through what was compiled in of CUDA, ROCm, Metal, Vulkan and WGPU, or else the CPU
    Auto,
    /// All cores of the CPU
    Cpu,
    /// NVIDIA GPU through CUDA
    Cuda,
    /// AMD GPU through ROCm
    Rocm,
    /// Any GPU, through the graphics API of the system
    Wgpu,
    /// GPU through Vulkan
    Vulkan,
    /// Apple GPU through Metal
    Metal,
}

/// Those that `auto` tries before the CPU, in this order.
const GPUS: [DeviceName; 5] =
    [DeviceName::Cuda, DeviceName::Rocm, DeviceName::Metal, DeviceName::Vulkan, DeviceName::Wgpu];

impl DeviceName {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
        }
    }

    /// Opens the device for a model with weights in `precision`, checks what it computes, and says on standard error which it
    /// is, what is in which type, and how exact it is. The device is one for inference; `Device::autodiff` makes one to train
    /// on. Errors name the `example`.
    ///
    /// # Errors
    /// The program was built without the feature that this device needs; the device fails, lacks the type, or computes wrongly.
    pub fn open(self, example: &str, precision: Precision) -> Result<Device> {
        if self == Self::Auto {
            let candidates = GPUS.into_iter().filter_map(|name| Some((name, name.compiled_in()?)));
            return match first_of(candidates, |name, device| name.check_gpu(device, precision)) {
                Some((name, device, check)) => Ok(name.told(device, &check, precision)),
                None => Self::Cpu.open(example, precision),
            };
        }
        let Some(device) = self.compiled_in() else {
            anyhow::bail!(
                "the device `{0}` was not compiled in\nhint: cargo run --release --features {0} --example {example} -- --device {0}",
                self.name()
            );
        };
        let check = self.check(&device, &device_info(&device)?, precision)?;
        Ok(self.told(device, &check, precision))
    }

    /// [`check_device`], announced where kernels are compiled for it: some drivers take long, and some break down and take the
    /// program with them.
    fn check(self, device: &Device, info: &DeviceInfo, precision: Precision) -> Result<DeviceCheck> {
        if self != Self::Cpu {
            eprintln!("checking {}", info.name);
        }
        Ok(check_device(device, &[precision.into()])?)
    }

    /// [`check`](Self::check), but what is no GPU is refused before.
    fn check_gpu(self, device: &Device, precision: Precision) -> Result<DeviceCheck> {
        let info = device_info(device)?;
        ensure!(
            info.is_gpu,
            "{} computes on the CPU, slower than `cpu`\nhint: `--device {self}` takes it all the same",
            info.name
        );
        self.check(device, &info, precision)
    }

    /// The device, if the program was built with the feature of its name.
    fn compiled_in(self) -> Option<Device> {
        match self {
            Self::Cpu => Some(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Some(Device::cuda(0)),
            #[cfg(feature = "rocm")]
            Self::Rocm => Some(Device::rocm(0)),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(Device::wgpu(Default::default())),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Some(Device::vulkan(Default::default())),
            #[cfg(feature = "metal")]
            Self::Metal => Some(Device::metal(Default::default())),
            #[allow(unreachable_patterns, reason = "with every feature, `auto` alone is left")]
            _ => None,
        }
    }

    fn told(self, device: Device, check: &DeviceCheck, precision: Precision) -> Device {
        eprintln!("device: {}", self.description(check, precision));
        device
    }

    fn description(self, check: &DeviceCheck, precision: Precision) -> String {
        let exact = |dtype| format!("{:.0e}", check.largest(dtype));
        let in_f32 = exact(FloatDType::F32);
        let types = match precision {
            Precision::F32 => format!("everything in f32, exact to {in_f32}"),
            _ => {
                let activations = if self == Self::Cpu { "" } else { " and activations" };
                format!(
                    "weights{activations} in {}, exact to {}; adapters, their optimizer, softmax, means and losses in f32, exact to {in_f32}",
                    precision.name(),
                    exact(precision.into())
                )
            }
        };
        format!("{self}, {}; {types}", check.device().name)
    }
}

/// The first that passes the check. Standard error says why the others do not.
fn first_of(
    candidates: impl IntoIterator<Item = (DeviceName, Device)>,
    check: impl Fn(DeviceName, &Device) -> Result<DeviceCheck>,
) -> Option<(DeviceName, Device, DeviceCheck)> {
    candidates.into_iter().find_map(|(name, device)| match check(name, &device) {
        Ok(check) => Some((name, device, check)),
        Err(error) => {
            eprintln!("note: not `{name}`: {error:#}");
            None
        }
    })
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn the_cpu_is_always_there_in_every_precision() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            assert!(DeviceName::Cpu.open("pokemon", precision).is_ok());
        }
    }

    #[test]
    fn the_policy_of_types_is_told() {
        let check = check_device(&Device::flex(), &[FloatDType::BF16]).unwrap();
        let text = DeviceName::Cpu.description(&check, Precision::Bf16);
        for part in ["cpu, Flex", "; weights in bf16, exact to", "softmax, means and losses in f32, exact to"]
        {
            assert!(text.contains(part), "{text}");
        }
        let text = DeviceName::Cuda.description(&check, Precision::Bf16);
        assert!(text.contains("weights and activations in bf16"), "{text}");
    }

    #[test]
    #[cfg(not(any(
        feature = "cuda",
        feature = "rocm",
        feature = "metal",
        feature = "vulkan",
        feature = "wgpu"
    )))]
    fn without_a_gpu_in_the_program_auto_is_the_cpu() {
        let device = DeviceName::Auto.open("pokemon", Precision::F32).unwrap();
        assert_eq!(device, Device::flex());
    }

    /// Everything here is one CPU, so the names tell the candidates apart.
    #[test]
    fn auto_takes_the_first_that_passes() {
        let candidates = GPUS.map(|name| (name, Device::flex()));
        let tried = Cell::new(0);
        let third = |_, device: &Device| {
            tried.set(tried.get() + 1);
            ensure!(tried.get() == 3, "it computes wrongly");
            Ok(check_device(device, &[])?)
        };
        let (name, ..) = first_of(candidates.clone(), third).unwrap();
        assert_eq!((name, tried.get()), (GPUS[2], 3));
        assert!(first_of(candidates, |name, device| name.check_gpu(device, Precision::F32)).is_none());
        let error = DeviceName::Wgpu.check_gpu(&Device::flex(), Precision::F32).unwrap_err().to_string();
        assert!(error.contains("Flex") && error.contains("computes on the CPU"), "{error}");
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_missing_device_names_its_feature() {
        let text = DeviceName::Cuda.open("pokemon", Precision::F32).unwrap_err().to_string();
        assert!(text.contains("`cuda`") && text.contains("--features cuda"), "{text}");
    }
}
