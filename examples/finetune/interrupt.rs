//! Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// The exit code of a program that Ctrl-C ended, as shells have it.
pub const EXIT_CODE: u8 = 130;

/// Whether the user wishes an end.
#[derive(Clone, Default)]
pub struct Interrupt {
    is_awaited: Arc<AtomicBool>,
    is_wished: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on, Ctrl-C and SIGTERM end the program at once; after [`await_it`](Self::await_it) they are a wish, and
    /// the second one ends it at once.
    pub fn listen() -> Result<Self> {
        let interrupt = Self::default();
        let Self { is_awaited, is_wished } = interrupt.clone();
        ctrlc::set_handler(move || {
            if !is_awaited.load(Ordering::SeqCst) || is_wished.swap(true, Ordering::SeqCst) {
                std::process::exit(EXIT_CODE.into());
            }
            eprintln!("\nending as soon as nothing is lost; once more to end at once");
        })
        .context("Ctrl-C cannot be listened to")?;
        Ok(interrupt)
    }

    /// From now on there is something to lose, and the program asks [`is_wished`](Self::is_wished).
    pub fn await_it(&self) {
        self.is_awaited.store(true, Ordering::SeqCst);
    }

    /// Whether there was one.
    pub fn is_wished(&self) -> bool {
        self.is_wished.load(Ordering::SeqCst)
    }
}
