//! Who may make which call. gRPC, gRPC-web and REST are decided here, by one table.
//!
//! The layer ([`AuthorizeLayer`]) checks credentials and scope before the body of a request is read, and adds the [`Caller`] to the request. The
//! handlers get the caller from there, so that none of them runs without one, and check the challenge that the message names.

mod credentials;
mod layer;
mod rules;

use std::{fmt, sync::Arc};

pub(crate) use credentials::Credentials;
use gauntlet_access::{Challenges, Principal, Scope};
use gauntlet_domain::ChallengeId;
use gauntlet_telemetry::{context, instruments};
use http::{HeaderMap, header::AUTHORIZATION};
pub(crate) use layer::{AuthorizeLayer, is_grpc};
pub(crate) use rules::rpcs;

use crate::{
    audit::{self, Change},
    config::Openness,
    peer::{Peer, PeerAddress},
};
use rules::Need;

/// Who makes a call. An extension of the request; cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Arc<Principal>,
    pub(crate) address: PeerAddress,
}

impl Caller {
    /// The caller of a request that [`AuthorizeLayer`] let through.
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

    /// Checks that the caller may make this change, and begins its audit record. A refusal is recorded at once.
    pub(crate) fn begin(&self, change: Change) -> Result<audit::Pending, Denial> {
        let checked = self.check(&change.challenge);
        let record = change.begin(self);
        match checked {
            Ok(()) => Ok(record),
            Err(denial) => {
                record.end(denial.code());
                Err(denial)
            }
        }
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

/// Decides about calls.
#[derive(Clone)]
pub(crate) struct Authorizer {
    credentials: Arc<Credentials>,
    health: Openness,
    reflection: Openness,
    denials: instruments::Access,
}

impl Authorizer {
    pub(crate) fn new(
        credentials: Arc<Credentials>,
        (health, reflection): (Openness, Openness),
        denials: instruments::Access,
    ) -> Self {
        Self { credentials, health, reflection, denials }
    }

    /// Decides about a request. Returns its caller, or `None` if it needs none.
    fn decide<B>(&self, request: &http::Request<B>) -> Result<Option<Caller>, Denial> {
        let need = rules::need(request);
        let required = match need {
            Need::Call(rule) => rule.scope,
            Need::Scope(scope) => scope,
            Need::Health => match self.health.0 {
                Some(scope) => scope,
                None => return Ok(None),
            },
            Need::Reflection => match self.reflection.0 {
                Some(scope) => scope,
                None => return Ok(None),
            },
        };
        let decided = self.caller(request.headers(), request.extensions().get::<Peer>()).and_then(|caller| {
            describe(&caller);
            let granted = caller.principal.scope;
            if granted >= required {
                return Ok(Some(caller));
            }
            let denial = Denial::Scope { required, granted };
            if let Need::Call(rule) = need
                && rule.changes
            {
                audit::record_refusal(&caller, rule.operation(), denial.code());
            }
            Err(denial)
        });
        decided.inspect_err(|denial| self.denials.record_denial(denial.code()))
    }

    /// Authenticates the caller. Credentials that are not valid are refused, also where none are needed: the caller meant to be somebody.
    fn caller(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Caller, Denial> {
        let peer = peer.ok_or(Denial::Missing)?;
        let mut presented = headers.get_all(AUTHORIZATION).into_iter();
        let principal = match (presented.next(), presented.next()) {
            (Some(header), None) => self.credentials.by_header(header)?,
            (Some(_), Some(_)) => return Err(Denial::Invalid("more than one authorization header".to_owned())),
            (None, _) => match &peer.certificate {
                Some(certificate) if self.credentials.has_subjects() => self.credentials.by_certificate(certificate)?,
                // Without a subject file, a certificate that the listener has verified gets what the listener gives everybody.
                _ => Arc::new(Principal::anonymous(peer.policy.anonymous.ok_or(Denial::Missing)?)),
            },
        };
        Ok(Caller { principal, address: peer.address })
    }
}

/// Sets the caller on the span of the call.
fn describe(caller: &Caller) {
    context::set_attribute("enduser.id", caller.principal.name.as_str().to_owned());
    context::set_attribute("gauntlet.access.kind", caller.principal.kind.as_str());
    if let Some(id) = caller.principal.kind.token_id() {
        context::set_attribute("gauntlet.access.token_id", id.to_string());
    }
    context::set_attribute("client.address", audit::address(caller.address));
}

#[cfg(test)]
mod tests;
