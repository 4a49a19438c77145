//! The step of a start that failed.

use std::{fmt, io};

use serde::{Deserialize, Serialize};

/// A step of a start that failed. Nothing of the program has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The step, such as `mount proc`.
    pub step: String,
    /// The kernel's error number, if the step was refused by the kernel.
    pub errno: Option<i32>,
    /// The text of the error.
    pub error: String,
}

impl Failure {
    pub(crate) fn new(step: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        // Errors with a text of their own keep only the kind.
        let denied = error.kind() == io::ErrorKind::PermissionDenied;
        let errno = error.raw_os_error().or(denied.then_some(rustix::io::Errno::PERM.raw_os_error()));
        Self { step: step.into(), errno, error: error.to_string() }
    }

    /// Whether the kernel refused the step with this error.
    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.errno == Some(errno.raw_os_error())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        Self::other(failure)
    }
}

/// Names the step that failed.
pub(crate) trait StepExt<T> {
    fn step(self, step: impl Into<String>) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> StepExt<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(step, error))
    }
}
