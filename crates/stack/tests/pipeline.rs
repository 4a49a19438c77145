//! Sends OTLP through the deployed configuration and checks the results in Prometheus, Jaeger and Alertmanager.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::{Duration, Instant, SystemTime};

use gauntlet_stack::{Options, Stack, http};
use gauntlet_testing::{
    Poll,
    webhook::{Notification, WebhookSink},
};
use serde_json::{Value, json};

/// One test for the whole pipeline, because starting the stack takes seconds and most of a small machine's memory bandwidth.
#[test]
fn pushed_metrics_and_spans_reach_their_backends() {
    let mut say = |line: &str| eprintln!("{line}");
    let dir = tempfile::tempdir().unwrap();
    let webhook = WebhookSink::start();
    let mut options = Options::for_tests(dir.path()).unwrap();
    options.webhook = Some(webhook.url().to_owned());
    let mut stack = Stack::start(options, &mut say).unwrap();

    // Without a manager, the alert fires and is delivered.
    let fired = notification(&webhook, "GauntletManagerDown", "firing");
    assert_eq!(fired.path, "/page");
    assert_eq!(fired.body["commonAnnotations"]["runbook_url"], "docs/runbooks/GauntletManagerDown.md");

    // Two managers of different versions read the same store: its gauges are one series, and each manager's own metrics are a series.
    let push = |stack: &Stack, challenges: i64| {
        for (replica, version) in [("a", "1.0.0"), ("b", "1.1.0")] {
            http::post_json(
                &format!("{}/v1/metrics", stack.collector.otlp_http()),
                &metrics(replica, version, challenges),
            )
            .unwrap();
        }
    };
    eventually("challenges is one series with the value that both managers report", || {
        push(&stack, 7);
        let found = stack.prometheus.query("challenges").unwrap();
        found.len() == 1 && found[0].1 == 7.0 && found[0].0["service_name"] == "gauntlet-manager"
    });
    eventually("challenges has the new value", || {
        push(&stack, 8);
        stack.prometheus.query("challenges").unwrap().iter().map(|(_, value)| *value).eq([8.0])
    });
    for (query, series) in [
        ("instances{challenge=\"web\",state=\"ready\",pool=\"false\"}", 1),
        ("gauntlet_instances_overdue", 1),
        ("process_uptime_seconds{service_name=\"gauntlet-manager\",job=\"gauntlet-manager\"}", 2),
        ("count by (instance) (process_uptime_seconds{instance=~\"a|b\"})", 2),
        ("gauntlet_lock_wait_duration_seconds_bucket{le=\"0.1\",lock_kind=\"instance\"}", 2),
        ("rpc_server_call_duration_seconds_count{rpc_method=\"api.v1.instance.InstanceManager/CreateInstance\"}", 2),
        ("gauntlet_pool_claims_total", 2),
        ("gauntlet_lock_waiters", 2),
        ("target_info{job=\"gauntlet-manager\",host_name=\"h\"}", 2),
    ] {
        push(&stack, 8);
        let found = stack.prometheus.query(query).unwrap();
        assert_eq!(found.len(), series, "{query}: {found:?}");
    }
    let resolved = notification(&webhook, "GauntletManagerDown", "resolved");
    assert_eq!(resolved.body["status"], "resolved");

    // Spans are counted by operation and status, and stored as a trace.
    for number in 0..10 {
        http::post_json(&format!("{}/v1/traces", stack.collector.otlp_http()), &span(number, number < 3)).unwrap();
    }
    let calls = "sum by (status_code) (traces_span_metrics_calls_total{service_name=\"gauntlet-manager\",span_kind=\"SPAN_KIND_SERVER\",\
                 span_name=\"api.v1.instance.InstanceManager/CreateInstance\"})";
    eventually("seven calls succeeded and three failed", || {
        push(&stack, 8);
        let found = stack.prometheus.query(calls).unwrap();
        let of = |status: &str| {
            found.iter().filter(|(labels, _)| labels["status_code"] == status).map(|(_, value)| *value).sum::<f64>()
        };
        found.len() == 2 && of("STATUS_CODE_UNSET") == 7.0 && of("STATUS_CODE_ERROR") == 3.0
    });
    let series = stack.prometheus.query("traces_span_metrics_calls_total").unwrap();
    assert_eq!(series.len(), 2, "unexpected labels: {series:?}");
    assert_eq!(series.iter().filter(|(labels, _)| labels["error_type"] == "INTERNAL_ERROR").count(), 1);
    let under_50_ms =
        "sum(traces_span_metrics_duration_milliseconds_bucket{service_name=\"gauntlet-manager\",le=~\"50|50.0\"})";
    assert_eq!(stack.prometheus.query(under_50_ms).unwrap()[0].1, 10.0);

    eventually("Jaeger has the trace", || {
        let found = stack.jaeger.get("/api/traces/000000000000000000000000000000a1").unwrap_or_default();
        found["data"][0]["spans"][0]["operationName"] == "api.v1.instance.InstanceManager/CreateInstance"
    });
    assert_eq!(stack.jaeger.get("/api/services").unwrap()["data"], json!(["gauntlet-manager"]));

    // A rate needs two scrapes with a change between them.
    let mut number = 10;
    for kind in ["calls", "errors", "latencies"] {
        let quantile = if kind == "latencies" { "&quantile=0.95" } else { "" };
        let query = format!(
            "/api/metrics/{kind}?service=gauntlet-manager&groupByOperation=true&ratePer=60000&step=5000&lookback=600000{quantile}"
        );
        eventually(&format!("Jaeger answers {kind} from Prometheus"), || {
            push(&stack, 8);
            number += 1;
            http::post_json(
                &format!("{}/v1/traces", stack.collector.otlp_http()),
                &span(number, number.is_multiple_of(2)),
            )
            .unwrap();
            let answer = stack.jaeger.get(&query).unwrap();
            let points = answer.pointer("/metrics/0/metricPoints").and_then(Value::as_array);
            points.is_some_and(|points| {
                points.iter().any(|point| point.pointer("/gaugeValue/doubleValue").is_some_and(Value::is_number))
            })
        });
    }

    // A killed collector restarts on the same ports, and data flows again.
    stack.collector.process.kill().unwrap();
    assert!(http::post_json(&format!("{}/v1/traces", stack.collector.otlp_http()), &span(1, false)).is_err());
    stack.collector.process.start().unwrap();
    eventually("challenges has a value again", || {
        push(&stack, 9);
        stack.prometheus.query("challenges").unwrap().iter().map(|(_, value)| *value).eq([9.0])
    });

    // When managers stop reporting, their series go stale and the alert fires again.
    eventually("the managers' series are stale", || {
        stack.prometheus.query("challenges or process_uptime_seconds").unwrap().is_empty()
    });
    notification(&webhook, "GauntletManagerDown", "firing");
    assert!(!stack.alertmanager.alerts().unwrap().as_array().unwrap().is_empty());
}

/// Polls for at most 90 seconds, and prints how long it took.
fn eventually(what: &str, condition: impl FnMut() -> bool) {
    let started = Instant::now();
    Poll::within(Duration::from_secs(90)).every(Duration::from_millis(300)).until_blocking(what, condition);
    eprintln!("{what}: after {:.1} s", started.elapsed().as_secs_f64());
}

fn now_nanos() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()
}

fn attributes(pairs: &[(&str, &str)]) -> Value {
    pairs.iter().map(|(key, value)| json!({"key": key, "value": {"stringValue": value}})).collect()
}

fn resource(replica: &str) -> Value {
    let pairs = [
        ("service.name", "gauntlet-manager"),
        ("service.instance.id", replica),
        ("host.name", "h"),
        ("process.pid", replica),
    ];
    json!({ "attributes": attributes(&pairs) })
}

fn metrics(replica: &str, version: &str, challenges: i64) -> Value {
    let now = now_nanos().to_string();
    let start = (now_nanos() - 1_000_000_000).to_string();
    let number = |value: i64, labels: &[(&str, &str)]| json!([{"timeUnixNano": now, "startTimeUnixNano": start, "asInt": value.to_string(), "attributes": attributes(labels)}]);
    let gauge =
        |name: &str, unit: &str, points: Value| json!({"name": name, "unit": unit, "gauge": {"dataPoints": points}});
    let sum = |name: &str, unit: &str, monotonic: bool| json!({"name": name, "unit": unit, "sum": {"aggregationTemporality": 2, "isMonotonic": monotonic, "dataPoints": number(4, &[])}});
    let histogram = |name: &str, labels: &[(&str, &str)]| {
        let point = json!([{"timeUnixNano": now, "startTimeUnixNano": start, "count": "3", "sum": 0.2, "explicitBounds": [0.1, 1.0],
            "bucketCounts": ["2", "1", "0"], "attributes": attributes(labels)}]);
        json!({"name": name, "unit": "s", "histogram": {"aggregationTemporality": 2, "dataPoints": point}})
    };
    let instance = [("challenge", "web"), ("state", "ready"), ("pool", "false")];
    json!({"resourceMetrics": [{"resource": resource(replica), "scopeMetrics": [{
        "scope": {"name": "gauntlet", "version": version},
        "metrics": [
            gauge("challenges", "{challenge}", number(challenges, &[])),
            gauge("instances", "{instance}", number(2, &instance)),
            gauge("gauntlet.instances.overdue", "{instance}", number(0, &[])),
            gauge("process.uptime", "s", number(5, &[])),
            sum("gauntlet.pool.claims", "{claim}", true),
            sum("gauntlet.lock.waiters", "{waiter}", false),
            histogram("gauntlet.lock.wait.duration", &[("lock.kind", "instance")]),
            histogram("rpc.server.call.duration", &[("rpc.method", "api.v1.instance.InstanceManager/CreateInstance")]),
        ],
    }]}]})
}

fn span(number: u32, failed: bool) -> Value {
    let end = now_nanos();
    let labels: &[(&str, &str)] = if failed { &[("error.type", "INTERNAL_ERROR")] } else { &[] };
    json!({"resourceSpans": [{"resource": resource(if number.is_multiple_of(2) { "a" } else { "b" }), "scopeSpans": [{"scope": {"name": "gauntlet"}, "spans": [{
        "traceId": format!("{:032x}", 0xa0 + number), "spanId": format!("{:016x}", 0xb0 + number),
        "name": "api.v1.instance.InstanceManager/CreateInstance", "kind": 2,
        "startTimeUnixNano": (end - 30_000_000).to_string(), "endTimeUnixNano": end.to_string(),
        "status": {"code": if failed { 2 } else { 0 }}, "attributes": attributes(labels),
    }]}]}]})
}

/// Waits for a notification with this alert and status.
fn notification(webhook: &WebhookSink, alert: &str, status: &str) -> Notification {
    webhook.wait_for(Duration::from_secs(90), &format!("{alert} is {status}"), |notification| {
        let body = &notification.body;
        (body["groupLabels"]["alertname"] == alert && body["status"] == status).then(|| notification.clone())
    })
}
