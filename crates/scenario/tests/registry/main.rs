//! Push and pull against a real registry, and what a hostile one may serve.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod access;
mod hostile;
mod round_trip;
mod support;
