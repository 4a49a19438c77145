//! Telemetry of a process: OpenTelemetry set-up, the tables of span and metric names, tower layers and the debug page. It knows nothing of
//! what the process does.
//!
//! A binary calls [`Telemetry::start`] first and [`Telemetry::shutdown`] last. Code records on [`Instruments`] and [`Gauges`]; calls are
//! recorded by the layers in [`layers`] and by [`db`]. All names are in [`names`].
//!
//! The SDK does not support exemplars. The collector's spanmetrics connector derives them from the spans.

mod call;
mod config;
pub mod context;
pub mod db;
pub mod debug;
mod env;
mod error;
mod export;
mod exporters;
pub mod gauges;
pub mod instruments;
pub mod layers;
mod logs;
pub mod names;
mod pipeline;
mod process;
mod resource;
mod runtime;
mod sampler;
mod settings;
mod subscriber;
mod telemetry;

pub use self::env::{Env, EnvError};
pub use self::error::Error;
pub use self::export::{ExportStart, ExportState};
pub use self::gauges::{Gauges, Sample};
pub use self::instruments::Instruments;
pub use self::settings::Settings;
pub use self::subscriber::log_level;
pub use self::telemetry::{FlushTimeout, SHUTDOWN_TIMEOUT, Telemetry};
