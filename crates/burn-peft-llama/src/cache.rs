//! Keys and values of the tokens a model has already seen.

use burn::tensor::{Int, Tensor};

/// One [`LayerCache`] for each block.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
}

/// The keys and values of one block, in buffers of fixed capacity.
#[derive(Debug, Default)]
pub(crate) struct LayerCache {
    capacity: usize,
    length: usize,
    /// `[b, n, capacity, d]`
    key: Option<Tensor<4>>,
    /// `[b, n, capacity, d]`
    value: Option<Tensor<4>>,
}

impl KvCache {
    /// An empty cache for sequences of up to `capacity` tokens.
    pub(crate) fn new(num_layers: usize, capacity: usize) -> Self {
        let layer = |_| LayerCache { capacity, ..LayerCache::default() };
        Self { layers: (0..num_layers).map(layer).collect() }
    }

    /// Number of positions it holds.
    pub(crate) fn length(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.length)
    }

    /// Drops all sequences but those of the batch indices `rows`.
    pub(crate) fn keep(&mut self, rows: &Tensor<1, Int>) {
        for layer in &mut self.layers {
            for buffer in [&mut layer.key, &mut layer.value] {
                *buffer = buffer.take().map(|buffer| buffer.select(0, rows.clone()));
            }
        }
    }
}

impl LayerCache {
    /// Adds `[b, n, s, d]` and returns what is there now, `[b, n, t, d]`.
    pub(crate) fn append(&mut self, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let (start, end) = (self.length, self.length + key.dims()[2]);
        self.length = end;
        let capacity = self.capacity.max(end);
        let key = write(&mut self.key, key, capacity, start);
        let value = write(&mut self.value, value, capacity, start);
        (key.narrow(2, 0, end), value.narrow(2, 0, end))
    }
}

/// Writes `rows` at `start`. The buffer is taken out of its place, so that its only owner may change it in place.
fn write(buffer: &mut Option<Tensor<4>>, rows: Tensor<4>, capacity: usize, start: usize) -> Tensor<4> {
    let [b, n, s, d] = rows.dims();
    let empty = || Tensor::zeros([b, n, capacity, d], (&rows.device(), rows.dtype()));
    let full = buffer.take().unwrap_or_else(empty);
    let full = full.slice_assign([0..b, 0..n, start..start + s, 0..d], rows);
    *buffer = Some(full.clone());
    full
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn values(tensor: Tensor<4>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn appended_rows_stand_in_order_and_rows_can_be_dropped() {
        let device = Device::flex();
        let row = |values: [f32; 4]| Tensor::<1>::from_data(values, &device).reshape([2, 1, 2, 1]);
        let mut cache = KvCache::new(1, 3);
        let [layer] = cache.layers.as_mut_slice() else { panic!() };
        layer.append(row([1., 2., 3., 4.]), row([-1., -2., -3., -4.]));
        let one = |values: [f32; 2]| Tensor::<1>::from_data(values, &device).reshape([2, 1, 1, 1]);
        let (key, value) = layer.append(one([5., 6.]), one([-5., -6.]));
        assert_eq!(values(key), [1., 2., 5., 3., 4., 6.]);
        assert_eq!(values(value), [-1., -2., -5., -3., -4., -6.]);
        assert_eq!(cache.length(), 3);
        cache.keep(&Tensor::from_data([1], &device));
        let [layer] = cache.layers.as_mut_slice() else { panic!() };
        assert_eq!(values(layer.key.clone().unwrap()), [3., 4., 6.]);
        assert_eq!(values(layer.value.clone().unwrap()), [-3., -4., -6.]);
    }
}
