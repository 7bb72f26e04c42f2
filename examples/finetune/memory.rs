//! The memory of this process, where the system tells: on Linux.

/// What it has now, in bytes.
pub fn now() -> Option<usize> {
    read("VmRSS:")
}

/// The most that it had, in bytes.
pub fn peak() -> Option<usize> {
    read("VmHWM:")
}

/// Bytes as millions.
pub fn mb(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

fn read(entry: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(entry))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
