//! Memory that is freed stays with the process.

/// What mimalloc reads when a process begins; setting it later changes nothing.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// Begins the program again with `MIMALLOC_PURGE_DELAY=-1`, on Unix, unless the variable is set: as `cargo run` does here.
///
/// mimalloc gives memory back that nobody wanted for a second. A training step of more than a second would ask for it
/// again, page by page.
pub fn keep_freed_memory() {
    #[cfg(unix)]
    if std::env::var_os(PURGE_DELAY).is_none() {
        use std::os::unix::process::CommandExt;

        let Ok(program) = std::env::current_exe() else { return };
        // Returns if the program cannot be begun. Then this one goes on, and steps take longer.
        let _ = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(PURGE_DELAY, "-1")
            .exec();
    }
}
