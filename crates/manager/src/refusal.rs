//! Requests that are refused before the router sees them.

use tonic::Status;

/// Why a request is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The value of `reason` in the metric.
    pub(crate) reason: &'static str,
    /// The response.
    pub(crate) status: Status,
}
