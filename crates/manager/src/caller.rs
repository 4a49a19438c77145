//! Who makes a call, and why one is denied.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use gauntlet_access::{Challenges, Exceeded, Kind, Name, Principal, RateLimit, Scope};
use gauntlet_domain::{ChallengeId, Clock as _, SourceId};
use gauntlet_telemetry::instruments;

use crate::{call::RuntimeClock, peer::PeerAddress};

/// Who makes a call. An extension of the request; cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Arc<Principal>,
    pub(crate) address: PeerAddress,
    pub(crate) limits: Arc<CallerLimits>,
}

/// The limits that all callers share.
#[derive(Debug)]
pub(crate) struct CallerLimits {
    /// Calls, by caller.
    pub(crate) calls: RateLimit<CallerKey>,
    /// Changes of instances, by source.
    pub(crate) changes: RateLimit<SourceId>,
    pub(crate) denials: instruments::Access,
}

/// Whose calls are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum CallerKey {
    /// The holder of credentials, wherever it calls from.
    Principal(&'static str, Name),
    /// Callers without valid credentials at an address. Of an IPv6 address, the network: a host has all addresses of its own.
    Network(IpAddr),
    /// The same of a user on a unix socket.
    User(u32),
}

impl CallerKey {
    pub(crate) fn of_address(address: PeerAddress) -> Self {
        match address {
            PeerAddress::Unix { uid, .. } => Self::User(uid),
            PeerAddress::Tcp(address) => Self::Network(match address.ip().to_canonical() {
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
                v4 => v4,
            }),
        }
    }

    pub(crate) fn of(principal: &Principal, address: PeerAddress) -> Self {
        match principal.kind {
            Kind::Anonymous => Self::of_address(address),
            kind => Self::Principal(kind.as_str(), principal.name.clone()),
        }
    }
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

    /// Counts a change of an instance of this source.
    pub(crate) fn count_change(&self, source: &SourceId) -> Result<(), Denial> {
        let counted = self.limits.changes.take(source.clone(), RuntimeClock.elapsed()).map_err(Denial::SourceRate);
        counted.inspect_err(|denial| self.limits.denials.record_denial(denial.code()))
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
    /// The caller makes more calls than it may.
    CallRate(Exceeded),
    /// A source's instances are changed more often than they may.
    SourceRate(Exceeded),
}

impl Denial {
    pub(crate) const fn code(&self) -> &'static str {
        match self {
            Self::Missing => "CREDENTIALS_REQUIRED",
            Self::Invalid(_) => "CREDENTIALS_INVALID",
            Self::Expired(_) => "CREDENTIALS_EXPIRED",
            Self::Scope { .. } => "SCOPE_INSUFFICIENT",
            Self::Challenge(_) => "CHALLENGE_NOT_PERMITTED",
            Self::CallRate(_) => "CALL_RATE_EXCEEDED",
            Self::SourceRate(_) => "SOURCE_RATE_EXCEEDED",
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
            Self::CallRate(_) => f.write_str("too many calls of one caller"),
            Self::SourceRate(_) => f.write_str("too many changes of one source's instances"),
        }
    }
}
