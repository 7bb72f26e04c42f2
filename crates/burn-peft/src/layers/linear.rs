//! Linear layers.

use burn::module::ModuleVisitor;
use burn::nn::Linear;
use burn::tensor::{Int, Tensor};
use burn_peft_ops::linear;

use crate::adapter::Adapters;
use crate::layers::transparent::transparent_layer;
use crate::seam::Mark;

/// `nn::Linear` whose adapters work on activations:
///
/// `y = x W + b + Σ scaling * (dropout(x) A) B`, summed over the active adapters.
///
/// Neither the dense update `A B` nor a gradient of `W` is ever built, which is what makes LoRA cheap; on a plain
/// `nn::Linear` the same adapter works through `W + scaling * A B`. Without an adapter the layer costs what
/// `nn::Linear` costs.
///
/// The wrapper is transparent: a field `q_proj: LoraLinear` has the parameters `q_proj.weight` and `q_proj.bias`, so
/// records and checkpoints of the model with `nn::Linear` fit. [`From`] converts in both directions, and the layer
/// dereferences to `nn::Linear`.
///
/// # Example
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use burn_peft::LoraLinear;
///
/// let device = Device::default();
/// let layer = LoraLinear::from(LinearConfig::new(4, 2).init(&device));
/// assert_eq!(layer.forward(Tensor::<3>::ones([1, 3, 4], &device)).dims(), [1, 3, 2]);
/// ```
#[derive(Clone, Debug)]
pub struct LoraLinear {
    layer: Linear,
}

impl LoraLinear {
    fn new(layer: Linear) -> Self {
        Self { layer }
    }

    fn announce<V: ModuleVisitor>(&self, visitor: &mut V) {
        Mark::ActivationSpace.announce(visitor);
    }

    /// Applies the layer and its active adapters.
    ///
    /// The input of an adapter is cast to the type of its factors, and its output back.
    ///
    /// # Shapes
    /// - input: `[.., d_input]`
    /// - output: `[.., d_output]`
    ///
    /// # Panics
    /// If the input's last axis is not `d_input`. Also if rows of the batch have adapters of their own
    /// ([`for_rows`](crate::PeftModel::for_rows)) and the first axis has another length.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match Adapters::of(&self.layer.weight) {
            Some(adapters) => self.forward_with(adapters, input),
            None => linear(input, self.layer.weight.val(), self.layer.bias.as_ref().map(|bias| bias.val())),
        }
    }

    /// Applies the layer to activations that were picked from a batch: entry `i` of the first axis of `input` belongs to row
    /// `rows[i]` of the batch. It differs from [`forward`](Self::forward) only if the rows of the batch have adapters of their
    /// own ([`for_rows`](crate::PeftModel::for_rows)).
    ///
    /// You need it if your output layer reads only some positions of a batch, as in the loss of a language model.
    ///
    /// # Shapes
    /// - input: `[n, .., d_input]`
    /// - rows: `[n]`
    /// - output: `[n, .., d_output]`
    ///
    /// # Panics
    /// If the input's last axis is not `d_input`, and on a row that the batch of `for_rows` did not have.
    pub fn forward_rows<const D: usize>(&self, input: Tensor<D>, rows: &Tensor<1, Int>) -> Tensor<D> {
        match Adapters::of(&self.layer.weight) {
            Some(adapters) if !adapters.rows.is_empty() => {
                self.forward_with(&adapters.clone().select_rows(rows), input)
            }
            _ => self.forward(input),
        }
    }

    fn forward_with<const D: usize>(&self, adapters: &Adapters, input: Tensor<D>) -> Tensor<D> {
        let bias = self.layer.bias.as_ref().map(|bias| bias.val());
        adapters.linear(&self.layer.weight, bias, input)
    }
}

transparent_layer! {
    LoraLinear, Linear,
    /// The plain layer. Adapters stay attached and act through the weight; their dropout and `lora_bias` are lost. Merge an
    /// adapter that has a `lora_bias` first.
}

#[cfg(test)]
mod tests {
    use burn::module::{Module, ModuleVisitor, Param};
    use burn::nn::LinearConfig;
    use burn::tensor::module::linear;
    use burn::tensor::{Device, Tolerance};

    use super::*;
    use crate::adapter::Adapter;
    use crate::testing::with_fixed_numbers;
    use crate::{LoraConfig, PeftModel};
    use burn_peft_ops::on_kind_of;

    #[derive(Module, Debug)]
    struct Model {
        proj: LoraLinear,
    }

    fn model(device: &Device, dropout: f64) -> Model {
        let mut model = Model { proj: LinearConfig::new(3, 2).init(device).into() };
        let config =
            LoraConfig::new(2).with_lora_alpha(6.0).with_lora_dropout(dropout).with_target_modules(["proj"]);
        model.add_adapter("default", &config).unwrap();
        with_fixed_numbers(model)
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    /// `y = x W + b + scaling (x A) B`, element by element.
    fn reference(layer: &LoraLinear, x: &Tensor<2>) -> Vec<f32> {
        let adapter = &Adapters::of(&layer.weight).unwrap().list[0];
        let factors = &adapter.updates[0];
        let (w, a, b) = (values(layer.weight.base()), values(factors["a"].val()), values(factors["b"].val()));
        let bias: Vec<f32> = layer.bias.as_ref().unwrap().val().into_data().try_to_vec().unwrap();
        let x = values(x.clone());
        let mut y = vec![];
        for row in x.chunks(3) {
            for out in 0..2 {
                let mut sum = bias[out];
                for (i, x) in row.iter().enumerate() {
                    sum += x * w[i * 2 + out];
                    for r in 0..2 {
                        sum += 3.0 * x * a[i * 2 + r] * b[r * 2 + out];
                    }
                }
                y.push(sum);
            }
        }
        y
    }

    #[test]
    fn forward_adds_the_scaled_low_rank_path() {
        let device = Device::default();
        let model = model(&device, 0.0);
        let x = Tensor::<2>::from_data([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]], &device);
        let y = model.proj.forward(x.clone());
        let expected = Tensor::<2>::from_data(
            burn::tensor::TensorData::new(reference(&model.proj, &x), [2, 2]),
            &device,
        );
        y.clone().into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-6));
        let plain: Linear = model.proj.clone().into();
        plain
            .forward(x.clone())
            .into_data()
            .assert_approx_eq::<f32>(&y.clone().into_data(), Tolerance::absolute(1e-6));
        let bare = linear(x, plain.weight.base(), plain.bias.map(|bias| bias.val()));
        let moved: f32 = (bare - y).abs().max().into_scalar();
        assert!(moved > 0.1, "the adapter moved the output by {moved} only");
    }

    #[test]
    fn dropout_acts_on_the_adapters_input_and_only_while_training() {
        let device = Device::default().autodiff();
        let model = model(&device, 0.5);
        let x = Tensor::<2>::ones([64, 3], &device);
        let rows = values(model.proj.forward(x.clone()));
        assert!(rows.chunks(2).any(|row| row != &rows[..2]), "every row kept the same inputs");
        let rows = values(model.valid().proj.forward(x.inner()));
        assert!(rows.chunks(2).all(|row| row == &rows[..2]));
    }

    #[test]
    fn dropout_zeroes_the_asked_share_and_keeps_the_mean() {
        let device = Device::default().autodiff();
        let model = model(&device, 0.2);
        // With W = 0, x = 1 and A = B = 1 a row's output counts the inputs that were kept, twice: r = 2.
        let mut adapters = Adapters::of(&model.proj.weight).unwrap().clone();
        let adapter = adapters.list.remove(0);
        let ones = |tensor: Tensor<2>| on_kind_of(tensor.inner().ones_like(), &device);
        let updates = adapter.updates.iter().cloned();
        let updates = updates
            .map(|update| update.map_parts(|_, tensor| Param::from_tensor(ones(tensor.val()))))
            .collect();
        let scaling = adapter.updates[0].scaling;
        adapters.list.push(Adapter { updates, ..adapter });
        const ROWS: usize = 20_000;
        let x = Tensor::<2>::ones([ROWS, 3], &device);
        let zero = Param::from_tensor(Tensor::zeros([3, 2], &device));
        let rows = values(adapters.linear(&zero, None, x).narrow(1, 0, 1));
        let unit = 2.0 * scaling as f32 / 0.8;
        let kept: f32 = rows.iter().map(|row| row / unit).sum();
        assert!(rows.iter().all(|row| (row / unit - (row / unit).round()).abs() < 1e-4));
        // Six standard deviations of 60 000 draws.
        let share = kept / (3 * ROWS) as f32;
        assert!((share - 0.8).abs() < 0.01, "kept {share}");
    }

    #[test]
    fn the_wrapper_adds_nothing_to_parameter_paths() {
        #[derive(Default)]
        struct Paths(Vec<String>, Vec<String>);
        impl ModuleVisitor for Paths {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.0.push(name.to_string());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.0.pop();
            }
            fn visit_float<const D: usize>(&mut self, _param: &burn::module::Param<Tensor<D>>) {
                self.1.push(self.0.join("."));
            }
        }
        let mut paths = Paths::default();
        model(&Device::default(), 0.0).visit(&mut paths);
        let expected =
            ["proj.weight", "proj.weight.peft.default.a", "proj.weight.peft.default.b", "proj.bias"];
        assert_eq!(paths.1, expected);
    }

    #[test]
    fn display_names_the_adapters() {
        let text = model(&Device::default(), 0.0).to_string();
        assert!(text.contains("default (r 2)"), "{text}");
    }
}
