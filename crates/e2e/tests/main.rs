//! The product's promises, on the real binaries and the real components. What is started ends with the test; all traffic is on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod access;
mod alerts;
mod bad_inputs;
mod collector;
mod dev;
mod faults;
mod gauges;
mod harness;
mod janitor;
mod layout;
mod lifecycle;
mod linear;
mod page;
mod red;
mod secrets;
mod sources;
mod stores;
mod stranger;
mod traces;
mod transports;
