//! The table: which scope each call needs.

use axum::extract::MatchedPath;
use gauntlet_access::Scope;
use http::{Method, Request};

/// One RPC, and the REST route that decodes to it.
pub(super) struct Rule {
    /// `package.Service/Method`.
    pub(super) rpc: &'static str,
    /// Method and route.
    pub(super) rest: Option<(&'static str, &'static str)>,
    pub(super) scope: Scope,
    /// Whether it changes something, so that it is in the audit log.
    pub(super) changes: bool,
}

impl Rule {
    /// The name of the method.
    pub(super) fn operation(&self) -> &'static str {
        self.rpc.rsplit('/').next().unwrap_or(self.rpc)
    }
}

const fn rule(rpc: &'static str, rest: Option<(&'static str, &'static str)>, scope: Scope) -> Rule {
    Rule { rpc, rest, scope, changes: !matches!(scope, Scope::Read) }
}

const CHALLENGES: &str = "/api/v1/challenge";
const CHALLENGE: &str = "/api/v1/challenge/{id}";
const INSTANCES: &str = "/api/v1/instance";
const INSTANCE: &str = "/api/v1/instance/{challenge_id}/{source_id}";

/// Every RPC. `DeleteExpired` needs no more than `DeleteInstance`: it deletes less.
pub(super) static RULES: [Rule; 12] = [
    rule("api.v1.challenge.ChallengeStore/CreateChallenge", Some(("POST", CHALLENGES)), Scope::Admin),
    rule("api.v1.challenge.ChallengeStore/RetrieveChallenge", Some(("GET", CHALLENGE)), Scope::Read),
    rule("api.v1.challenge.ChallengeStore/QueryChallenge", Some(("GET", CHALLENGES)), Scope::Read),
    rule("api.v1.challenge.ChallengeStore/UpdateChallenge", Some(("PATCH", CHALLENGE)), Scope::Admin),
    rule("api.v1.challenge.ChallengeStore/DeleteChallenge", Some(("DELETE", CHALLENGE)), Scope::Admin),
    rule("api.v1.instance.InstanceManager/CreateInstance", Some(("POST", INSTANCES)), Scope::Operate),
    rule("api.v1.instance.InstanceManager/RetrieveInstance", Some(("GET", INSTANCE)), Scope::Read),
    rule("api.v1.instance.InstanceManager/QueryInstance", Some(("GET", INSTANCES)), Scope::Read),
    rule("api.v1.instance.InstanceManager/RenewInstance", Some(("PATCH", INSTANCE)), Scope::Operate),
    rule("api.v1.instance.InstanceManager/DeleteInstance", Some(("DELETE", INSTANCE)), Scope::Operate),
    rule("gauntlet.v1.Sweeper/ListExpired", None, Scope::Read),
    rule("gauntlet.v1.Sweeper/DeleteExpired", None, Scope::Operate),
];

/// The RPCs, as `package.Service/Method`: the names that spans may have.
pub(crate) fn rpcs() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rule| rule.rpc)
}

/// What a request needs.
#[derive(Clone, Copy)]
pub(super) enum Need {
    /// The scope of this call.
    Call(&'static Rule),
    /// This scope, for a request that is no call.
    Scope(Scope),
    Health,
    Reflection,
}

/// Returns what a request needs. REST requests are known by their matched route, so the router must have run.
pub(super) fn need<B>(request: &Request<B>) -> Need {
    match request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) {
        Some("/healthcheck") => Need::Health,
        Some(route) => {
            let method = if request.method() == Method::HEAD { "GET" } else { request.method().as_str() };
            let mut rules = RULES.iter().filter_map(|rule| Some((rule, rule.rest.as_ref()?)));
            let known = rules.clone().any(|(_, (_, path))| *path == route);
            match rules.find(|(_, (verb, path))| *verb == method && *path == route) {
                Some((rule, _)) => Need::Call(rule),
                // The response says that the path doesn't have this method.
                None if known => Need::Scope(Scope::Read),
                None => UNLISTED,
            }
        }
        None if super::layer::is_grpc(request) => {
            let path = request.uri().path();
            let rpc = path.strip_prefix('/').unwrap_or(path);
            match RULES.iter().find(|rule| rule.rpc == rpc) {
                Some(rule) => Need::Call(rule),
                None if rpc.starts_with("grpc.health.v1.Health/") => Need::Health,
                None if rpc.starts_with("grpc.reflection.") => Need::Reflection,
                None => UNLISTED,
            }
        }
        // The response says that the path is unknown.
        None => Need::Scope(Scope::Read),
    }
}

/// What a route or an RPC without a row needs: forgetting the row must not open it.
const UNLISTED: Need = Need::Scope(Scope::Admin);
