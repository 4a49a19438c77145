//! What tests of several crates share. A dev-dependency only.
//!
//! - [`poll`]: waiting for a condition with a deadline ([`eventually`], [`eventually_blocking`]).
//! - [`fixtures`]: a challenge, an instance, ids and times.
//! - [`call`]: a [`Call`](gauntlet_domain::Call) with fixed time, predictable randomness and a clock that the test moves.
//! - [`fakes`]: the domain's ports in memory: provisioner, scenarios, facts.
//! - [`api`]: a server of the v1 API for tests of clients.
//! - [`gate`]: stopping a task at a named point until the test lets it go on.
//! - [`pool`]: maintaining a challenge's pool in the foreground.
//! - [`processes`]: which processes of a directory or an instance still run, and killing them.
//! - [`webhook`]: an HTTP server that keeps what is posted to it.
//!
//! Everything here panics when something goes wrong: it is for tests alone. Unit tests inside `gauntlet-domain` cannot use this crate, because
//! its types would be those of another build of the domain; integration tests can.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "for tests, which fail by panicking"
)]

pub mod api;
pub mod call;
pub mod fakes;
pub mod fixtures;
pub mod gate;
pub mod poll;
pub mod pool;
pub mod processes;
pub mod webhook;

pub use poll::{Poll, eventually, eventually_blocking};
pub use pool::maintain_pool;
