//! Why a request to a registry failed.

use gauntlet_domain::Error;
use reqwest::StatusCode;

/// Why a request to a registry failed. `Display` is for operators.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The registry has no such repository, manifest or blob.
    #[error("not found")]
    NotFound,
    /// The registry wants credentials, or better ones.
    #[error(
        "access denied; check the credentials for this registry (--oci-username, --oci-password, --docker-config; OCI_USERNAME, OCI_PASSWORD) and the permissions of that user"
    )]
    Denied,
    /// An unexpected status.
    #[error("answered {status}{detail}")]
    Status {
        /// The status.
        status: StatusCode,
        /// The registry's explanation, after a separator; may be empty.
        detail: String,
    },
    /// No response, or a broken one.
    #[error("{0}")]
    Broken(String),
}

impl Failure {
    pub(crate) fn broken(text: impl Into<String>) -> Self {
        Self::Broken(text.into())
    }

    pub(crate) fn of(self, reference: &str) -> Error {
        let reference = reference.to_owned();
        match self {
            Self::NotFound => Error::ReferenceNotFound { reference },
            failure => Error::Registry { reference, detail: one_line(&failure.to_string()) },
        }
    }
}

impl From<reqwest::Error> for Failure {
    /// Without the URL, which may contain a signature.
    fn from(error: reqwest::Error) -> Self {
        Self::Broken(chain(&error.without_url()))
    }
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    one_line(&text)
}

/// At most 500 characters, without control characters.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}
