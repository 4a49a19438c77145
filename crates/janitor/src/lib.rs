//! Deletes what has expired: once, or on a beat.
//!
//! [`run`] is the whole janitor; the binary adds flags, telemetry and signals. It keeps nothing between sweeps but whether the server
//! has `gauntlet.v1.Sweeper`: `ListExpired`, which costs what has expired, and `DeleteExpired`, which deletes an instance only if it is
//! still the one that was listed. Where it has not, everything is read by `QueryChallenge`, and each instance that has expired again by
//! `RetrieveInstance` just before `DeleteInstance`: all v1, so it serves any v1 server. While managers are upgraded one by one it takes
//! whichever way the one that answers has.
//!
//! An instance has expired when the server lists it as that; in what is read by `QueryChallenge`, when its `until`, or its challenge's, is
//! not after now by this process's clock. One that somebody else deleted first counts as done. A failure never keeps the others from
//! their turn.

mod config;
mod service;
mod sweep;

pub use config::Config;
pub use service::{Error, run};
pub use sweep::{FINISH_WITHIN, Summary};
