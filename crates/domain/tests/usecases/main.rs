//! The use cases on a real store, and on a machine that refuses or takes its time when told to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    unreachable_pub,
    reason = "tests"
)]

mod deadlines;
mod failures;
mod races;
mod rules;
mod world;
