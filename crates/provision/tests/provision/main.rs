//! Every backend against the contract of the port, and what each promises beyond it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod contract;
mod process;
mod support;
