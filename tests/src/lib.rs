//! Helpers of the integration tests: fixtures, tolerances, and parameters by name.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

pub mod fixture;
pub mod parameters;
pub mod tolerance;
pub mod tree;

/// The example in the README compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// The example in the guide as well.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/guide.md")]
struct Guide;

/// And those in the chapter on fine-tuning.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/finetune.md")]
struct Finetune;

/// And that in the chapter on devices.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/devices.md")]
struct Devices;

/// And those in the chapter on several adapters.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/adapters.md")]
struct Adapters;

/// And those in the chapter on methods beyond LoRA.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/methods.md")]
struct Methods;

/// And those that crates.io shows.
#[cfg(doctest)]
#[doc = include_str!("../../crates/burn-peft/README.md")]
#[doc = include_str!("../../crates/burn-peft-llama/README.md")]
#[doc = include_str!("../../crates/burn-peft-ops/README.md")]
struct CrateReadmes;
