//! Push to and pull from a real registry, and artifacts from a hostile one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod access;
mod cache;
mod credentials;
mod fake;
mod hostile;
mod round_trip;
mod servers;
mod support;
