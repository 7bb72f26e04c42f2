//! The examples are the programs beside this crate; see `adapter/` and `pokemon/`.
