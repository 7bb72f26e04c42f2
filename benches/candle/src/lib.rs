//! A linear layer with an adapter in candle, as its users write it.

use candle_core::{DType, Device, Result, Tensor, Var};

/// `y = x Wᵀ + scaling * (x Aᵀ) Bᵀ`, where `W` is frozen, in the layout of candle's own `Linear`.
#[derive(Debug)]
pub struct LoraLinear {
    weight: Tensor,
    a: Var,
    b: Var,
    scaling: f64,
}

impl LoraLinear {
    /// A square layer with random numbers.
    ///
    /// # Errors
    /// If candle fails.
    pub fn new(width: usize, r: usize) -> Result<Self> {
        let var = |rows: usize, columns: usize| Var::rand(-0.1f32, 0.1, (rows, columns), &Device::Cpu);
        Ok(Self { weight: input(width, width)?, a: var(r, width)?, b: var(width, r)?, scaling: 2.0 })
    }

    /// `[n, width]` to `[n, width]`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let update = x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)?;
        x.matmul(&self.weight.t()?)? + (update * self.scaling)?
    }
}

/// Random numbers.
///
/// # Errors
/// If candle fails.
pub fn input(n: usize, width: usize) -> Result<Tensor> {
    Tensor::rand(-1.0, 1.0, (n, width), &Device::Cpu)?.to_dtype(DType::F32)
}
