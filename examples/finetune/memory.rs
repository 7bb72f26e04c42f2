//! The memory of this process.

use crate::ALLOCATOR;

/// What is allocated now, in bytes.
pub fn allocated() -> usize {
    ALLOCATOR.allocated()
}

/// The most that was allocated at any time, in bytes.
pub fn most_allocated() -> usize {
    ALLOCATOR.max_allocated()
}

/// The most that the process had, in bytes, where the system tells: on Linux. The program is in it, and what the
/// allocator keeps of memory that was freed.
pub fn peak_of_process() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Bytes as millions.
pub fn mb(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
