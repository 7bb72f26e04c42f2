//! Numbers as people read them.

use indicatif::HumanCount;

/// `1236666368` as `1,236,666,368`.
pub fn thousands(number: usize) -> String {
    HumanCount(number as u64).to_string()
}

/// A size in bytes with a decimal unit.
pub fn bytes(size: usize) -> String {
    let (mut size, mut unit) = (size as f64, "B");
    for larger in ["kB", "MB", "GB"] {
        if size < 1000.0 {
            break;
        }
        (size, unit) = (size / 1000.0, larger);
    }
    if unit == "B" || size >= 100.0 { format!("{size:.0} {unit}") } else { format!("{size:.1} {unit}") }
}

/// Three significant digits, without an exponent where that is short.
pub fn short(number: f64) -> String {
    let magnitude = number.abs();
    match magnitude {
        0.0 => "0".into(),
        1000.0..1e6 => format!("{number:.0}"),
        100.0..1000.0 => format!("{number:.1}"),
        1.0..100.0 => format!("{number:.2}"),
        0.01..1.0 => format!("{number:.3}"),
        _ if magnitude.is_finite() => format!("{number:.1e}"),
        _ => number.to_string(),
    }
}

/// Whole numbers, sorted, as `0-3, 7`.
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = vec![];
    for &number in numbers {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => runs.push((number, number)),
        }
    }
    let told = runs
        .iter()
        .map(|(start, end)| if start == end { start.to_string() } else { format!("{start}-{end}") });
    told.collect::<Vec<_>>().join(", ")
}

/// A count with its noun.
pub fn count(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", thousands(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_readable() {
        assert_eq!(
            (thousands(0), thousands(999), thousands(1234567)),
            ("0".into(), "999".into(), "1,234,567".into())
        );
        assert_eq!(
            (bytes(12), bytes(1234), bytes(538_091_234)),
            ("12 B".into(), "1.2 kB".into(), "538 MB".into())
        );
        let told: Vec<_> = [0.0, 2.0, 0.123456, 31.0, 4.2e-5, 123456.0, f64::NAN].map(short).into();
        assert_eq!(told, ["0", "2.00", "0.123", "31.00", "4.2e-5", "123456", "NaN"]);
        assert_eq!((ranges(&[0, 1, 2, 5, 7, 8]), ranges(&[])), ("0-2, 5, 7-8".into(), String::new()));
        assert_eq!((count(1, "module"), count(1000, "module")), ("1 module".into(), "1,000 modules".into()));
    }
}
