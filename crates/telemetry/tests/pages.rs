//! OTLP over HTTP, `/metrics` and the debug page.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use gauntlet_telemetry::{Sample, Telemetry, context, names};
use http::Request;
use http_body_util::BodyExt;
use support::{Collector, closed_url, telemetry};
use tower::ServiceExt;

async fn get(telemetry: &Telemetry, path: &str) -> (u16, String) {
    let request = Request::builder().uri(path).body(axum::body::Body::empty()).unwrap();
    let response = telemetry.debug().router().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[test]
fn otlp_over_http_posts_each_signal_to_its_path() {
    let requests: Arc<Mutex<HashSet<String>>> = Arc::default();
    let received = Arc::clone(&requests);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async move {
            let app = axum::Router::new().fallback(async move |request: axum::extract::Request| {
                let kind = request.headers()["content-type"].to_str().unwrap().to_owned();
                received.lock().unwrap().insert(format!("{} {} {kind}", request.method(), request.uri().path()));
                [("content-type", "application/x-protobuf")]
            });
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, app).with_graceful_shutdown(async { drop(stopped.await) }).await.unwrap();
        });
    });
    let (telemetry, dispatch) =
        telemetry([("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".into())]);
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!("work").in_scope(|| tracing::info!("a log record"))
    });
    telemetry.shutdown().unwrap();
    let mut requests: Vec<_> = requests.lock().unwrap().iter().cloned().collect();
    requests.sort();
    insta::assert_debug_snapshot!(requests, @r#"
    [
        "POST /v1/logs application/x-protobuf",
        "POST /v1/metrics application/x-protobuf",
        "POST /v1/traces application/x-protobuf",
    ]
    "#);
    drop(stop);
}

#[tokio::test]
async fn scraped_metrics_have_the_names_of_the_table() {
    let (telemetry, _) = telemetry([
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_LOGS_EXPORTER", "none"),
        ("OTEL_METRICS_EXPORTER", "prometheus"),
    ]);
    telemetry.gauges().register(&[&names::CHALLENGES], async || Ok(vec![Sample::new(&names::CHALLENGES, 5)]));
    let instruments = telemetry.instruments();
    instruments.lock.record_attempt("challenge", "acquired", std::time::Duration::from_millis(1));
    instruments.lock.record_loss("challenge");
    instruments.janitor.record_expiry("ok", std::time::Duration::from_secs(3));
    let (status, text) = get(&telemetry, "/metrics").await;
    assert_eq!(status, 200);
    assert!(text.lines().any(|line| line == "challenges 5"), "{text}");
    let known: HashSet<_> = names::METRICS.iter().map(|metric| metric.prometheus_name()).collect();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let scraped: Vec<_> =
        types.map(|line| line.split(' ').next().unwrap()).filter(|name| *name != "target_info").collect();
    assert!(scraped.len() > 8, "{text}");
    for name in scraped {
        assert!(known.contains(name), "{name} is not in names::METRICS");
    }
    assert!(text.contains("process_memory_usage_bytes "), "{text}");
    assert!(text.contains("tokio_workers "), "{text}");
}

#[tokio::test]
async fn debug_page_shows_operations_failures_and_gauges() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[]);
    telemetry.gauges().register(&[&names::INSTANCES], async || {
        Ok(vec![
            Sample::new(&names::INSTANCES, 2).with_attribute("state", "ready").with_attribute("challenge", "a"),
            Sample::new(&names::INSTANCES, 1).with_attribute("state", "ready").with_attribute("challenge", "b"),
        ])
    });
    telemetry.gauges().register(&[&names::CHALLENGES], async || Err("the store is unavailable".into()));
    telemetry.debug().add_panel("queues", || serde_json::json!({"challenge": 3}));
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!("a.B/C", otel.kind = "server").in_scope(|| {
            tracing::info_span!(names::LOCK_ACQUIRE.name, lock.kind = "challenge").in_scope(|| {});
            tracing::info_span!("provision.up").in_scope(|| context::fail_span("no port left"));
        });
        tracing::info_span!("a.B/D", otel.kind = "server", error.type = "NOT_FOUND").in_scope(|| {});
    });

    let (status, json) = get(&telemetry, "/debug/state.json").await;
    assert_eq!(status, 200);
    let state: serde_json::Value = serde_json::from_str(&json).unwrap();
    let rows: Vec<_> = state["operations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| format!("{} {} {} {} {}", row["group"], row["name"], row["count"], row["errors"], row["refused"]))
        .collect();
    insta::assert_debug_snapshot!(rows, @r#"
    [
        "\"served\" \"a.B/C\" 1 0 0",
        "\"served\" \"a.B/D\" 1 0 1",
        "\"locks\" \"lock.acquire\" 1 0 0",
        "\"work\" \"provision.up\" 1 1 0",
    ]
    "#);
    let failed = state["failed"].as_array().unwrap();
    assert_eq!(failed.len(), 1);
    let tree: Vec<_> = failed[0]["spans"]
        .as_array()
        .unwrap()
        .iter()
        .map(|span| format!("{} {} {}", span["depth"], span["name"], span["error"]))
        .collect();
    insta::assert_debug_snapshot!(tree, @r#"
    [
        "0 \"a.B/C\" null",
        "1 \"lock.acquire\" null",
        "1 \"provision.up\" \"no port left\"",
    ]
    "#);
    assert_eq!(state["slow"].as_array().unwrap().len(), 2);
    assert_eq!(state["gauges"].as_array().unwrap().len(), 2);
    assert_eq!(state["panels"]["queues"]["challenge"], 3);

    let text = telemetry.debug().snapshot().await.render(100);
    assert!(text.contains("instances ready: 3"), "{text}");
    assert!(text.contains("no port left"), "{text}");
    let first_words: Vec<_> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    for table in [["served", "a.B/C"], ["locks", "lock.acquire"], ["work", "provision.up"]] {
        assert!(first_words.windows(2).any(|words| words == table), "{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100));

    let (status, page) = get(&telemetry, "/").await;
    assert_eq!(status, 200);
    for forbidden in ["src=", "http://", "https://", "innerHTML"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    assert_eq!(get(&telemetry, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(get(&telemetry, "/metrics").await.0, 404);
}

#[test]
fn invalid_environment_is_rejected_inside_a_runtime_too() {
    let prepare = |name: &'static str, value: &str| {
        let env = [(name, value.to_owned()), ("OTEL_EXPORTER_OTLP_ENDPOINT", closed_url().replace("http", "https"))];
        let settings = gauntlet_telemetry::Settings::new("test", "0");
        Telemetry::prepare(&settings, &env.into_iter().collect()).map(|_| ()).unwrap_err().to_string()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        assert!(prepare("LOG_LEVEL", "loud").contains("LOG_LEVEL"));
        assert!(prepare("RUST_LOG", "a=b=c").contains("RUST_LOG"));
        assert!(prepare("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem").contains("/nowhere/ca.pem"));
    });
}

#[tokio::test]
async fn https_endpoint_works_over_grpc_and_http() {
    for protocol in ["grpc", "http/protobuf"] {
        let (telemetry, dispatch) = telemetry([
            ("OTEL_EXPORTER_OTLP_ENDPOINT", closed_url().replace("http", "https")),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.to_owned()),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "500".into()),
        ]);
        tracing::dispatcher::with_default(&dispatch, || drop(tracing::info_span!("work").entered()));
        telemetry.flush().unwrap();
        let state = telemetry.debug().snapshot().await;
        assert_eq!(state.exporters[0].failed, 1, "{protocol}: {state:?}");
    }
}
