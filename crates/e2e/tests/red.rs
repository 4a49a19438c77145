//! Rate, errors, duration: Prometheus counts exactly what was called.

use std::collections::BTreeMap;

use gauntlet_api::v1::instance::{CreateInstanceRequest, RetrieveInstanceRequest};
use serde_json::{Value, json};

use crate::harness::{Backend, Manager, World, eventually, local};

/// What the driver did, by span name: calls, and those that failed by the server's fault.
#[derive(Default)]
struct Count(BTreeMap<String, (u64, u64)>);

impl Count {
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

/// 500 calls, REST and gRPC, refused ones and failing ones among them.
fn drive(world: &World, manager: &Manager) -> Count {
    let mut count = Count::default();
    let create =
        manager.post("/api/v1/challenge", &json!({ "id": "web", "scenario": local("web"), "timeout": "600s" }));
    count.rest("POST /api/v1/challenge", create.status);
    let create = manager.post("/api/v1/challenge", &json!({ "id": "broken", "scenario": local("broken") }));
    count.rest("POST /api/v1/challenge", create.status);
    let mut done = 2;
    let mut source = 0;
    while done < 450 {
        source += 1;
        if source % 6 == 1 {
            count.rest("POST /api/v1/instance", manager.create_instance("web", &source.to_string()).status);
            count.rest("POST /api/v1/instance", manager.create_instance("broken", &source.to_string()).status);
            count.rest(
                "DELETE /api/v1/instance/{challenge_id}/{source_id}",
                manager.delete(&format!("/api/v1/instance/web/{source}")).status,
            );
            done += 3;
        }
        count.rest("GET /api/v1/challenge/{id}", manager.get("/api/v1/challenge/web").status);
        count.rest("GET /api/v1/challenge/{id}", manager.get("/api/v1/challenge/unknown").status);
        count
            .rest("GET /api/v1/instance/{challenge_id}/{source_id}", manager.get("/api/v1/instance/web/nobody").status);
        count.rest(
            "PATCH /api/v1/instance/{challenge_id}/{source_id}",
            manager.patch("/api/v1/instance/web/nobody", &json!({})).status,
        );
        count.rest("GET /api/v1/instance", manager.get("/api/v1/instance?sourceId=1").status);
        done += 5;
    }
    world.runtime.block_on(async {
        let mut client = manager.instances().await;
        while done < 500 {
            let request = RetrieveInstanceRequest { challenge_id: "web".into(), source_id: "nobody".into() };
            let outcome = client.retrieve_instance(request).await.map(drop).map_err(|status| status.code());
            count.grpc("api.v1.instance.InstanceManager/RetrieveInstance", &outcome);
            done += 1;
            if done % 10 == 0 && done < 500 {
                let request = CreateInstanceRequest {
                    challenge_id: "broken".into(),
                    source_id: "g".into(),
                    ..Default::default()
                };
                let outcome = client.create_instance(request).await.map(drop).map_err(|status| status.code());
                count.grpc("api.v1.instance.InstanceManager/CreateInstance", &outcome);
                done += 1;
            }
        }
    });
    count
}

/// The SERVER spans that Prometheus has counted, as the driver counts.
fn counted(world: &mut World) -> Result<BTreeMap<String, (u64, u64)>, String> {
    let calls = "traces_span_metrics_calls_total{service_name=\"gauntlet-manager\",span_kind=\"SPAN_KIND_SERVER\"}";
    let samples = world.stack().prometheus.query(calls).map_err(|error| error.to_string())?;
    let mut counted: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (labels, value) in samples {
        let entry = counted.entry(labels["span_name"].as_str().unwrap_or_default().to_owned()).or_default();
        entry.0 += value as u64;
        entry.1 += if labels["status_code"] == "STATUS_CODE_ERROR" { value as u64 } else { 0 };
    }
    Ok(counted)
}

fn has_data(answer: &Value) -> bool {
    let points = answer["metrics"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|metric| metric["metricPoints"].as_array().cloned());
    points.flatten().any(|point| point["gaugeValue"]["doubleValue"].as_f64().is_some_and(|value| value > 0.0))
}

fn counts_exactly(backend: Backend) {
    let mut world = World::observed(backend);
    let manager = world.manager("m1");
    let count = drive(&world, &manager);
    assert_eq!(count.0.values().map(|(calls, _)| calls).sum::<u64>(), 500);
    assert!(count.0.values().map(|(_, failed)| failed).sum::<u64>() >= 10, "some of them fail");

    eventually("Prometheus has counted every call", || {
        let counted = counted(&mut world)?;
        if counted == count.0 { Ok(()) } else { Err(format!("driver {:?}\nPrometheus {counted:?}", count.0)) }
    });
    // The applications' own histograms agree with the spans.
    eventually("the applications' histograms have counted every call", || {
        let expression =
            "sum(http_server_request_duration_seconds_count) + sum(rpc_server_call_duration_seconds_count)";
        let samples = world.stack().prometheus.query(expression).map_err(|error| error.to_string())?;
        let sum = samples.first().map(|(_, value)| *value);
        if sum == Some(500.0) { Ok(()) } else { Err(format!("{sum:?} of 500")) }
    });

    // A rate is a difference: something must go on while Jaeger is asked.
    let stir = |world: &World| {
        manager.get("/api/v1/challenge/web").ok();
        assert_eq!(manager.create_instance("broken", "a").status, 500);
        assert!(world.janitor(&manager.url).status.success());
        assert!(!world.janitor("127.0.0.1:1").status.success());
    };
    for (service, kind) in [("gauntlet-manager", "server"), ("gauntlet-janitor", "internal")] {
        for metric in ["calls", "errors", "latencies?quantile=0.95"] {
            let (metric, more) = metric.split_once('?').unwrap_or((metric, ""));
            let query = format!(
                "/api/metrics/{metric}?service={service}&spanKind={kind}&lookback=600000&step=5000&ratePer=60000&{more}"
            );
            eventually(&format!("Jaeger's {query}"), || {
                stir(&world);
                let answer = world.stack().jaeger.get(&query).map_err(|error| error.to_string())?;
                if has_data(&answer) { Ok(()) } else { Err(answer.to_string()) }
            });
        }
    }
}

#[test]
fn counts_exactly_embedded() {
    counts_exactly(Backend::Embedded);
}

#[test]
fn counts_exactly_etcd() {
    counts_exactly(Backend::Etcd);
}
