//! Transposition on the host: files hold a linear weight the other way round than the model.

/// Row-major `[rows, columns]` to row-major `[columns, rows]`.
fn transpose<T: Copy + Default>(values: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    put_rows(values, 0, [rows, columns], &mut out, |value| value);
    out
}

/// Puts rows of a row-major matrix `[rows, columns]`, from row `first` on, into its transposed form `out`, in tiles that stay
/// in the cache.
pub(super) fn put_rows<T: Copy, U>(
    values: &[T],
    first: usize,
    [rows, columns]: [usize; 2],
    out: &mut [U],
    convert: impl Fn(T) -> U,
) {
    const TILE: usize = 32;
    let count = values.len() / columns.max(1);
    for top in (0..count).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for column in left..(left + TILE).min(columns) {
                for row in top..(top + TILE).min(count) {
                    out[column * rows + first + row] = convert(values[row * columns + column]);
                }
            }
        }
    }
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
            let expected: Vec<_> = expected.collect();
            assert_eq!(transposed, expected, "{rows} {columns}");
            let mut in_parts = vec![0; values.len()];
            for (i, part) in values.chunks(7 * columns).enumerate() {
                put_rows(part, 7 * i, [rows, columns], &mut in_parts, u32::from);
            }
            assert!(
                in_parts.iter().eq(expected.iter().map(|value| u32::from(*value)).collect::<Vec<_>>().iter())
            );
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
