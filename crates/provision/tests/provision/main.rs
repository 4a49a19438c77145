//! Tests every backend against the contract of its port, and what each guarantees beyond it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod contract;
mod isolation;
mod lifecycle;
mod ports;
mod readiness;
mod spans;
mod supervisors;
mod support;
