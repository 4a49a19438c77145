//! Traces as Jaeger gives them back, and the tree of a create.

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
    pub(crate) fn of(trace: &Value) -> Self {
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

    /// Every span but one leads to another span of the trace.
    pub(crate) fn whole(&self) -> Result<(), String> {
        let roots: Vec<_> =
            self.spans.iter().filter(|span| span.parent.as_deref().and_then(|id| self.by_id(id)).is_none()).collect();
        if roots.len() == 1 { Ok(()) } else { Err(format!("{} roots: {roots:#?}", roots.len())) }
    }

    /// Every span and every attribute of it has a row in the table of names.
    pub(crate) fn in_the_table(&self) {
        for span in &self.spans {
            let served = span.tags.contains_key("http.request.method");
            let called = ["api.v1.", "gauntlet.v1."].iter().any(|package| span.name.starts_with(package));
            let row = match (served, called, span.tags["span.kind"].as_str()) {
                (true, ..) => &names::HTTP_SERVER,
                (_, true, Some("client")) => &names::RPC_CLIENT,
                (_, true, _) => &names::RPC_SERVER,
                _ => names::SPANS
                    .iter()
                    .find(|row| row.name == span.name)
                    .unwrap_or_else(|| panic!("{} has no row", span.name)),
            };
            // What Jaeger and the SDK add to every span.
            let added = |key: &str| key == "span.kind" || key == "error" || key.starts_with("otel.");
            for key in span.tags.keys().filter(|key| !added(key)) {
                assert!(row.attributes.contains(&key.as_str()), "{key} is not in the row of {}", span.name);
            }
        }
    }

    /// The names from the root to a span.
    pub(crate) fn path(&self, span: &Span) -> Vec<String> {
        let mut path =
            span.parent.as_deref().and_then(|id| self.by_id(id)).map(|parent| self.path(parent)).unwrap_or_default();
        path.push(span.name.clone());
        path
    }
}

fn a_create_is_one_tree(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    let created = manager.create_instance("web", "a");
    assert_eq!(created.status, 200, "{}", created.text);
    let trace_id = created.trace_parent.split('-').nth(1).unwrap().to_owned();

    let trace = eventually("the trace is whole", || {
        let found = world.stack().jaeger.get(&format!("/api/traces/{trace_id}")).map_err(|error| error.to_string())?;
        let trace = Trace::of(found["data"].get(0).ok_or("no trace yet")?);
        for name in
            ["POST /api/v1/instance", "lock.acquire", "lock.hold", "provision.up", "provision.start", "provision.ready"]
        {
            trace.find("gauntlet-manager", name).ok_or_else(|| format!("{name} is missing"))?;
        }
        trace.whole()?;
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
    assert!(hold.micros >= span("provision.up").micros, "the instance is owned while it is brought up");
    assert!(server.micros >= hold.micros);
    let acquire = span("lock.acquire");
    assert_eq!(acquire.tags["lock.token"], hold.tags["lock.token"]);
    assert_eq!(acquire.tags["lock.contended"], false);
    assert_eq!(span("provision.up").tags["outcome"], "ok");
    trace.in_the_table();
    if backend == Backend::Embedded {
        refusals_have_codes(&mut world, &manager);
    }
    let text = format!("{trace:?}");
    let flag = created.json()["flags"][0].as_str().unwrap().to_owned();
    assert!(!text.contains(&flag), "no flag on any span");
    if backend == Backend::Etcd {
        let txns: Vec<_> = trace.spans.iter().filter(|span| span.name == "etcd.txn").collect();
        for txn in &txns {
            assert_eq!((&txn.tags["span.kind"], &txn.tags["db.system.name"]), (&json!("client"), &json!("etcd")));
        }
        let acquiring = ["POST /api/v1/instance", "lock.acquire", "etcd.txn"];
        assert!(txns.iter().any(|txn| trace.path(txn) == acquiring), "the intent is a transaction of its own");
    }
}

/// What REST refuses before there is a call has a code on its span, too.
fn refusals_have_codes(world: &mut World, manager: &Manager) {
    let refused = [
        ("POST", "/api/v1/instance", "{", 400, "INVALID_ARGUMENT"),
        ("POST", "/api/v1/challenge", &" ".repeat((1 << 20) + 1), 400, "INVALID_ARGUMENT"),
        ("GET", "/api/v1/challenge/%ff", "", 400, "INVALID_ARGUMENT"),
        ("GET", "/api/v2/challenge", "", 404, "UNKNOWN_PATH"),
        ("DELETE", "/api/v1/challenge", "", 501, "UNKNOWN_METHOD"),
        ("GET", "/api/v1/challenge/none", "", 404, "CHALLENGE_NOT_FOUND"),
    ];
    for (method, path, body, status, code) in refused {
        let answer = manager.call(method, path, Some(body.as_bytes()));
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text);
        let trace_id = answer.trace_parent.split('-').nth(1).unwrap().to_owned();
        let found = eventually("its span has come", || {
            let found =
                world.stack().jaeger.get(&format!("/api/traces/{trace_id}")).map_err(|error| error.to_string())?;
            Ok(Trace::of(found["data"].get(0).ok_or("no trace yet")?))
        });
        assert_eq!(found.spans[0].tags["gauntlet.error.code"], code, "{method} {path}");
        found.in_the_table();
    }
}

#[test]
fn create_is_one_trace_embedded() {
    a_create_is_one_tree(Backend::Embedded);
}

#[test]
fn create_is_one_trace_etcd() {
    a_create_is_one_tree(Backend::Etcd);
}
