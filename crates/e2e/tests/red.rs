//! Rate, errors and duration: Prometheus counts every call exactly once.

use std::collections::BTreeMap;

use gauntlet_api::v1::instance::{CreateInstanceRequest, RetrieveInstanceRequest};
use serde_json::{Value, json};

use crate::harness::{Backend, Manager, World, eventually, local};

/// Calls and server errors by span name.
type CallCounts = BTreeMap<String, (u64, u64)>;

/// The calls that the test made.
#[derive(Default)]
struct Expected(CallCounts);

impl Expected {
    fn rest(&mut self, name: &str, status: u16) {
        let entry = self.0.entry(name.to_owned()).or_default();
        entry.0 += 1;
        entry.1 += u64::from(status >= 500);
    }

    fn grpc(&mut self, name: &str, outcome: &Result<(), tonic::Code>) {
        let entry = self.0.entry(name.to_owned()).or_default();
        entry.0 += 1;
        entry.1 +=
            u64::from(matches!(outcome, Err(tonic::Code::Internal | tonic::Code::Unavailable | tonic::Code::Unknown)));
    }
}

/// Makes 500 calls over REST and gRPC. Some are refused, and some fail.
fn make_calls(world: &World, manager: &Manager) -> Expected {
    let mut expected = Expected::default();
    let create =
        manager.post("/api/v1/challenge", &json!({ "id": "web", "scenario": local("web"), "timeout": "600s" }));
    expected.rest("POST /api/v1/challenge", create.status);
    let create = manager.post("/api/v1/challenge", &json!({ "id": "broken", "scenario": local("broken") }));
    expected.rest("POST /api/v1/challenge", create.status);
    let mut calls = 2;
    let mut source = 0;
    while calls < 450 {
        source += 1;
        if source % 6 == 1 {
            expected.rest("POST /api/v1/instance", manager.create_instance("web", &source.to_string()).status);
            expected.rest("POST /api/v1/instance", manager.create_instance("broken", &source.to_string()).status);
            expected.rest(
                "DELETE /api/v1/instance/{challenge_id}/{source_id}",
                manager.delete(&format!("/api/v1/instance/web/{source}")).status,
            );
            calls += 3;
        }
        expected.rest("GET /api/v1/challenge/{id}", manager.get("/api/v1/challenge/web").status);
        expected.rest("GET /api/v1/challenge/{id}", manager.get("/api/v1/challenge/unknown").status);
        expected
            .rest("GET /api/v1/instance/{challenge_id}/{source_id}", manager.get("/api/v1/instance/web/nobody").status);
        expected.rest(
            "PATCH /api/v1/instance/{challenge_id}/{source_id}",
            manager.patch("/api/v1/instance/web/nobody", &json!({})).status,
        );
        expected.rest("GET /api/v1/instance", manager.get("/api/v1/instance?sourceId=1").status);
        calls += 5;
    }
    world.runtime.block_on(async {
        let mut client = manager.instances().await;
        while calls < 500 {
            let request = RetrieveInstanceRequest { challenge_id: "web".into(), source_id: "nobody".into() };
            let outcome = client.retrieve_instance(request).await.map(drop).map_err(|status| status.code());
            expected.grpc("api.v1.instance.InstanceManager/RetrieveInstance", &outcome);
            calls += 1;
            if calls % 10 == 0 && calls < 500 {
                let request = CreateInstanceRequest {
                    challenge_id: "broken".into(),
                    source_id: "g".into(),
                    ..Default::default()
                };
                let outcome = client.create_instance(request).await.map(drop).map_err(|status| status.code());
                expected.grpc("api.v1.instance.InstanceManager/CreateInstance", &outcome);
                calls += 1;
            }
        }
    });
    expected
}

/// Returns the server spans that Prometheus has counted.
fn counted(world: &mut World) -> Result<CallCounts, String> {
    let query = "traces_span_metrics_calls_total{service_name=\"gauntlet-manager\",span_kind=\"SPAN_KIND_SERVER\"}";
    let samples = world.stack().prometheus.query(query).map_err(|error| error.to_string())?;
    let mut counted: CallCounts = BTreeMap::new();
    for (labels, value) in samples {
        let entry = counted.entry(labels["span_name"].as_str().unwrap_or_default().to_owned()).or_default();
        entry.0 += value as u64;
        entry.1 += if labels["status_code"] == "STATUS_CODE_ERROR" { value as u64 } else { 0 };
    }
    Ok(counted)
}

/// Whether a response of Jaeger's metrics API has a value above zero.
fn has_data(response: &Value) -> bool {
    let points = response["metrics"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|metric| metric["metricPoints"].as_array().cloned());
    points.flatten().any(|point| point["gaugeValue"]["doubleValue"].as_f64().is_some_and(|value| value > 0.0))
}

fn assert_every_call_is_counted(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    let expected = make_calls(&world, &manager);
    assert_eq!(expected.0.values().map(|(calls, _)| calls).sum::<u64>(), 500);
    assert!(expected.0.values().map(|(_, failed)| failed).sum::<u64>() >= 10, "at least ten calls must fail");

    eventually("Prometheus has counted every call", || {
        let counted = counted(&mut world)?;
        if counted == expected.0 { Ok(()) } else { Err(format!("expected {:?}\nPrometheus {counted:?}", expected.0)) }
    });
    // The manager's own histograms agree with the spans.
    eventually("the manager's histograms have counted every call", || {
        let expression =
            "sum(http_server_request_duration_seconds_count) + sum(rpc_server_call_duration_seconds_count)";
        let samples = world.stack().prometheus.query(expression).map_err(|error| error.to_string())?;
        let sum = samples.first().map(|(_, value)| *value);
        if sum == Some(500.0) { Ok(()) } else { Err(format!("{sum:?} of 500")) }
    });

    // Jaeger shows rates, so calls must continue while it is queried.
    let keep_busy = |world: &World| {
        manager.get("/api/v1/challenge/web").ok();
        assert_eq!(manager.create_instance("broken", "a").status, 500);
        assert!(world.janitor(&manager.url).status.success());
        assert!(!world.janitor("127.0.0.1:1").status.success());
    };
    for (service, kind) in [("gauntlet-manager", "server"), ("gauntlet-janitor", "internal")] {
        for metric in ["calls", "errors", "latencies?quantile=0.95"] {
            let (metric, parameters) = metric.split_once('?').unwrap_or((metric, ""));
            let query = format!(
                "/api/metrics/{metric}?service={service}&spanKind={kind}&lookback=600000&step=5000&ratePer=60000&{parameters}"
            );
            eventually(&format!("Jaeger has data for {query}"), || {
                keep_busy(&world);
                let response = world.stack().jaeger.get(&query).map_err(|error| error.to_string())?;
                if has_data(&response) { Ok(()) } else { Err(response.to_string()) }
            });
        }
    }
}

#[test]
fn prometheus_counts_every_call_embedded() {
    assert_every_call_is_counted(Backend::Embedded);
}

#[test]
fn prometheus_counts_every_call_etcd() {
    assert_every_call_is_counted(Backend::Etcd);
}
