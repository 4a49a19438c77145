//! Who makes a call, and why one is denied.

use std::{fmt, sync::Arc};

use gauntlet_access::{Challenges, Principal, Scope};
use gauntlet_domain::ChallengeId;

use crate::peer::PeerAddress;

/// Who makes a call. An extension of the request; cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Arc<Principal>,
    pub(crate) address: PeerAddress,
}

impl Caller {
    /// The caller of a request that [`AuthorizeLayer`](crate::authorize::AuthorizeLayer) let through.
    ///
    /// # Errors
    /// The request didn't pass the layer.
    pub(crate) fn of<M>(request: &tonic::Request<M>) -> Result<Self, Denial> {
        request.extensions().get::<Self>().cloned().ok_or(Denial::Missing)
    }

    /// Makes the request of a handler.
    pub(crate) fn request<M>(self, message: M) -> tonic::Request<M> {
        let mut request = tonic::Request::new(message);
        request.extensions_mut().insert(self);
        request
    }

    /// Whether the caller sees and changes this challenge. It doesn't depend on whether the challenge exists, so that a refusal tells nothing.
    pub(crate) fn may_use(&self, challenge: &ChallengeId) -> bool {
        self.principal.challenges.contain(challenge.as_str())
    }

    /// Whether the caller sees and changes every challenge.
    pub(crate) fn may_use_all(&self) -> bool {
        self.principal.challenges == Challenges::All
    }

    /// Checks that the caller sees and changes this challenge.
    pub(crate) fn check(&self, challenge: &ChallengeId) -> Result<(), Denial> {
        if self.may_use(challenge) { Ok(()) } else { Err(Denial::Challenge(challenge.clone())) }
    }
}

/// Why a call was denied. The text is for operators and has no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Denial {
    /// No credentials, on a listener that requires them.
    Missing,
    /// Credentials that nobody holds, and why.
    Invalid(String),
    /// Credentials that have expired.
    Expired(String),
    /// The scope of the caller is too low.
    Scope { required: Scope, granted: Scope },
    /// The caller is bound to other challenges.
    Challenge(ChallengeId),
}

impl Denial {
    pub(crate) const fn code(&self) -> &'static str {
        match self {
            Self::Missing => "CREDENTIALS_REQUIRED",
            Self::Invalid(_) => "CREDENTIALS_INVALID",
            Self::Expired(_) => "CREDENTIALS_EXPIRED",
            Self::Scope { .. } => "SCOPE_INSUFFICIENT",
            Self::Challenge(_) => "CHALLENGE_NOT_PERMITTED",
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no credentials"),
            Self::Invalid(why) | Self::Expired(why) => f.write_str(why),
            Self::Scope { required, granted } => write!(f, "needs the scope {required}, has {granted}"),
            Self::Challenge(id) => write!(f, "bound to challenges other than {id}"),
        }
    }
}
