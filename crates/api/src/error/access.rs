//! Errors of callers that may not make a call.

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{RetryInfo, StatusExt as _};

use super::{DOMAIN, info};

/// The caller may not do this, whatever the request says. `reason` is the error's stable code; the contract doesn't list it.
#[must_use]
pub fn forbidden(reason: &str, message: &str) -> Status {
    Status::with_error_details_vec(Code::PermissionDenied, message, [info(DOMAIN, reason, [])])
}

/// CREDENTIALS_REQUIRED: the call has no credentials, and the listener lets nobody in without.
#[must_use]
pub fn credentials_required() -> Status {
    unauthenticated("Credentials are required.", "CREDENTIALS_REQUIRED", "Bearer")
}

/// CREDENTIALS_INVALID: the call has credentials that nobody holds. The reason is the same for all of them.
#[must_use]
pub fn credentials_invalid() -> Status {
    unauthenticated("The credentials are not valid.", "CREDENTIALS_INVALID", r#"Bearer error="invalid_token""#)
}

/// CREDENTIALS_EXPIRED: the credentials were valid until they expired.
#[must_use]
pub fn credentials_expired() -> Status {
    unauthenticated("The credentials have expired.", "CREDENTIALS_EXPIRED", r#"Bearer error="invalid_token""#)
}

/// PLAINTEXT_CREDENTIALS: the call has credentials, which others may have read on the network.
#[must_use]
pub fn plaintext_credentials() -> Status {
    let message =
        "Credentials were sent without TLS: use https://, and replace these credentials, which others may have read.";
    unauthenticated(message, "PLAINTEXT_CREDENTIALS", "Bearer")
}

/// SCOPE_INSUFFICIENT: the call needs the scope `required`, and the caller has `granted`.
#[must_use]
pub fn scope_insufficient(required: &str, granted: &str) -> Status {
    Status::with_error_details_vec(
        Code::PermissionDenied,
        format!("The call needs the scope {required}, and the caller has {granted}."),
        [info(DOMAIN, "SCOPE_INSUFFICIENT", [("required", required), ("granted", granted)])],
    )
}

/// CHALLENGE_NOT_PERMITTED: the caller may not use the challenge, whether it exists or not.
#[must_use]
pub fn challenge_not_permitted(id: &str) -> Status {
    Status::with_error_details_vec(
        Code::PermissionDenied,
        "The caller may not use this challenge.",
        [info(DOMAIN, "CHALLENGE_NOT_PERMITTED", [("id", id)])],
    )
}

/// CALL_RATE_EXCEEDED: the caller makes more calls than it may. Also the header `retry-after`, in whole seconds.
#[must_use]
pub fn call_rate_exceeded(retry_after: Duration) -> Status {
    rate_exceeded("Too many calls; try again later.", "CALL_RATE_EXCEEDED", retry_after)
}

/// SOURCE_RATE_EXCEEDED: more changes of one source's instances than are allowed. Also the header `retry-after`, in whole seconds.
#[must_use]
pub fn source_rate_exceeded(retry_after: Duration) -> Status {
    rate_exceeded("Too many changes of this source's instances; try again later.", "SOURCE_RATE_EXCEEDED", retry_after)
}

fn rate_exceeded(message: &str, reason: &str, retry_after: Duration) -> Status {
    let details = [info(DOMAIN, reason, []), RetryInfo::new(Some(retry_after)).into()];
    let mut status = Status::with_error_details_vec(Code::ResourceExhausted, message, details);
    let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
    status.metadata_mut().insert("retry-after", MetadataValue::from(seconds));
    status
}

/// `challenge` is the value of the header `www-authenticate`, which HTTP requires with 401.
fn unauthenticated(message: &str, reason: &str, challenge: &'static str) -> Status {
    let mut status = Status::with_error_details_vec(Code::Unauthenticated, message, [info(DOMAIN, reason, [])]);
    status.metadata_mut().insert("www-authenticate", MetadataValue::from_static(challenge));
    status
}
