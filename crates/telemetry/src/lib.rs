//! OpenTelemetry bootstrap, the table of names, tower layers, debug page.

mod config;
pub mod context;
pub mod db;
mod env;
pub mod instruments;
pub mod layers;
pub mod names;

pub use self::env::{Env, EnvError};
pub use self::instruments::Instruments;
