//! Deletes what has expired: once, or on a beat.
//!
//! [`run`] is the whole janitor; the binary adds flags, telemetry and signals. It speaks v1 calls only (`QueryChallenge`,
//! `RetrieveInstance`, `DeleteInstance`), so it serves any v1 server, and keeps nothing between sweeps.
//!
//! An instance has expired when its `until`, or its challenge's, is not after now by this process's clock. One that somebody
//! else deleted first counts as done. A failure never keeps the others from their turn.

mod config;
mod server;
mod service;
mod sweep;

pub use config::{Config, duration};
pub use server::{Channel, NotConnectable, NotServer, Server, code_name, within};
pub use service::{Error, run};
pub use sweep::{FINISH_WITHIN, Summary};
