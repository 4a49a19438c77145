//! Deletes expired instances through the API: once, or periodically.
//!
//! [`run`] is the whole janitor; the binary adds flags, telemetry and signals. A sweep reads the instances that have expired and deletes
//! each of them. There are two ways to do that, and a sweep uses the one that the server offers:
//!
//! - `gauntlet.v1.Sweeper`: `ListExpired` costs as much as there are expired instances, and `DeleteExpired` deletes an instance only if it
//!   is still the one that was listed.
//! - Any v1 server: `QueryChallenge` reads all instances, and each expired one is read again by `RetrieveInstance` just before
//!   `DeleteInstance`.
//!
//! The only thing remembered between sweeps is whether the server has `gauntlet.v1.Sweeper`. While managers behind one address are upgraded
//! one by one, the janitor follows whichever manager answers.
//!
//! An instance has expired when the server lists it as expired. Among the instances read by `QueryChallenge`, it has expired when its
//! `until`, or that of its challenge, is not after now by this process's clock. An instance that was deleted by somebody else in the
//! meantime counts as done. A failed deletion does not keep the others from being deleted.

mod config;
mod service;
mod sweep;

pub use config::Config;
pub use service::{Error, run};
pub use sweep::{FINISH_TIMEOUT, Summary};
