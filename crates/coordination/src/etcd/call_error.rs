//! Why a call to one endpoint failed, and whether it may have taken effect.

use std::fmt;

use gauntlet_telemetry::layers::code_name;
use tonic::Code;

use crate::kv::KvError;

/// Why one call to one endpoint failed.
#[derive(Debug)]
pub(super) enum CallError {
    Client(etcd_client::Error),
    Deadline,
}

/// What a failed call may have changed.
pub(super) enum Outcome {
    /// The request never reached the endpoint.
    NotSent,
    /// The request may have been applied.
    Unknown,
    /// The endpoint refused the request; nothing changed.
    Refused(KvError),
}

impl From<etcd_client::Error> for CallError {
    fn from(error: etcd_client::Error) -> Self {
        Self::Client(error)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline => f.write_str("no answer in time"),
            Self::Client(etcd_client::Error::GRpcStatus(status)) => {
                write!(f, "{:?}: {}", status.code(), status.message())?;
                // The root cause only: the errors between repeat each other.
                let mut source = std::error::Error::source(status);
                while let Some(error) = source {
                    source = error.source();
                    if source.is_none() {
                        write!(f, ": {error}")?;
                    }
                }
                Ok(())
            }
            Self::Client(error) => error.fmt(f),
        }
    }
}

impl CallError {
    /// The value of `error.type` on spans and metrics.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Deadline => "DEADLINE_EXCEEDED",
            Self::Client(etcd_client::Error::GRpcStatus(status)) => code_name(status.code()),
            Self::Client(_) => "client",
        }
    }

    pub(super) fn outcome(&self) -> Outcome {
        use etcd_client::Error as E;
        let status = match self {
            Self::Client(E::GRpcStatus(status)) => status,
            Self::Client(E::TransportError(_)) => return Outcome::NotSent,
            // The library's error for a keepalive of a lease that doesn't exist.
            Self::Client(E::LeaseKeepAliveError(_)) => return Outcome::Refused(KvError::LeaseNotFound),
            Self::Client(E::InvalidArgs(_) | E::InvalidUri(_) | E::InvalidMetadataValue(_)) => {
                return Outcome::Refused(KvError::Permanent(format!("etcd client: {self}")));
            }
            Self::Client(_) | Self::Deadline => return Outcome::Unknown,
        };
        match status.code() {
            Code::NotFound if status.message().contains("lease not found") => Outcome::Refused(KvError::LeaseNotFound),
            Code::ResourceExhausted if status.message().contains("space exceeded") => {
                Outcome::Refused(KvError::Unavailable(format!(
                    "etcd is out of space and rejects writes: compact and defragment it, or raise --quota-backend-bytes, then disarm \
                     its alarm (etcd: {})",
                    status.message()
                )))
            }
            Code::OutOfRange if status.message().contains("compacted") => Outcome::Refused(KvError::Compacted),
            Code::OutOfRange | Code::ResourceExhausted => {
                Outcome::Refused(KvError::Unavailable(format!("etcd: {}", status.message())))
            }
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented => {
                Outcome::Refused(KvError::Permanent(format!("etcd refused: {}", status.message())))
            }
            _ if never_connected(status) => Outcome::NotSent,
            _ => Outcome::Unknown,
        }
    }
}

fn never_connected(status: &tonic::Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}
