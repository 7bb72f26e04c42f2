//! Keys and values of the tokens a model has already seen.

use burn::tensor::{Int, Tensor};

/// Room behind the first rows. Most answers fit in, so their buffers never grow.
const HEADROOM: usize = 256;

/// One [`LayerCache`] for each block.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
}

/// The keys and values of one block, in buffers that grow when they are full.
#[derive(Debug, Default)]
pub(crate) struct LayerCache {
    headroom: usize,
    maximum: usize,
    length: usize,
    /// `[b, n, capacity, d]`
    key: Option<Tensor<4>>,
    /// `[b, n, capacity, d]`
    value: Option<Tensor<4>>,
}

impl KvCache {
    /// An empty cache for sequences of up to `maximum` tokens. Its memory follows the tokens that are there, so a large
    /// `maximum` costs nothing.
    pub(crate) fn new(num_layers: usize, maximum: usize) -> Self {
        Self::with_headroom(num_layers, HEADROOM, maximum)
    }

    /// As [`new`](Self::new), with room for `headroom` tokens behind the first ones.
    pub(crate) fn with_headroom(num_layers: usize, headroom: usize, maximum: usize) -> Self {
        let layer = |_| LayerCache { headroom, maximum, ..LayerCache::default() };
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
        let capacity = self.capacity(end);
        let key = write(&mut self.key, key, capacity, start);
        let value = write(&mut self.value, value, capacity, start);
        (key.narrow(2, 0, end), value.narrow(2, 0, end))
    }

    /// The capacity for `end` positions. Full buffers double, so that few are ever copied.
    fn capacity(&self, end: usize) -> usize {
        let wanted = match self.key.as_ref().map(|key| key.dims()[2]) {
            Some(capacity) if end <= capacity => return capacity,
            Some(capacity) => capacity.saturating_mul(2),
            None => end.saturating_add(self.headroom),
        };
        wanted.min(self.maximum).max(end)
    }
}

/// Writes `rows` at `start`, in a larger buffer if this one has another capacity. The buffer is taken out of its place,
/// so that its only owner may change it in place.
fn write(buffer: &mut Option<Tensor<4>>, rows: Tensor<4>, capacity: usize, start: usize) -> Tensor<4> {
    let [b, n, s, d] = rows.dims();
    let empty = || Tensor::<4>::zeros([b, n, capacity, d], (&rows.device(), rows.dtype()));
    let full = match buffer.take() {
        Some(full) if full.dims()[2] == capacity => full,
        Some(small) => empty().slice_assign([0..b, 0..n, 0..start, 0..d], small.narrow(2, 0, start)),
        None => empty(),
    };
    let full = full.slice_assign([0..b, 0..n, start..start + s, 0..d], rows);
    *buffer = Some(full.clone());
    full
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn values(tensor: Tensor<4>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn appended_rows_stand_in_order_and_rows_can_be_dropped() {
        let device = Device::default();
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

    /// The capacity of the first block.
    fn capacity(cache: &KvCache) -> usize {
        cache.layers[0].key.as_ref().unwrap().dims()[2]
    }

    #[test]
    fn buffers_grow_up_to_the_maximum_and_keep_their_rows() {
        let device = Device::default();
        let mut cache = KvCache::with_headroom(1, 1, 20);
        let (mut rows, mut capacities) = (vec![100.0_f32, 200.0], vec![]);
        for i in 0..20 {
            let new: Vec<f32> = rows.iter().map(|row| row + i as f32).collect();
            let new = Tensor::<4>::from_data(TensorData::new(new, [rows.len(), 1, 1, 1]), &device);
            let (key, value) = cache.layers[0].append(new.clone(), new * 2.0);
            let expected: Vec<f32> =
                rows.iter().flat_map(|row| (0..=i).map(move |i| row + i as f32)).collect();
            assert_eq!(values(key), expected);
            assert_eq!(values(value), expected.iter().map(|x| x * 2.0).collect::<Vec<_>>());
            capacities.push(capacity(&cache));
            // Some growth before a row goes, and some behind it.
            if i == 4 {
                cache.keep(&Tensor::from_data([1], &device));
                rows.remove(0);
            }
        }
        capacities.dedup();
        assert_eq!(capacities, [2, 4, 8, 16, 20]);
    }

    #[test]
    fn a_large_maximum_takes_no_memory_and_a_small_one_no_more_than_it_needs() {
        let rows = |s: usize| Tensor::<4>::ones([1, 1, s, 1], &Device::default());
        for (maximum, expected) in [(usize::MAX, 3 + HEADROOM), (5, 5), (3, 3)] {
            let mut cache = KvCache::new(1, maximum);
            cache.layers[0].append(rows(3), rows(3));
            assert_eq!(capacity(&cache), expected);
        }
    }
}
