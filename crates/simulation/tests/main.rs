//! One target: the simulation, the exhaustive models beside it, and properties against models.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    unreachable_pub,
    reason = "tests: what goes wrong ends them"
)]

mod etcd;
mod model;
mod properties;
mod simulation;
