//! The errors of use cases and ports. Each has a stable code.

use crate::{ChallengeId, SourceId};

/// The result of a use case or a port.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a use case failed or was refused.
///
/// `Display` is for operators and may contain hosts, paths and causes; the response to clients depends only on the variant. [`Error::code`] is
/// stable: it is `error.type` on spans and metrics, and the key in `docs/errors.md`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A challenge of this id exists, perhaps being deleted.
    #[error("challenge {0:?} already exists")]
    ChallengeExists(ChallengeId),
    /// No challenge of this id exists, or it is being deleted.
    #[error("challenge {0:?} not found")]
    ChallengeNotFound(ChallengeId),
    /// The challenge's `until` has passed.
    #[error("challenge {0:?} has expired")]
    ChallengeExpired(ChallengeId),
    /// The challenge has no timeout, so its instances cannot be renewed.
    #[error("challenge {0:?} has no timeout to renew by")]
    ChallengeNoRenewal(ChallengeId),
    /// The pool bounds contradict each other or exceed the limit.
    #[error("pool bounds out of range: min {min}, max {max}; at most {limit}")]
    PoolOutOfBounds {
        /// The requested lower bound.
        min: i64,
        /// The requested upper bound; 0 is none.
        max: i64,
        /// The highest value allowed for either bound.
        limit: i64,
    },
    /// The update mask names paths that cannot be updated. Carries all paths of the mask.
    #[error("update mask names unknown paths: {}", .0.join(","))]
    InvalidUpdateMask(Vec<String>),
    /// The source already has an instance of this challenge.
    #[error("instance {0:?}/{1:?} already exists")]
    InstanceExists(ChallengeId, SourceId),
    /// The source has no instance of this challenge.
    #[error("instance {0:?}/{1:?} not found")]
    InstanceNotFound(ChallengeId, SourceId),
    /// The instance has expired.
    #[error("instance {0:?}/{1:?} has expired")]
    InstanceExpired(ChallengeId, SourceId),
    /// A field of the request is invalid. `problem` is shown to the client.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field, as the API names it.
        field: &'static str,
        /// The value, and what would be valid.
        problem: String,
    },
    /// The text is not an OCI reference.
    #[error("scenario reference {reference:?} is malformed: {problem}")]
    ReferenceMalformed {
        /// The reference as the client gave it.
        reference: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The registry cannot be reached, or refused the request.
    #[error("registry of {reference:?}: {detail}")]
    Registry {
        /// The reference as the client gave it.
        reference: String,
        /// The cause, for operators.
        detail: String,
    },
    /// The operator doesn't allow scenarios from this registry or repository.
    #[error(
        "scenario {reference:?} is refused: {registry} is not an allowed registry; if it should be, pass --registry-allow {registry} \
         (REGISTRY_ALLOW)"
    )]
    RegistryNotAllowed {
        /// The reference as the client gave it.
        reference: String,
        /// The registry's host.
        registry: String,
    },
    /// The registry has no such reference.
    #[error("registry does not contain {reference:?}")]
    ReferenceNotFound {
        /// The reference as the client gave it.
        reference: String,
    },
    /// The scenario does not match its specification. `problem` is shown to the client.
    #[error("scenario {reference:?}: {problem}")]
    ScenarioInvalid {
        /// The reference as the client gave it.
        reference: String,
        /// The line, the field, and what would be valid.
        problem: String,
    },
    /// The reference contains no scenario, or is not allowed here. `problem` is shown to the client.
    #[error("scenario {reference:?} not found: {problem}")]
    ScenarioNotFound {
        /// The reference as the client gave it.
        reference: String,
        /// Where the scenario was searched, or why it was not.
        problem: String,
    },
    /// The scenario could not be unpacked or rendered. `problem` is shown to the client.
    #[error("scenario {reference:?} does not prepare: {problem}")]
    ScenarioPreprocessing {
        /// The reference as the client gave it.
        reference: String,
        /// What failed.
        problem: String,
    },
    /// An instance could not be launched, updated or removed.
    #[error("provisioning failed at {step}: {detail}")]
    Provision {
        /// The step that failed. Few different values: it is an attribute of metrics.
        step: &'static str,
        /// The cause, for operators.
        detail: String,
    },
    /// Another program took a reserved port before the instance could use it. A launch with another reservation may work.
    #[error("provisioning failed because another program uses port {port}: {detail}")]
    PortTaken {
        /// The port.
        port: u16,
        /// The cause, for operators.
        detail: String,
    },
    /// The record has changed since it was read, so that the caller has to read again. Clients get it only after retries until the deadline.
    #[error("the stored state changed meanwhile")]
    Conflict,
    /// Another call held a lock for longer than this one could wait.
    #[error("{what} is busy: waited {waited_ms} ms, queue depth {ahead}")]
    Busy {
        /// The lock.
        what: String,
        /// How long the call waited, in milliseconds.
        waited_ms: u64,
        /// The holder and the waiters ahead of this call.
        ahead: u64,
    },
    /// The lease of a lock guard expired, or another replica took over, so that the commit was refused.
    #[error("ownership of {0} was lost before the commit")]
    Fenced(String),
    /// A dependency, such as the store or the provisioner's host, does not answer. A later attempt may succeed.
    #[error("{what} is unavailable: {detail}")]
    Unavailable {
        /// The dependency.
        what: &'static str,
        /// The cause, for operators.
        detail: String,
    },
    /// More changes are running than this replica accepts.
    #[error("too many changes are running")]
    Overloaded,
    /// A bug, or stored data that cannot be read.
    #[error("internal: {0}")]
    Internal(String),
}

impl Error {
    /// The stable code, in the style of the v1 API's reasons.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ChallengeExists(_) => "CHALLENGE_ALREADY_EXISTS",
            Self::ChallengeNotFound(_) => "CHALLENGE_NOT_FOUND",
            Self::ChallengeExpired(_) => "CHALLENGE_EXPIRED",
            Self::ChallengeNoRenewal(_) => "CHALLENGE_NO_RENEWAL",
            Self::PoolOutOfBounds { .. } => "CHALLENGE_POOLER_OUT_OF_BOUNDS",
            Self::InvalidUpdateMask(_) => "CHALLENGE_INVALID_UPDATE_MASK",
            Self::InstanceExists(..) => "INSTANCE_ALREADY_EXISTS",
            Self::InstanceNotFound(..) => "INSTANCE_NOT_FOUND",
            Self::InstanceExpired(..) => "INSTANCE_EXPIRED",
            Self::Invalid { .. } => "INVALID_ARGUMENT",
            Self::ReferenceMalformed { .. } => "OCI_REFERENCE_MALFORMED",
            Self::Registry { .. } => "OCI_INTERACTION",
            Self::RegistryNotAllowed { .. } => "OCI_REGISTRY_NOT_ALLOWED",
            Self::ReferenceNotFound { .. } => "OCI_REFERENCE_NOT_FOUND",
            Self::ScenarioInvalid { .. } => "SCENARIO_NON_MATCHING_SPECIFICATION",
            Self::ScenarioNotFound { .. } => "SCENARIO_NOT_FOUND",
            Self::ScenarioPreprocessing { .. } => "SCENARIO_PREPROCESSING",
            Self::Provision { .. } | Self::PortTaken { .. } => "PROVISION_FAILED",
            Self::Conflict => "CONFLICT",
            Self::Busy { .. } => "BUSY",
            Self::Fenced(_) => "FENCED",
            Self::Unavailable { .. } => "UNAVAILABLE",
            Self::Overloaded => "OVERLOADED",
            Self::Internal(_) => "INTERNAL_ERROR",
        }
    }

    /// Whether this is a fault of the server (5xx in REST) rather than of the request.
    pub fn is_fault(&self) -> bool {
        matches!(
            self,
            Self::Provision { .. }
                | Self::PortTaken { .. }
                | Self::Conflict
                | Self::Busy { .. }
                | Self::Fenced(_)
                | Self::Unavailable { .. }
                | Self::Internal(_)
        )
    }
}

#[cfg(test)]
mod tests {
    /// Every code that `Error::code` can return, in the order of this file's source.
    fn codes() -> Vec<&'static str> {
        let source = include_str!("error.rs");
        let body =
            source.split("fn code(&self)").nth(1).and_then(|rest| rest.split("fn is_fault").next()).unwrap_or_default();
        body.lines().filter_map(|line| line.split("=> \"").nth(1)?.split('"').next()).collect()
    }

    #[test]
    fn every_code_has_a_row_in_the_documentation() {
        let document = include_str!("../../../docs/errors.md");
        let rows: Vec<&str> = document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        assert_eq!(rows, codes(), "docs/errors.md has one row for each code, in the order of the source");
    }
}
