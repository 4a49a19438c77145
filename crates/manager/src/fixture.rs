//! The API over the real use cases and an embedded store, with scripted scenarios and a scripted provisioner.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use axum::{Extension, Router, body::Body};
use futures::FutureExt as _;
use gauntlet_access::{Principal, RateLimit, Scope};
use gauntlet_coordination::Coordination;
use gauntlet_domain::{
    Additional, ChallengeId, Error, Fact, Gauntlet, Identity, LaunchPlan, LaunchRequest, Outputs, Pinned, Placement,
    PortSpec, PreparedScenario, ProvisionedInstance, Provisioner, Result, Scenarios, Settings,
};
use gauntlet_telemetry::instruments::Instruments;
use gauntlet_testing::fakes::RecordedFacts;
use http::Request;
use tokio::sync::watch;
use tower::ServiceExt as _;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::Interest,
};

use crate::{
    audit,
    authorize::{Authorizer, Credentials},
    caller::{Caller, CallerLimits},
    config::Openness,
    grpc::Handlers,
    operations::Operations,
    peer::{Peer, PeerAddress, Policy},
    rest::Health,
    signals::Signals,
    tasks::Tasks,
};

/// The API with an empty store.
pub(crate) struct Api {
    handlers: Handlers,
    pub(crate) operations: Operations,
    router: Router,
    signals: Signals,
    facts: Arc<RecordedFacts>,
    _store: tempfile::TempDir,
}

impl Api {
    pub(crate) async fn new() -> Self {
        Logs::keep_events_on();
        let dir = tempfile::tempdir().unwrap();
        let store = Coordination::embedded(&dir.path().join("store"), "replica".into()).await.unwrap();
        let facts = Arc::new(RecordedFacts::default());
        let gauntlet =
            Gauntlet::new(Arc::new(store), Arc::new(Scripted), Arc::new(Scripted), facts.clone(), Settings::default());
        let signals = Signals::default();
        let operations = Operations::new(gauntlet, Tasks::default(), signals.clone(), 100);
        let handlers = Handlers::new(operations.clone());
        let router = crate::rest::router(handlers.clone()).layer(Extension(caller(Scope::Admin)));
        Self { router, handlers, operations, signals, facts, _store: dir }
    }

    pub(crate) fn handlers(&self) -> Handlers {
        self.handlers.clone()
    }

    pub(crate) fn facts(&self) -> Vec<Fact> {
        self.facts.all()
    }

    pub(crate) fn reconcile_is_requested(&self) -> bool {
        self.signals.reconcile_requested().now_or_never().is_some()
    }

    pub(crate) fn router(&self) -> Router {
        self.router.clone()
    }

    /// The whole API behind authorization, for callers on a listener that gives those without credentials the scope `anonymous`.
    pub(crate) fn service(&self, credentials: Credentials, anonymous: Option<Scope>) -> Router {
        let (_, health) = tonic_health::server::health_reporter();
        let rest =
            crate::rest::router(self.handlers()).merge(crate::rest::health::router(watch::channel(Health::Serving).1));
        let instruments = Instruments::noop();
        let openness = (Openness(None), Openness(Some(Scope::Read)));
        let authorizer = Authorizer::new(Arc::new(credentials), openness, limits(0, 0));
        let peer = Peer { address: PEER, certificate: None, policy: Policy { anonymous } };
        crate::server::api(self.handlers(), rest, health, authorizer, &instruments).unwrap().layer(Extension(peer))
    }

    /// The API with the challenge `web`, whose instances live for ten minutes.
    pub(crate) async fn with_challenge() -> Self {
        let api = Self::new().await;
        api.call_ok("POST /api/v1/challenge", r#"{"id":"web","scenario":"reg/web:v1","timeout":"600s"}"#).await;
        api
    }

    /// Like [`Api::with_challenge`], with an instance of `web` for source 7.
    pub(crate) async fn with_instance() -> Self {
        let api = Self::with_challenge().await;
        api.call_ok("POST /api/v1/instance", r#"{"challengeId":"web","sourceId":"7"}"#).await;
        api
    }

    /// Makes a call that must succeed.
    pub(crate) async fn call_ok(&self, line: &str, body: impl Into<Body>) {
        let response = self.call(line, body).await;
        assert!(response.starts_with("200 "), "{line}: {response}");
    }

    /// Makes a call, `METHOD target`, and returns status, content type and body of the response, with `[time]` for times that the server chose.
    pub(crate) async fn call(&self, line: &str, body: impl Into<Body>) -> String {
        call(self.router.clone(), line, body).await
    }

    /// Everything in the store, as a list of challenges.
    pub(crate) async fn stored(&self) -> String {
        self.call("GET /api/v1/challenge", "").await
    }
}

/// Where calls come from.
pub(crate) const PEER: PeerAddress = PeerAddress::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 7)), 4711));

/// A caller without credentials that has this scope.
pub(crate) fn caller(scope: Scope) -> Caller {
    Caller { principal: Arc::new(Principal::anonymous(scope)), address: PEER, limits: Arc::new(limits(0, 0)) }
}

/// Limits on the calls of a caller, and on the changes of a source, per second.
pub(crate) fn limits(calls: u32, changes: u32) -> CallerLimits {
    let denials = Instruments::noop().access;
    CallerLimits { calls: RateLimit::new(calls), changes: RateLimit::new(changes), denials }
}

/// The audit record of a change in a test.
pub(crate) fn record(challenge: &ChallengeId) -> audit::Pending {
    audit::Change::of_challenge("Test", challenge).begin(&caller(Scope::Admin)).unwrap()
}

/// Makes a call like [`Api::call`].
pub(crate) async fn call(router: Router, line: &str, body: impl Into<Body>) -> String {
    let (method, target) = line.split_once(' ').unwrap();
    let request = Request::builder().method(method).uri(target).body(body.into()).unwrap();
    text(router.oneshot(request).await.unwrap()).await
}

/// The response as text, as [`Api::call`] returns it.
pub(crate) async fn text(response: axum::response::Response) -> String {
    let (head, body) = response.into_parts();
    let mut text = head.status.as_u16().to_string();
    for (name, value) in [("", "content-type"), ("allow: ", "allow")] {
        if let Some(value) = head.headers.get(value) {
            write!(text, " {name}{}", value.to_str().unwrap()).unwrap();
        }
    }
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    format!("{text}\n{}", redacted(str::from_utf8(&body).unwrap()))
}

/// Replaces times that the server chose by `[time]`. They must be RFC 3339 in UTC.
fn redacted(body: &str) -> String {
    let mut rest = body;
    let mut text = String::new();
    while let Some((at, name)) = ["\"since\":\"", "\"lastRenew\":\"", "\"until\":\""]
        .iter()
        .filter_map(|name| Some((rest.find(name)?, name)))
        .min()
    {
        let (before, after) = rest.split_at(at + name.len());
        let (time, after) = after.split_at(after.find('"').unwrap());
        let fixed = ["1999", "2999", "9999"].iter().any(|year| time.starts_with(year));
        // jiff cannot parse the last day of the year 9999.
        assert!(time.ends_with('Z') && (fixed || time.parse::<jiff::Timestamp>().is_ok()), "{time}");
        text.push_str(before);
        text.push_str(if fixed { time } else { "[time]" });
        rest = after;
    }
    text + rest
}

/// Scenarios and a provisioner that behave as the scenario's reference says.
pub(crate) struct Scripted;

#[async_trait]
impl Scenarios for Scripted {
    async fn resolve(&self, reference: &str) -> Result<Pinned> {
        let owned = reference.to_owned();
        let problem = || "in scenario.yaml, line 3".to_owned();
        match reference {
            "reg/malformed:" => {
                Err(Error::ReferenceMalformed { reference: owned, problem: "the tag is empty".to_owned() })
            }
            "reg/unreachable" => {
                Err(Error::Registry { reference: owned, detail: "10.0.0.1 refused secret".to_owned() })
            }
            "reg/unknown" => Err(Error::ReferenceNotFound { reference: owned }),
            "reg/wrong" => Err(Error::ScenarioInvalid { reference: owned, problem: problem() }),
            "reg/missing" => Err(Error::ScenarioNotFound { reference: owned, problem: problem() }),
            "reg/unready" => Err(Error::ScenarioPreprocessing { reference: owned, problem: problem() }),
            "reg/away" => Err(Error::Unavailable { what: "registry", detail: "10.0.0.1 timed out".to_owned() }),
            // Another reference gets another digest.
            _ => Ok(Pinned { reference: owned, digest: format!("sha256:{:064x}", reference.len()) }),
        }
    }

    async fn prepare(
        &self,
        scenario: &Pinned,
        identity: &Identity,
        _: Option<&str>,
        additional: &Additional,
    ) -> Result<PreparedScenario> {
        Ok(PreparedScenario::new(scenario, identity, additional))
    }

    async fn render(&self, prepared: &PreparedScenario, placement: &Placement) -> Result<LaunchPlan> {
        let flags: &[&str] = match prepared.scenario.reference.as_str() {
            "reg/fails" => {
                return Err(Error::Provision { step: "start", detail: "/srv/secret: no such file".to_owned() });
            }
            "reg/two" => &["FLAG{1}", "FLAG{2}"],
            _ => &["FLAG{1}"],
        };
        Ok(LaunchPlan {
            command: vec!["true".to_owned()],
            env: prepared.additional.clone(),
            connection_info: format!("http://{}:1337", placement.host),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            ..LaunchPlan::default()
        })
    }
}

#[async_trait]
impl Provisioner for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    async fn reserve(&self, _: &ChallengeId, _: &Identity, _: u64, _: &[PortSpec]) -> Result<Placement> {
        Ok(Placement { host: "host.example".to_owned(), ..Placement::default() })
    }

    async fn up(&self, request: &LaunchRequest) -> Result<Outputs> {
        let LaunchPlan { connection_info, flags, .. } = request.plan.clone();
        Ok(Outputs { connection_info, flags })
    }

    async fn update(&self, request: &LaunchRequest) -> Result<Outputs> {
        self.up(request).await
    }

    async fn down(&self, _: &ChallengeId, _: &Identity, _: u64) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<ProvisionedInstance>> {
        Ok(Vec::new())
    }
}

/// Records the text of warnings and errors, or of everything with one target.
#[derive(Clone, Default)]
pub(crate) struct Logs {
    lines: Arc<Mutex<Vec<String>>>,
    target: Option<&'static str>,
}

impl Logs {
    pub(crate) fn of_target(target: &'static str) -> Self {
        Self { target: Some(target), ..Self::default() }
    }

    /// Makes `tracing` ask a thread's subscriber about each event. Otherwise a test of another thread, which has none, can turn an event off for all
    /// threads while this one records it.
    pub(crate) fn keep_events_on() {
        struct Undecided;

        impl Subscriber for Undecided {
            fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
                Interest::sometimes()
            }

            fn enabled(&self, _: &Metadata<'_>) -> bool {
                false
            }

            fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
                span::Id::from_u64(1)
            }

            fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

            fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

            fn event(&self, _: &Event<'_>) {}

            fn enter(&self, _: &span::Id) {}

            fn exit(&self, _: &span::Id) {}
        }

        // Fails when it has been done before.
        let _ = tracing::subscriber::set_global_default(Undecided);
    }

    /// Records what `work` logs.
    pub(crate) fn record<T>(&self, work: impl FnOnce() -> T) -> T {
        Self::keep_events_on();
        tracing::subscriber::with_default(self.clone(), work)
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// How many lines contain `text`.
    pub(crate) fn containing(&self, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(text)).count()
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{}={value:?} ", field.name()).unwrap();
    }
}

impl Subscriber for Logs {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let is_recorded = self.target.map_or(*metadata.level() <= Level::WARN, |target| metadata.target() == target);
        metadata.is_event() && is_recorded
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.lines.lock().unwrap().push(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
