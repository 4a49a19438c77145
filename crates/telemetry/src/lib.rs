//! Telemetry of a process: OpenTelemetry bootstrap, the table of names, tower layers, the debug page. It knows nothing
//! of what the process does.
//!
//! A binary calls [`Telemetry::start`] first and [`Telemetry::shutdown`] last. What is measured goes through
//! [`Instruments`] and [`Gauges`], calls through the layers of [`layers`] and [`db`]; all names are in [`names`].
//!
//! The SDK does not implement exemplars; the collector's spanmetrics connector makes them from the spans.

mod config;
pub mod context;
pub mod db;
pub mod debug;
mod env;
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
mod start;
mod subscriber;

pub use self::env::{Env, EnvError};
pub use self::export::{ExportStart, ExportState};
pub use self::gauges::{Gauges, Sample};
pub use self::instruments::Instruments;
pub use self::start::{Error, SHUTDOWN_WITHIN, Settings, Telemetry, Unflushed};
