//! What the integration tests share: tolerances and fixtures.
