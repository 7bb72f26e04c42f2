//! Benchmarks of `burn-peft`; the programs are in `benches/`.
