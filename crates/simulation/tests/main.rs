//! One test target: the simulation, exhaustive models, and property tests against models.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, unreachable_pub, reason = "tests")]

mod etcd;
mod model;
mod properties;
mod simulation;
