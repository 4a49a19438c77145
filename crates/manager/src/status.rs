//! Maps domain errors to the gRPC statuses of the contract. The only place that knows status codes.

use std::{error::Error as _, fmt, sync::Arc, time::Duration};

use gauntlet_api::error;
use gauntlet_domain::Error;
use tonic::{Code, Status};

use crate::caller::Denial;

/// Why a call failed: the [source](std::error::Error::source) of its status, for [`report::report_failure`](crate::report::report_failure). Sources are never
/// sent to clients, so this may name hosts, paths and causes.
#[derive(Debug)]
pub(crate) enum Cause {
    /// A use case failed.
    Error(Error),
    /// REST refused the request before a use case ran. The code.
    Refusal(&'static str),
    /// The caller may not make this call.
    Denied(Denial),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => error.fmt(f),
            Self::Refusal(code) => f.write_str(code),
            Self::Denied(denial) => denial.fmt(f),
        }
    }
}

impl std::error::Error for Cause {}

/// When to try again after [`Error::Overloaded`].
const OVERLOAD_DELAY: Duration = Duration::from_secs(1);

/// Returns the status for a call that failed with `error`, which becomes its [`Cause`].
pub(crate) fn status(error: Error) -> Status {
    let mut status = match &error {
        Error::ChallengeExists(id) => error::challenge_already_exists(id.as_str()),
        Error::ChallengeNotFound(id) => error::challenge_not_found(id.as_str()),
        Error::ChallengeExpired(id) => error::challenge_expired(id.as_str()),
        Error::ChallengeNoRenewal(id) => error::challenge_no_renewal(id.as_str()),
        Error::PoolOutOfBounds { min, max, limit } => error::challenge_pooler_out_of_bounds(*min, *max, *limit),
        Error::InvalidUpdateMask(paths) => error::challenge_invalid_update_mask(paths),
        Error::InstanceExists(challenge, source) => error::instance_already_exists(challenge.as_str(), source.as_str()),
        Error::InstanceNotFound(challenge, source) => error::instance_not_found(challenge.as_str(), source.as_str()),
        Error::InstanceExpired(challenge, source) => error::instance_expired(challenge.as_str(), source.as_str()),
        Error::Invalid { field, problem } => error::invalid_field(field, problem),
        Error::ReferenceMalformed { reference, problem } => error::oci_reference_malformed(reference, problem),
        Error::Registry { reference, .. } => error::oci_interaction(reference),
        Error::RegistryNotAllowed { reference, .. } => error::oci_registry_not_allowed(reference),
        Error::ReferenceNotFound { reference } => error::oci_reference_not_found(reference),
        Error::ScenarioInvalid { reference, problem } => error::scenario_non_matching_specification(reference, problem),
        Error::ScenarioNotFound { reference, problem } => error::scenario_not_found(reference, problem),
        Error::ScenarioPreprocessing { reference, problem } => error::scenario_preprocessing(reference, problem),
        Error::Unavailable { .. } | Error::Busy { .. } | Error::Conflict | Error::Fenced(_) => {
            error::unavailable(error.code())
        }
        Error::Overloaded => error::overloaded(error.code(), OVERLOAD_DELAY),
        Error::Provision { .. } | Error::PortTaken { .. } | Error::Internal(_) => error::internal_error(),
    };
    status.set_source(Arc::new(Cause::Error(error)));
    status
}

/// Returns the status for a call that was denied.
pub(crate) fn denied(denial: Denial) -> Status {
    let mut status = match &denial {
        Denial::Missing => error::credentials_required(),
        Denial::Invalid(_) => error::credentials_invalid(),
        Denial::Expired(_) => error::credentials_expired(),
        Denial::Scope { required, granted } => error::scope_insufficient(required.as_str(), granted.as_str()),
        Denial::CallRate(exceeded) => error::call_rate_exceeded(exceeded.retry_after),
        Denial::SourceRate(exceeded) => error::source_rate_exceeded(exceeded.retry_after),
        Denial::Challenge(id) => error::challenge_not_permitted(id.as_str()),
    };
    status.set_source(Arc::new(Cause::Denied(denial)));
    status
}

/// Adds the [`Cause`] to the status of a request that REST refuses before a use case runs.
pub(crate) fn refusal(mut status: Status) -> Status {
    if status.source().is_some() {
        return status;
    }
    let code = match status.code() {
        Code::NotFound => "UNKNOWN_PATH",
        Code::Unimplemented => "UNKNOWN_METHOD",
        Code::DeadlineExceeded => "BODY_TIMEOUT",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        _ => "INTERNAL_ERROR",
    };
    status.set_source(Arc::new(Cause::Refusal(code)));
    status
}

/// The status of a request whose body is too long, with its [`Cause`].
pub(crate) fn body_too_long(limit: usize) -> Status {
    let mut status = Status::invalid_argument(format!("The body is longer than {limit} bytes; send less."));
    status.set_source(Arc::new(Cause::Refusal("BODY_TOO_LONG")));
    status
}

/// Which limit of the server a response says was exceeded: the value of `reason` in the metric.
pub(crate) fn exceeded_limit(status: &Status) -> Option<&'static str> {
    match status.source().and_then(|source| source.downcast_ref::<Cause>()) {
        Some(Cause::Refusal("BODY_TOO_LONG")) => Some("body"),
        Some(Cause::Refusal("BODY_TIMEOUT")) => Some("body_timeout"),
        Some(Cause::Error(Error::Overloaded)) => Some("changes"),
        // tonic refuses messages beyond the length that it decodes. Nothing else has this code.
        _ => (status.code() == Code::OutOfRange).then_some("message"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::error::Error as _;

    use super::*;

    #[test]
    fn exceeded_limits_have_a_reason_for_the_metric() {
        for (status, expected) in [
            (refusal(body_too_long(1)), Some("body")),
            (refusal(Status::deadline_exceeded("")), Some("body_timeout")),
            (super::status(Error::Overloaded), Some("changes")),
            (Status::out_of_range(""), Some("message")),
            (refusal(Status::invalid_argument("")), None),
            (Status::deadline_exceeded(""), None),
        ] {
            assert_eq!(exceeded_limit(&status), expected, "{status:?}");
        }
    }

    #[test]
    fn refused_request_has_the_code_of_its_cause() {
        for (code, expected) in [
            (Code::NotFound, "UNKNOWN_PATH"),
            (Code::Unimplemented, "UNKNOWN_METHOD"),
            (Code::DeadlineExceeded, "BODY_TIMEOUT"),
            (Code::InvalidArgument, "INVALID_ARGUMENT"),
            (Code::Internal, "INTERNAL_ERROR"),
        ] {
            let status = refusal(Status::new(code, ""));
            assert_eq!(status.source().unwrap().to_string(), expected);
        }
    }
}
