//! What can go wrong, each with a stable code.

use crate::{ChallengeId, SourceId};

/// The result of a use case or a port.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything a use case can answer other than success.
///
/// `Display` is the operator's text and may name hosts, paths and causes; clients are answered from the variant alone. [`Error::code`] is
/// stable: it is `error.type` on spans and metrics and the key of `docs/errors.md`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A challenge of that id is stored already.
    #[error("challenge {0:?} already exists")]
    ChallengeExists(ChallengeId),
    /// No challenge of that id is stored, or it is being deleted.
    #[error("challenge {0:?} not found")]
    ChallengeNotFound(ChallengeId),
    /// The challenge's `until` has passed.
    #[error("challenge {0:?} has expired")]
    ChallengeExpired(ChallengeId),
    /// The challenge has no timeout, so there is nothing to renew by.
    #[error("challenge {0:?} has no timeout to renew by")]
    ChallengeNoRenewal(ChallengeId),
    /// Pool bounds that cannot be met, or above what is allowed here.
    #[error("pool bounds out of range: min {min}, max {max}; at most {limit}")]
    PoolOutOfBounds {
        /// The lower bound asked for.
        min: i64,
        /// The upper bound asked for; 0 is none.
        max: i64,
        /// What neither may exceed.
        limit: i64,
    },
    /// An update mask that names what cannot be updated; all its paths.
    #[error("update mask names unknown paths: {}", .0.join(","))]
    InvalidUpdateMask(Vec<String>),
    /// The source has an instance of this challenge already.
    #[error("instance {0:?}/{1:?} already exists")]
    InstanceExists(ChallengeId, SourceId),
    /// The source has no instance of this challenge.
    #[error("instance {0:?}/{1:?} not found")]
    InstanceNotFound(ChallengeId, SourceId),
    /// The instance's `until` has passed.
    #[error("instance {0:?}/{1:?} has expired")]
    InstanceExpired(ChallengeId, SourceId),
    /// A field of the request is wrong; `problem` names the value and the fix and is shown to the client.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field, as the API names it.
        field: &'static str,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// The text is no OCI reference.
    #[error("scenario reference {reference:?} is malformed: {problem}")]
    ReferenceMalformed {
        /// The reference as given.
        reference: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The registry could not be reached, or refused.
    #[error("registry of {reference:?}: {detail}")]
    Registry {
        /// The reference as given.
        reference: String,
        /// The operator's text.
        detail: String,
    },
    /// The registry has no such reference.
    #[error("registry does not contain {reference:?}")]
    ReferenceNotFound {
        /// The reference as given.
        reference: String,
    },
    /// The scenario breaks its specification; `problem` names line, field and fix and is shown to the client.
    #[error("scenario {reference:?}: {problem}")]
    ScenarioInvalid {
        /// The reference as given.
        reference: String,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// The reference holds no scenario, or is not allowed here; `problem` is shown to the client.
    #[error("scenario {reference:?} not found: {problem}")]
    ScenarioNotFound {
        /// The reference as given.
        reference: String,
        /// Where it was looked for, or why it was not.
        problem: String,
    },
    /// The scenario could not be prepared (unpacked, rendered); `problem` is shown to the client.
    #[error("scenario {reference:?} does not prepare: {problem}")]
    ScenarioPreprocessing {
        /// The reference as given.
        reference: String,
        /// What failed.
        problem: String,
    },
    /// An instance could not be brought up, changed or taken down.
    #[error("provisioning failed at {step}: {detail}")]
    Provision {
        /// The step that failed, of low cardinality.
        step: &'static str,
        /// The operator's text.
        detail: String,
    },
    /// Another program took a reserved port before the instance could use it. A launch with another reservation may work.
    #[error("provisioning failed because another program uses port {port}: {detail}")]
    PortTaken {
        /// The port.
        port: u16,
        /// The operator's text.
        detail: String,
    },
    /// What was read has changed since; the caller reads again. Never reaches a client unless retries run out.
    #[error("the stored state changed meanwhile")]
    Conflict,
    /// Somebody else worked on it for longer than the caller would wait.
    #[error("{what} is busy: waited {waited_ms} ms behind {ahead}")]
    Busy {
        /// What was waited for.
        what: String,
        /// How long, in milliseconds.
        waited_ms: u64,
        /// How many were ahead, the holder included.
        ahead: u64,
    },
    /// The lease behind an ownership ran out, or somebody took over: the commit was refused.
    #[error("ownership of {0} was lost before the commit")]
    Fenced(String),
    /// A dependency (the store, the provisioner's host) does not answer; trying again later may work.
    #[error("{what} is unavailable: {detail}")]
    Unavailable {
        /// The dependency.
        what: &'static str,
        /// The operator's text.
        detail: String,
    },
    /// A fault of ours, or data that does not parse.
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
            Self::ReferenceNotFound { .. } => "OCI_REFERENCE_NOT_FOUND",
            Self::ScenarioInvalid { .. } => "SCENARIO_NON_MATCHING_SPECIFICATION",
            Self::ScenarioNotFound { .. } => "SCENARIO_NOT_FOUND",
            Self::ScenarioPreprocessing { .. } => "SCENARIO_PREPROCESSING",
            Self::Provision { .. } | Self::PortTaken { .. } => "PROVISION_FAILED",
            Self::Conflict => "CONFLICT",
            Self::Busy { .. } => "BUSY",
            Self::Fenced(_) => "FENCED",
            Self::Unavailable { .. } => "UNAVAILABLE",
            Self::Internal(_) => "INTERNAL_ERROR",
        }
    }

    /// Whether the fault is on our side (the answer is in the 5xx range) rather than in the request.
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
    /// Every code that the match above can answer, as written in this file.
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
        assert_eq!(rows, codes(), "docs/errors.md has one row for each code, in the order of the code");
    }
}
