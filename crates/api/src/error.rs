//! The errors of the v1 contract: a constructor for each reason, and their REST form.
//!
//! Each has a code, a message and details (`google.rpc.Status`). gRPC servers return it unchanged; REST servers use [`http_status`] and
//! [`body`]. Clients match on `ErrorInfo.reason` within its domain. Text from a request is truncated to 1024 bytes, because gRPC sends it in a
//! header.

mod access;

use std::{borrow::Cow, collections::HashMap, time::Duration};

pub use access::{
    call_rate_exceeded, challenge_not_permitted, credentials_expired, credentials_invalid, credentials_required,
    forbidden, plaintext_credentials, scope_insufficient, source_rate_exceeded,
};
use prost::Message;
use prost_reflect::DynamicMessage;
use serde::{Serialize, Serializer};
use tonic::{Code, Status};
use tonic_types::{
    BadRequest, ErrorDetail, ErrorInfo, FieldViolation, Help, PreconditionFailure, ResourceInfo, RetryInfo, StatusExt,
    pb,
};

use crate::json;

/// The domain of all reasons except the registry's. Clients match on it.
pub const DOMAIN: &str = "github.com/ctfer-io/chall-manager";
/// The domain of the reasons that start with `OCI_`.
pub const DOMAIN_OCI: &str = "github.com/ctfer-io/chall-manager/OCI";

/// CHALLENGE_ALREADY_EXISTS: the id is taken.
#[must_use]
pub fn challenge_already_exists(id: &str) -> Status {
    of_challenge(
        Code::AlreadyExists,
        "Challenge already exists.",
        "CHALLENGE_ALREADY_EXISTS",
        id,
        resource("Challenge", id, "Another challenge has this id."),
    )
}

/// CHALLENGE_NOT_FOUND: no such challenge.
#[must_use]
pub fn challenge_not_found(id: &str) -> Status {
    of_challenge(
        Code::NotFound,
        "Challenge not found.",
        "CHALLENGE_NOT_FOUND",
        id,
        resource("Challenge", id, "No challenge has this id."),
    )
}

/// CHALLENGE_EXPIRED: the challenge's `until` has passed, so it accepts no new instances.
#[must_use]
pub fn challenge_expired(id: &str) -> Status {
    of_challenge(
        Code::FailedPrecondition,
        "Challenge has expired.",
        "CHALLENGE_EXPIRED",
        id,
        precondition("EXPIRATION", "Challenge", "The challenge takes no new instance after its until."),
    )
}

/// CHALLENGE_NO_RENEWAL: the challenge has no `timeout`, so its instances can't be renewed.
#[must_use]
pub fn challenge_no_renewal(id: &str) -> Status {
    of_challenge(
        Code::FailedPrecondition,
        "Challenge does not accept renewal.",
        "CHALLENGE_NO_RENEWAL",
        id,
        precondition("RENEWAL", "Challenge", "The challenge has no timeout, so there is nothing to renew by."),
    )
}

/// CHALLENGE_POOLER_OUT_OF_BOUNDS: a bound of the pool is negative or above `limit`, or `max` is set and below `min`.
#[must_use]
pub fn challenge_pooler_out_of_bounds(min: i64, max: i64, limit: i64) -> Status {
    let mut violations: Vec<_> = [("min", min), ("max", max)]
        .into_iter()
        .filter_map(|(field, bound)| match bound {
            ..0 => Some(violation(field, "MUST_BE_POSITIVE", format!("{field} is {bound}; it must be 0 or more."))),
            _ if bound > limit => Some(violation(
                field,
                "MUST_NOT_EXCEED_LIMIT",
                format!("{field} is {bound}; it must be {limit} or less."),
            )),
            _ => None,
        })
        .collect();
    if violations.is_empty() {
        violations.push(violation(
            "min",
            "INVERTED_BOUNDARIES",
            format!("min is {min}, above max, which is {max}; raise max, or set it to 0 for no bound."),
        ));
    }
    Status::with_error_details_vec(
        Code::InvalidArgument,
        "Pooler configuration out of bounds.",
        [
            info(DOMAIN, "CHALLENGE_POOLER_OUT_OF_BOUNDS", [("min", &*min.to_string()), ("max", &*max.to_string())]),
            BadRequest::new(violations).into(),
        ],
    )
}

/// CHALLENGE_INVALID_UPDATE_MASK: the mask contains a path that an update can't change. `paths` are all paths of the mask; they are reported
/// in protobuf's text format, as the Go server does.
#[must_use]
pub fn challenge_invalid_update_mask<S: AsRef<str>>(paths: &[S]) -> Status {
    let quoted = |path: &S| format!("paths:\"{}\"", path.as_ref().replace('\\', "\\\\").replace('"', "\\\""));
    let mask = paths.iter().map(quoted).collect::<Vec<_>>().join(" ");
    Status::with_error_details_vec(
        Code::InvalidArgument,
        "Invalid update mask.",
        [
            info(
                DOMAIN,
                "CHALLENGE_INVALID_UPDATE_MASK",
                [("update-mask", &*mask)],
            ),
            BadRequest::new(vec![violation(
                "update-mask",
                "INVALID_UPDATE_MASK",
                "The mask names something that an update cannot change; it can change scenario, update_strategy, timeout, \
                 until, additional, min and max.",
            )])
            .into(),
            Help::with_link(
                "What a field mask is.",
                "https://protobuf.dev/reference/protobuf/google.protobuf/#field-mask",
            )
            .into(),
        ],
    )
}

/// INSTANCE_ALREADY_EXISTS: the source already has an instance of the challenge.
#[must_use]
pub fn instance_already_exists(challenge_id: &str, source_id: &str) -> Status {
    of_instance(
        Code::AlreadyExists,
        "Instance already exists.",
        "INSTANCE_ALREADY_EXISTS",
        (challenge_id, source_id),
        instance_resource(
            challenge_id,
            source_id,
            "The source has an instance of this challenge; renew or delete that one.",
        ),
    )
}

/// INSTANCE_NOT_FOUND: the source has no instance of the challenge. On retrieve, also if the challenge doesn't exist.
#[must_use]
pub fn instance_not_found(challenge_id: &str, source_id: &str) -> Status {
    of_instance(
        Code::NotFound,
        "Instance not found.",
        "INSTANCE_NOT_FOUND",
        (challenge_id, source_id),
        instance_resource(challenge_id, source_id, "The source has no instance of this challenge."),
    )
}

/// INSTANCE_EXPIRED: the instance has expired, so it can't be renewed.
#[must_use]
pub fn instance_expired(challenge_id: &str, source_id: &str) -> Status {
    of_instance(
        Code::FailedPrecondition,
        "Instance can't be renewed as it expired.",
        "INSTANCE_EXPIRED",
        (challenge_id, source_id),
        precondition("EXPIRATION", "Instance", "The instance is past its until; delete it and create another."),
    )
}

/// OCI_REFERENCE_MALFORMED: `why` explains what is wrong with the reference.
#[must_use]
pub fn oci_reference_malformed(reference: &str, why: &str) -> Status {
    Status::with_error_details_vec(
        Code::InvalidArgument,
        "OCI reference is malformed.",
        [
            info(DOMAIN_OCI, "OCI_REFERENCE_MALFORMED", [("reference", reference)]),
            resource("Reference", reference, why),
            Help::with_link(
                "How references are written.",
                "https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests",
            )
            .into(),
        ],
    )
}

/// OCI_INTERACTION: the registry can't be reached or rejects the credentials. Details belong in the operator's log.
#[must_use]
pub fn oci_interaction(reference: &str) -> Status {
    of_scenario(
        Code::FailedPrecondition,
        "Registry interaction failed.",
        DOMAIN_OCI,
        "OCI_INTERACTION",
        reference,
        "The registry cannot be reached or refuses the credentials; try again, or ask the operator.",
    )
}

/// OCI_REGISTRY_NOT_ALLOWED: the operator doesn't allow scenarios from the registry or repository.
#[must_use]
pub fn oci_registry_not_allowed(reference: &str) -> Status {
    of_scenario(
        Code::FailedPrecondition,
        "Registry is not allowed.",
        DOMAIN_OCI,
        "OCI_REGISTRY_NOT_ALLOWED",
        reference,
        "Scenarios of this registry or repository are not allowed here; use another registry, or ask the operator.",
    )
}

/// OCI_REFERENCE_NOT_FOUND: the registry doesn't have the reference.
#[must_use]
pub fn oci_reference_not_found(reference: &str) -> Status {
    of_scenario(
        Code::InvalidArgument,
        "Registry does not contain reference.",
        DOMAIN_OCI,
        "OCI_REFERENCE_NOT_FOUND",
        reference,
        "The registry has no such reference; push the scenario, or correct repository, tag or digest.",
    )
}

/// SCENARIO_NON_MATCHING_SPECIFICATION: `why` names the problem in the scenario, its position and the fix.
#[must_use]
pub fn scenario_non_matching_specification(reference: &str, why: &str) -> Status {
    of_scenario(
        Code::InvalidArgument,
        "Scenario does not match the specification.",
        DOMAIN,
        "SCENARIO_NON_MATCHING_SPECIFICATION",
        reference,
        why,
    )
}

/// SCENARIO_NOT_FOUND: `why` names what is missing: the reference, or its directory.
#[must_use]
pub fn scenario_not_found(reference: &str, why: &str) -> Status {
    of_scenario(Code::InvalidArgument, "Scenario not found.", DOMAIN, "SCENARIO_NOT_FOUND", reference, why)
}

/// SCENARIO_PREPROCESSING: the scenario is valid but can't be prepared; `why` explains the failure.
#[must_use]
pub fn scenario_preprocessing(reference: &str, why: &str) -> Status {
    of_scenario(Code::InvalidArgument, "Scenario failed to prepare.", DOMAIN, "SCENARIO_PREPROCESSING", reference, why)
}

/// INTERNAL_ERROR: a fault of the server. The cause belongs in logs and spans.
#[must_use]
pub fn internal_error() -> Status {
    Status::with_error_details_vec(Code::Internal, "An internal error occurred.", [info(DOMAIN, "INTERNAL_ERROR", [])])
}

/// A temporary failure: a dependency doesn't respond, or the lock timeout has passed. `reason` is the error's stable code; the contract doesn't
/// list it.
#[must_use]
pub fn unavailable(reason: &str) -> Status {
    Status::with_error_details_vec(
        Code::Unavailable,
        "Not available at the moment; try again.",
        [info(DOMAIN, reason, [])],
    )
}

/// The server has no capacity for the call; another try may succeed after `delay`. `reason` is the error's stable code.
#[must_use]
pub fn overloaded(reason: &str, delay: Duration) -> Status {
    Status::with_error_details_vec(
        Code::Unavailable,
        "Too many calls at the moment; try again.",
        [info(DOMAIN, reason, []), RetryInfo::new(Some(delay)).into()],
    )
}

/// The caller makes more calls than it may; the next succeeds after `delay`. `reason` is the error's stable code.
#[must_use]
pub fn rate_exceeded(reason: &str, delay: Duration) -> Status {
    Status::with_error_details_vec(
        Code::ResourceExhausted,
        "Too many calls in too short a time; make fewer.",
        [info(DOMAIN, reason, []), RetryInfo::new(Some(delay)).into()],
    )
}

/// HEADERS_TOO_LARGE: the headers of the request are too many or too long.
#[must_use]
pub fn headers_too_large(count: usize, bytes: usize) -> Status {
    Status::with_error_details_vec(
        Code::InvalidArgument,
        format!(
            "The request has more than {count} headers, or more than {bytes} bytes of headers and path; send less."
        ),
        [info(DOMAIN, "HEADERS_TOO_LARGE", [])],
    )
}

/// A field with an invalid value of the right type, such as an empty id or a negative timeout: `why` names the value and the fix. The
/// contract defines no reason for it.
#[must_use]
pub fn invalid_field(field: &str, why: &str) -> Status {
    Status::with_error_details_vec(
        Code::InvalidArgument,
        format!("Invalid {}: {}", cut(field), cut(why)),
        [BadRequest::with_violation(cut(field), cut(why)).into()],
    )
}

/// REST only: the path doesn't exist.
#[must_use]
pub fn unknown_path() -> Status {
    Status::not_found("Not Found")
}

/// REST only: the path exists, but not with this method.
#[must_use]
pub fn unknown_method() -> Status {
    Status::unimplemented("Method Not Allowed")
}

impl From<json::DecodeError> for Status {
    fn from(error: json::DecodeError) -> Self {
        Self::invalid_argument(cut(&error.to_string()))
    }
}

/// Returns the `ErrorInfo.reason` of an error, if it has one.
#[must_use]
pub fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// Returns the HTTP status for a code.
#[must_use]
pub fn http_status(code: Code) -> http::StatusCode {
    use http::StatusCode as Http;
    match code {
        Code::Ok => Http::OK,
        // "Client closed request": not registered, but common in gateways.
        Code::Cancelled => Http::from_u16(499).unwrap_or(Http::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => Http::BAD_REQUEST,
        Code::Unauthenticated => Http::UNAUTHORIZED,
        Code::PermissionDenied => Http::FORBIDDEN,
        Code::NotFound => Http::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => Http::CONFLICT,
        Code::ResourceExhausted => Http::TOO_MANY_REQUESTS,
        Code::Unimplemented => Http::NOT_IMPLEMENTED,
        Code::Unavailable => Http::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => Http::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => Http::INTERNAL_SERVER_ERROR,
    }
}

/// Encodes an error as the body of a REST response: `{"code":5,"message":"...","details":[...]}`. Omits details of types outside of
/// `google.rpc`.
#[must_use]
pub fn body(status: &Status) -> String {
    encode(status, |body| serde_json::to_string(&body))
}

/// Encodes an error as the last line of a stream: `{"error":{...}}` with the object of [`body`], and a line feed.
#[must_use]
pub fn stream_line(status: &Status) -> String {
    #[derive(Serialize)]
    struct Item<'a> {
        error: Body<'a>,
    }
    let mut line = encode(status, |error| serde_json::to_string(&Item { error }));
    line.push('\n');
    line
}

#[derive(Serialize)]
struct Body<'a> {
    code: i32,
    message: &'a str,
    details: Vec<Detail>,
}

struct Detail {
    type_url: String,
    message: DynamicMessage,
}

impl Serialize for Detail {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json::Fields::with_type(&self.type_url, &self.message).serialize(serializer)
    }
}

fn encode(status: &Status, write: impl Fn(Body<'_>) -> serde_json::Result<String>) -> String {
    let body = |details| Body { code: i32::from(status.code()), message: status.message(), details };
    // Some details have no JSON form; code and message always have one.
    write(body(details(status))).or_else(|_| write(body(Vec::new()))).unwrap_or_default()
}

fn details(status: &Status) -> Vec<Detail> {
    pb::Status::decode(status.details())
        .unwrap_or_default()
        .details
        .into_iter()
        .filter_map(|any| {
            let name = any.type_url.rsplit('/').next()?;
            let descriptor = json::descriptor(name).filter(|descriptor| descriptor.package_name() == "google.rpc")?;
            let message = DynamicMessage::decode(descriptor, &*any.value).ok()?;
            Some(Detail { type_url: any.type_url, message })
        })
        .collect()
}

fn of_challenge(code: Code, message: &str, reason: &str, id: &str, detail: ErrorDetail) -> Status {
    Status::with_error_details_vec(code, message, [info(DOMAIN, reason, [("id", id)]), detail])
}

fn of_instance(
    code: Code,
    message: &str,
    reason: &str,
    (challenge_id, source_id): (&str, &str),
    detail: ErrorDetail,
) -> Status {
    let metadata = [("challenge_id", challenge_id), ("source_id", source_id)];
    Status::with_error_details_vec(code, message, [info(DOMAIN, reason, metadata), detail])
}

fn of_scenario(code: Code, message: &str, domain: &str, reason: &str, reference: &str, why: &str) -> Status {
    Status::with_error_details_vec(
        code,
        message,
        [
            info(domain, reason, [("reference", reference)]),
            BadRequest::new(vec![violation("scenario", reason, why)]).into(),
        ],
    )
}

fn info<const N: usize>(domain: &str, reason: &str, metadata: [(&str, &str); N]) -> ErrorDetail {
    let metadata: HashMap<_, _> =
        metadata.into_iter().map(|(key, value)| (key.to_owned(), cut(value).into_owned())).collect();
    ErrorInfo::new(reason, domain, metadata).into()
}

fn resource(kind: &str, name: &str, description: &str) -> ErrorDetail {
    ResourceInfo::new(kind, cut(name), "", cut(description)).into()
}

fn instance_resource(challenge_id: &str, source_id: &str, description: &str) -> ErrorDetail {
    resource("Instance", &format!("{challenge_id}/{source_id}"), description)
}

fn precondition(kind: &str, subject: &str, description: &str) -> ErrorDetail {
    PreconditionFailure::with_violation(kind, format!("{DOMAIN}/{subject}"), description).into()
}

fn violation<'a>(field: &str, reason: &str, description: impl Into<Cow<'a, str>>) -> FieldViolation {
    FieldViolation { reason: reason.to_owned(), ..FieldViolation::new(field, cut(&description.into())) }
}

/// Truncates text from a request, because it is sent in a header.
fn cut(text: &str) -> Cow<'_, str> {
    const BYTES: usize = 1024;
    if text.len() <= BYTES {
        return text.into();
    }
    let kept = text.get(..text.floor_char_boundary(BYTES));
    format!("{}...", kept.unwrap_or_default()).into()
}

#[cfg(test)]
mod tests;
