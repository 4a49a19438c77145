//! From domain errors to the answers of the contract: the only place that knows codes.

use gauntlet_api::error;
use gauntlet_domain::Error;
use gauntlet_telemetry::context;
use tonic::{Code, Status};

/// The answer to a client. What is ours to know (hosts, paths, causes) is logged here and marked on the span, and not in the answer.
pub(crate) fn status(error: &Error) -> Status {
    context::set_attribute("gauntlet.error.code", error.code());
    if error.is_fault() {
        tracing::error!(error.type = error.code(), %error, "call failed");
        context::fail_span(error.to_string());
    } else {
        tracing::debug!(error.type = error.code(), %error, "call refused");
    }
    match error {
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
        Error::Registry { reference, detail } => {
            tracing::warn!(reference, detail, "registry failed");
            error::oci_interaction(reference)
        }
        Error::ReferenceNotFound { reference } => error::oci_reference_not_found(reference),
        Error::ScenarioInvalid { reference, problem } => error::scenario_non_matching_specification(reference, problem),
        Error::ScenarioNotFound { reference, problem } => error::scenario_not_found(reference, problem),
        Error::ScenarioPreprocessing { reference, problem } => error::scenario_preprocessing(reference, problem),
        Error::Unavailable { .. } | Error::Busy { .. } | Error::Conflict | Error::Fenced(_) => {
            error::unavailable(error.code())
        }
        Error::Provision { .. } | Error::Internal(_) => error::internal_error(),
    }
}

/// A request that REST refuses before there is a call: marks the span, as [`status`] does for a call.
pub(crate) fn refused(status: Status) -> Status {
    let code = match status.code() {
        Code::NotFound => "UNKNOWN_PATH",
        Code::Unimplemented => "UNKNOWN_METHOD",
        Code::DeadlineExceeded => "BODY_TIMEOUT",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        _ => "INTERNAL_ERROR",
    };
    context::set_attribute("gauntlet.error.code", code);
    tracing::debug!(error.type = code, message = status.message(), "request refused");
    status
}
