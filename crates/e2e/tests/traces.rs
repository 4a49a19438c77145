//! Traces read from Jaeger, and the trace of a create.

use std::collections::BTreeMap;

use gauntlet_telemetry::names;
use serde_json::{Value, json};

use crate::harness::{Backend, Manager, World, eventually, local};

#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) id: String,
    pub(crate) parent: Option<String>,
    pub(crate) service: String,
    pub(crate) name: String,
    pub(crate) micros: u64,
    pub(crate) tags: BTreeMap<String, Value>,
}

#[derive(Debug)]
pub(crate) struct Trace {
    spans: Vec<Span>,
}

impl Trace {
    /// Parses a trace of Jaeger's query API.
    pub(crate) fn from_json(trace: &Value) -> Self {
        let spans = trace["spans"].as_array().unwrap().iter().map(|span| Span {
            id: span["spanID"].as_str().unwrap().to_owned(),
            parent: span["references"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|reference| reference["refType"] == "CHILD_OF" && reference["traceID"] == span["traceID"])
                .map(|reference| reference["spanID"].as_str().unwrap().to_owned()),
            service: trace["processes"][span["processID"].as_str().unwrap()]["serviceName"]
                .as_str()
                .unwrap()
                .to_owned(),
            name: span["operationName"].as_str().unwrap().to_owned(),
            micros: span["duration"].as_u64().unwrap(),
            tags: span["tags"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|tag| (tag["key"].as_str().unwrap().to_owned(), tag["value"].clone()))
                .collect(),
        });
        Self { spans: spans.collect() }
    }

    pub(crate) fn find(&self, service: &str, name: &str) -> Option<&Span> {
        self.spans.iter().find(|span| span.service == service && span.name == name)
    }

    fn by_id(&self, id: &str) -> Option<&Span> {
        self.spans.iter().find(|span| span.id == id)
    }

    /// Fails unless exactly one span has no parent in the trace. Others have none while spans are still missing.
    pub(crate) fn check_complete(&self) -> Result<(), String> {
        let roots: Vec<_> =
            self.spans.iter().filter(|span| span.parent.as_deref().and_then(|id| self.by_id(id)).is_none()).collect();
        if roots.len() == 1 { Ok(()) } else { Err(format!("{} roots: {roots:#?}", roots.len())) }
    }

    /// Asserts that the table of telemetry names lists every span and each of its attributes.
    pub(crate) fn assert_documented(&self) {
        for span in &self.spans {
            let is_http = span.tags.contains_key("http.request.method");
            let is_rpc = ["api.v1.", "gauntlet.v1."].iter().any(|package| span.name.starts_with(package));
            let row = match (is_http, is_rpc, span.tags["span.kind"].as_str()) {
                (true, ..) => &names::HTTP_SERVER,
                (_, true, Some("client")) => &names::RPC_CLIENT,
                (_, true, _) => &names::RPC_SERVER,
                _ => names::SPANS
                    .iter()
                    .find(|row| row.name == span.name)
                    .unwrap_or_else(|| panic!("{} is not in the table of span names", span.name)),
            };
            // Jaeger and the SDK add these to every span.
            let added = |key: &str| key == "span.kind" || key == "error" || key.starts_with("otel.");
            for key in span.tags.keys().filter(|key| !added(key)) {
                assert!(row.attributes.contains(&key.as_str()), "{key} is not listed as an attribute of {}", span.name);
            }
        }
    }

    /// Returns the span names from the root to `span`.
    pub(crate) fn path(&self, span: &Span) -> Vec<String> {
        let mut path =
            span.parent.as_deref().and_then(|id| self.by_id(id)).map(|parent| self.path(parent)).unwrap_or_default();
        path.push(span.name.clone());
        path
    }
}

fn create_is_one_trace(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    let created = manager.create_instance("web", "a");
    assert_eq!(created.status, 200, "{}", created.text);
    let trace_id = created.trace_parent.split('-').nth(1).unwrap().to_owned();

    let trace = eventually("the trace is complete", || {
        let response =
            world.stack().jaeger.get(&format!("/api/traces/{trace_id}")).map_err(|error| error.to_string())?;
        let trace = Trace::from_json(response["data"].get(0).ok_or("no trace yet")?);
        for name in
            ["POST /api/v1/instance", "lock.acquire", "lock.hold", "provision.up", "provision.start", "provision.ready"]
        {
            trace.find("gauntlet-manager", name).ok_or_else(|| format!("{name} is missing"))?;
        }
        trace.check_complete()?;
        Ok(trace)
    });
    let span = |name: &str| trace.find("gauntlet-manager", name).unwrap();

    let server = span("POST /api/v1/instance");
    assert_eq!(server.tags["span.kind"], "server");
    assert_eq!(server.tags["http.response.status_code"], 200);
    for name in ["lock.acquire", "lock.hold", "provision.up"] {
        assert_eq!(trace.path(span(name)), ["POST /api/v1/instance", name]);
    }
    assert_eq!(trace.path(span("provision.ready")), ["POST /api/v1/instance", "provision.up", "provision.ready"]);
    let hold = span("lock.hold");
    assert_eq!(hold.tags["lock.kind"], "instance");
    assert!(hold.micros >= span("provision.up").micros, "the lock is held during the launch");
    assert!(server.micros >= hold.micros);
    let acquire = span("lock.acquire");
    assert_eq!(acquire.tags["lock.token"], hold.tags["lock.token"]);
    assert_eq!(acquire.tags["lock.contended"], false);
    assert_eq!(span("provision.up").tags["outcome"], "ok");
    trace.assert_documented();
    if backend == Backend::Embedded {
        refused_requests_have_error_codes(&mut world, &manager);
    }
    let text = format!("{trace:?}");
    let flag = created.json()["flags"][0].as_str().unwrap().to_owned();
    assert!(!text.contains(&flag), "a flag is on a span");
    if backend == Backend::Etcd {
        let txns: Vec<_> = trace.spans.iter().filter(|span| span.name == "etcd.txn").collect();
        for txn in &txns {
            assert_eq!((&txn.tags["span.kind"], &txn.tags["db.system.name"]), (&json!("client"), &json!("etcd")));
        }
        let acquiring = ["POST /api/v1/instance", "lock.acquire", "etcd.txn"];
        assert!(
            txns.iter().any(|txn| trace.path(txn) == acquiring),
            "the intent is not recorded in a transaction of its own"
        );
    }
}

/// Requests that the REST gateway refuses before it makes a call have the error code on their span.
fn refused_requests_have_error_codes(world: &mut World, manager: &Manager) {
    let refused = [
        ("POST", "/api/v1/instance", "{", 400, "INVALID_ARGUMENT"),
        ("POST", "/api/v1/challenge", &" ".repeat((1 << 20) + 1), 400, "BODY_TOO_LONG"),
        ("GET", "/api/v1/challenge/%ff", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/api/v2/challenge", "", 404, "UNKNOWN_PATH"),
        ("DELETE", "/api/v1/challenge", "", 501, "UNKNOWN_METHOD"),
        ("GET", "/api/v1/challenge/none", "", 404, "CHALLENGE_NOT_FOUND"),
    ];
    for (method, path, body, status, code) in refused {
        let response = manager.call(method, path, Some(body.as_bytes()));
        assert_eq!(response.status, status, "{method} {path}: {}", response.text);
        let trace_id = response.trace_parent.split('-').nth(1).unwrap().to_owned();
        let trace = eventually("Jaeger has the span", || {
            let response =
                world.stack().jaeger.get(&format!("/api/traces/{trace_id}")).map_err(|error| error.to_string())?;
            Ok(Trace::from_json(response["data"].get(0).ok_or("no trace yet")?))
        });
        assert_eq!(trace.spans[0].tags["gauntlet.error.code"], code, "{method} {path}");
        trace.assert_documented();
    }
}

#[test]
fn create_is_one_trace_embedded() {
    create_is_one_trace(Backend::Embedded);
}

#[test]
fn create_is_one_trace_etcd() {
    create_is_one_trace(Backend::Etcd);
}
