//! Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Whether the user wishes an end.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on, Ctrl-C and SIGTERM are a wish, and the second one ends the program at once.
    pub fn listen() -> Result<Self> {
        let interrupt = Self::default();
        let wished = interrupt.clone();
        ctrlc::set_handler(move || {
            if wished.0.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            eprintln!("\nending after this step; once more to end at once");
        })
        .context("Ctrl-C cannot be listened to")?;
        Ok(interrupt)
    }

    /// Whether there was one.
    pub fn is_wished(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
