//! What the system says about this process, on Linux; zeros elsewhere.

use std::fs;

/// Memory and page faults.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process {
    /// Resident memory.
    pub resident_kib: u64,
    /// The most resident memory that there was since the start or [`forget_peak`](Self::forget_peak).
    pub peak_kib: u64,
    /// Pages that the system had to give, without reading a file.
    pub minor_faults: u64,
}

impl Process {
    /// As it is now.
    pub fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Behind the name, which may have spaces: state, then numbers, the eighth of which counts faults.
        let behind_name = stat.rsplit(')').next().unwrap_or_default();
        let minor_faults = behind_name.split_whitespace().nth(7).and_then(|field| field.parse().ok());
        Self { resident_kib: kib("VmRSS:"), peak_kib: kib("VmHWM:"), minor_faults: minor_faults.unwrap_or(0) }
    }

    /// Begins to look for the peak anew.
    pub fn forget_peak() {
        // Where that is not allowed, the peak counts what went before as well.
        let _ = fs::write("/proc/self/clear_refs", "5");
    }
}

/// The middle one, or the mean of the two in the middle; NaN of nothing.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => f64::NAN,
        _ => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}
