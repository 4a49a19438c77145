//! Who may make which call. gRPC, gRPC-web and REST are decided here, by one table.
//!
//! The layer ([`AuthorizeLayer`]) checks credentials and scope before the body of a request is read, and adds the [`Caller`] to the request. The
//! handlers get the caller from there, so that none of them runs without one, and check the challenge that the message names.

mod credentials;
mod layer;
mod reloaded;
mod remote_keys;
mod rules;

use std::sync::Arc;

pub(crate) use credentials::Credentials;
use gauntlet_access::Principal;
use gauntlet_domain::Clock as _;
use gauntlet_telemetry::context;
use http::{HeaderMap, header::AUTHORIZATION};
pub(crate) use layer::{AuthorizeLayer, is_grpc};
pub(crate) use rules::rpcs;

use crate::{
    audit,
    call::RuntimeClock,
    caller::{Caller, CallerKey, CallerLimits, Denial},
    config::Openness,
    peer::Peer,
};
use rules::Need;

/// Decides about calls.
#[derive(Clone)]
pub(crate) struct Authorizer {
    credentials: Arc<Credentials>,
    health: Openness,
    reflection: Openness,
    limits: Arc<CallerLimits>,
}

impl Authorizer {
    pub(crate) fn new(
        credentials: Arc<Credentials>,
        (health, reflection): (Openness, Openness),
        limits: CallerLimits,
    ) -> Self {
        Self { credentials, health, reflection, limits: Arc::new(limits) }
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
            self.count_call(CallerKey::of(&caller.principal, caller.address))?;
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
        decided.inspect_err(|denial| self.limits.denials.record_denial(denial.code()))
    }

    /// Authenticates the caller. Credentials that are not valid are refused, also where none are needed: the caller expects them to count.
    fn caller(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Caller, Denial> {
        let peer = peer.ok_or(Denial::Missing)?;
        let principal = self.principal(headers, peer).or_else(|denial| {
            // Guesses are limited too.
            self.count_call(CallerKey::of_address(peer.address)).and(Err(denial))
        })?;
        Ok(Caller { principal, address: peer.address, limits: self.limits.clone() })
    }

    fn count_call(&self, key: CallerKey) -> Result<(), Denial> {
        self.limits.calls.take(key, RuntimeClock.elapsed()).map_err(Denial::CallRate)
    }

    fn principal(&self, headers: &HeaderMap, peer: &Peer) -> Result<Arc<Principal>, Denial> {
        let mut presented = headers.get_all(AUTHORIZATION).into_iter();
        match (presented.next(), presented.next()) {
            (Some(header), None) => self.credentials.by_header(header),
            (Some(_), Some(_)) => Err(Denial::Invalid("more than one authorization header".to_owned())),
            (None, _) => match &peer.certificate {
                Some(certificate) if self.credentials.has_subjects() => self.credentials.by_certificate(certificate),
                // Without a subject file, a certificate that the listener has verified gets what the listener gives everybody.
                _ => {
                    let scope = peer.policy.anonymous.ok_or(Denial::Missing)?;
                    Ok(Arc::new(Principal::anonymous(scope)))
                }
            },
        }
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
