//! The Pokémon experiment.
fn main() {}
