//! Transposition on the host: files hold a linear weight the other way round than the model.

/// Row-major `[rows, columns]` to row-major `[columns, rows]`, in tiles that stay in the cache.
pub(super) fn transpose<T: Copy + Default>(values: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![T::default(); values.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for column in left..(left + TILE).min(columns) {
                for row in top..(top + TILE).min(rows) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

/// [`transpose`] of elements of `size` bytes.
pub(super) fn transpose_bytes(bytes: &[u8], dims: [usize; 2], size: usize) -> Vec<u8> {
    match size {
        2 => transpose(bytes.as_chunks::<2>().0, dims).into_flattened(),
        8 => transpose(bytes.as_chunks::<8>().0, dims).into_flattened(),
        _ => transpose(bytes.as_chunks::<4>().0, dims).into_flattened(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns_in_tiles_and_beyond_them() {
        for [rows, columns] in [[2, 3], [1, 70], [33, 64], [65, 31]] {
            let values: Vec<u16> = (0..rows * columns).map(|i| i as u16).collect();
            let transposed = transpose(&values, [rows, columns]);
            let expected = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]);
            assert_eq!(transposed, expected.collect::<Vec<_>>(), "{rows} {columns}");
        }
    }

    #[test]
    fn elements_of_every_size_stay_whole() {
        for size in [2_usize, 4, 8] {
            let element = |i: u8| (0..size as u8).map(move |byte| 16 * i + byte);
            let bytes: Vec<u8> = (0..6).flat_map(element).collect();
            let expected: Vec<u8> = [0, 3, 1, 4, 2, 5].into_iter().flat_map(element).collect();
            assert_eq!(transpose_bytes(&bytes, [2, 3], size), expected, "{size}");
        }
    }
}
