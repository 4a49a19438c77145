//! The errors of the v1 contract: one constructor for each reason, and their form over REST.
//!
//! Each carries its code, its message and its details (`google.rpc.Status`), so a gRPC server answers with it as it is and a REST
//! server with [`http_status`] and [`body`]. `ErrorInfo.reason` is what clients match on, within its domain. Texts taken from
//! a request are cut to 1024 bytes: they travel in a header.

use std::{borrow::Cow, collections::HashMap};

use prost::Message;
use prost_reflect::DynamicMessage;
use serde::{Serialize, Serializer};
use tonic::{Code, Status};
use tonic_types::{
    BadRequest, ErrorDetail, ErrorInfo, FieldViolation, Help, PreconditionFailure, ResourceInfo, StatusExt, pb,
};

use crate::json;

/// Domain of every reason but those of the registry. Clients match on it.
pub const DOMAIN: &str = "github.com/ctfer-io/chall-manager";
/// Domain of the reasons that start with `OCI_`.
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

/// CHALLENGE_EXPIRED: the challenge's `until` is past, so it gets no new instance.
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

/// CHALLENGE_NO_RENEWAL: the challenge has no `timeout` to renew by.
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

/// CHALLENGE_INVALID_UPDATE_MASK: a path of the mask is no field that an update can change. `paths` are all those of the mask; they are
/// reported as the Go server does, in protobuf's text format.
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

/// INSTANCE_ALREADY_EXISTS: the source has its instance of the challenge.
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

/// INSTANCE_NOT_FOUND: the source has no instance of the challenge, or, on retrieve, there is no such challenge.
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

/// INSTANCE_EXPIRED: too late to renew.
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

/// OCI_REFERENCE_MALFORMED: `why` says what the reference lacks.
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

/// OCI_INTERACTION: the registry cannot be reached or refuses the credentials. Which one is for the operator's log.
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

/// OCI_REFERENCE_NOT_FOUND: the registry answers, and does not have it.
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

/// SCENARIO_NON_MATCHING_SPECIFICATION: `why` names what is wrong in the scenario, where, and the fix.
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

/// SCENARIO_NOT_FOUND: `why` says what is missing: the reference itself, or the directory it names.
#[must_use]
pub fn scenario_not_found(reference: &str, why: &str) -> Status {
    of_scenario(Code::InvalidArgument, "Scenario not found.", DOMAIN, "SCENARIO_NOT_FOUND", reference, why)
}

/// SCENARIO_PREPROCESSING: the scenario is well-formed, and preparing it fails; `why` says at what.
#[must_use]
pub fn scenario_preprocessing(reference: &str, why: &str) -> Status {
    of_scenario(Code::InvalidArgument, "Scenario failed to prepare.", DOMAIN, "SCENARIO_PREPROCESSING", reference, why)
}

/// INTERNAL_ERROR: whatever the client has no part in. What it was belongs in logs and spans.
#[must_use]
pub fn internal_error() -> Status {
    Status::with_error_details_vec(Code::Internal, "An internal error occurred.", [info(DOMAIN, "INTERNAL_ERROR", [])])
}

/// Not now, perhaps later: a dependency does not answer, or others are ahead. `reason` is the error's stable code; the contract
/// has no row for it.
#[must_use]
pub fn unavailable(reason: &str) -> Status {
    Status::with_error_details_vec(
        Code::Unavailable,
        "Not available at the moment; try again.",
        [info(DOMAIN, reason, [])],
    )
}

/// A field whose value is of the right type and still refused (an empty id, a negative timeout): `why` names value and fix. It
/// has no reason of its own in the contract.
#[must_use]
pub fn invalid_field(field: &str, why: &str) -> Status {
    Status::with_error_details_vec(
        Code::InvalidArgument,
        format!("Invalid {}: {}", cut(field), cut(why)),
        [BadRequest::with_violation(cut(field), cut(why)).into()],
    )
}

/// REST only: no such path.
#[must_use]
pub fn unknown_path() -> Status {
    Status::not_found("Not Found")
}

/// REST only: the path is known, with other methods.
#[must_use]
pub fn unknown_method() -> Status {
    Status::unimplemented("Method Not Allowed")
}

impl From<json::DecodeError> for Status {
    fn from(error: json::DecodeError) -> Self {
        Self::invalid_argument(cut(&error.to_string()))
    }
}

/// `ErrorInfo.reason` of an error, for clients; none where it carries none.
#[must_use]
pub fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// The HTTP status that goes with a code.
#[must_use]
pub fn http_status(code: Code) -> http::StatusCode {
    use http::StatusCode as Http;
    match code {
        Code::Ok => Http::OK,
        // Client closed request: not registered, and what gateways answer.
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

/// An error as the body of a REST answer: `{"code":5,"message":"...","details":[...]}`. Details of types other than
/// `google.rpc`'s are left out.
#[must_use]
pub fn body(status: &Status) -> String {
    encode(status, |body| serde_json::to_string(&body))
}

/// An error as the last line of a stream: `{"error":{...}}`, the object as in [`body`], and a line end.
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
    // A foreign detail may hold what JSON cannot; code and message always can.
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

/// Bounds what a request can put into a header.
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
