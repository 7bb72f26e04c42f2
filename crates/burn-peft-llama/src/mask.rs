//! Which positions see which. A window of attention would be a further condition here.

use burn::tensor::{Bool, DType, Device, Tensor};

/// The bias of a pass over whole sequences: a position sees itself and the tokens before it, never padding.
///
/// Padding sees itself as well. Its results are used nowhere, but a row that sees nothing would be `0 / 0`.
pub(crate) fn causal_bias(mask: Option<Tensor<2, Bool>>, s: usize, device: &Device) -> Option<Tensor<5>> {
    if s == 1 {
        return None;
    }
    let hidden = Tensor::<2, Bool>::tril_mask([s, s], 0, device).unsqueeze::<3>();
    let hidden = match mask {
        Some(mask) => {
            let padding = mask.bool_not().unsqueeze_dim::<3>(1);
            let others = Tensor::<2, Bool>::diag_mask([s, s], 0, device).unsqueeze::<3>();
            let [b, _, _] = padding.dims();
            let shape = [b, s, s];
            hidden.expand(shape).bool_or(padding.expand(shape).bool_and(others.expand(shape)))
        }
        None => hidden,
    };
    Some(bias_of(hidden))
}

/// Negative infinity where a key is hidden, else 0. `[b, s, t]` to `[b, 1, 1, s, t]`.
pub(crate) fn bias_of(hidden: Tensor<3, Bool>) -> Tensor<5> {
    let zeros = Tensor::<3>::zeros(hidden.dims(), (&hidden.device(), DType::F32));
    zeros.mask_fill(hidden, f32::NEG_INFINITY).unsqueeze_dims(&[1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    #[test]
    fn the_bias_hides_the_future_and_padding_but_never_a_position_itself() {
        let device = Device::flex();
        let mask = Tensor::<2, Bool>::from_data([[false, true, true], [true, true, false]], &device);
        let bias = causal_bias(Some(mask), 3, &device).unwrap();
        assert_eq!(bias.dims(), [2, 1, 1, 3, 3]);
        let seen: Vec<bool> = values(bias).iter().map(|value| *value == 0.0).collect();
        let expected = [
            [[true, false, false], [false, true, false], [false, true, true]],
            [[true, false, false], [true, true, false], [true, true, true]],
        ];
        assert_eq!(seen, expected.concat().concat());
        let causal = values(causal_bias(None, 2, &device).unwrap());
        assert_eq!(causal, [0.0, f32::NEG_INFINITY, 0.0, 0.0]);
        assert!(causal_bias(None, 1, &device).is_none());
    }
}
