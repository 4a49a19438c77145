//! Tests every backend against the `Provisioner` contract, and its further guarantees.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod contract;
mod hostile;
mod isolation;
mod lifecycle;
mod limits;
mod ports;
mod readiness;
mod spans;
mod supervisors;
mod support;
