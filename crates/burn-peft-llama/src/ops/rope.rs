//! The rotation of rotary position embeddings.

use burn::tensor::Tensor;

/// `x * cos + swapped(x) * sin`, where `swapped` exchanges the halves of a head, with the heads moved before the
/// positions.
///
/// With `sin` negated in its first half, that rotates each pair `(x[i], x[i + d / 2])` by the angle of its position.
///
/// # Shapes
/// - x: `[b, s, n, g, d]`
/// - cos, sin: `[s, d]`
/// - output: `[b, n, g, s, d]`
pub(crate) fn rotate(x: Tensor<5>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<5> {
    let half = x.dims()[4] / 2;
    let halves = vec![x.clone().narrow(4, half, half), x.clone().narrow(4, 0, half)];
    // Exchanging the axes first lets the multiplications write the new order; no copy is made for it.
    let order = [0, 2, 3, 1, 4];
    let swapped = Tensor::cat(halves, 4).permute(order);
    x.permute(order) * cos.clone().unsqueeze() + swapped * sin.clone().unsqueeze()
}
