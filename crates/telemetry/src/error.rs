//! Why telemetry did not start.

use std::fmt::Display;
use std::path::PathBuf;

use crate::config::Otlp;
use crate::env::EnvError;

/// Why telemetry could not start. Errors caused by the environment name the variable and what to set instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable has a value that cannot be used.
    #[error(transparent)]
    Environment(#[from] EnvError),
    /// A file named by a variable could not be read.
    #[error("environment variable {variable}: cannot read {path:?}: {error}")]
    File {
        /// The variable.
        variable: String,
        /// The file.
        path: PathBuf,
        /// The cause.
        error: std::io::Error,
    },
    /// An exporter could not be created.
    #[error("cannot create the exporter to {target}: {reason}")]
    Exporter {
        /// The exporter's endpoint.
        target: String,
        /// The cause.
        reason: String,
    },
    /// The thread that exports could not be started.
    #[error("cannot start the telemetry thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The process has a `tracing` subscriber already.
    #[error("telemetry is already started in this process")]
    AlreadyStarted,
}

impl Error {
    pub(crate) fn exporter(otlp: &Otlp, error: impl Display) -> Self {
        Self::Exporter { target: otlp.endpoint.clone(), reason: error.to_string() }
    }
}
