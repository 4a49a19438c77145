//! The use cases over a real embedded store and a fake provisioner, both of which can fail or stop on request.
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
mod harness;
mod races;
mod rules;
