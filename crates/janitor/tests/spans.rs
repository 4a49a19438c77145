//! The trace of a sweep, across to the server, and its metrics.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;

use gauntlet_janitor::{Config, Summary, run};
use gauntlet_telemetry::{Instruments, layers::GrpcServerLayer};
use gauntlet_testing::api::{Deletion, FakeApi, challenge, from_now};
use opentelemetry::trace::{SpanId, SpanKind, Status, TracerProvider as _};
use opentelemetry_sdk::{
    metrics::{
        InMemoryMetricExporter, SdkMeterProvider,
        data::{AggregatedMetrics, MetricData},
    },
    propagation::TraceContextPropagator,
    trace::{InMemorySpanExporter, SdkTracerProvider, SpanData},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Server};
use tracing_subscriber::layer::SubscriberExt as _;

const DELETE: &str = "gauntlet.v1.Sweeper/DeleteExpired";
const LIST: &str = "gauntlet.v1.Sweeper/ListExpired";

/// Renders the spans below `parent` as an indented tree, siblings sorted by their text.
fn tree(spans: &[SpanData], parent: SpanId, depth: usize) -> Vec<String> {
    let mut branches: Vec<Vec<String>> = spans
        .iter()
        .filter(|span| span.parent_span_id == parent)
        .map(|span| {
            let attributes: BTreeMap<_, _> = span
                .attributes
                .iter()
                .filter(|attribute| !attribute.key.as_str().starts_with("server."))
                .map(|attribute| (attribute.key.as_str(), attribute.value.as_str().into_owned()))
                .filter(|(key, _)| !["rpc.system.name", "rpc.method", "target", "level"].contains(key))
                .collect();
            let failed = if matches!(span.status, Status::Error { .. }) { " FAILED" } else { "" };
            let kind = format!("{:?}", span.span_kind).to_uppercase();
            let mut lines = vec![format!("{}{} {kind}{failed} {attributes:?}", "  ".repeat(depth), span.name)];
            lines.extend(tree(spans, span.span_context.span_id(), depth + 1));
            lines
        })
        .collect();
    branches.sort();
    branches.concat()
}

#[tokio::test]
async fn sweep_is_one_trace_that_includes_the_server() {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let exporter = InMemorySpanExporter::default();
    let traces = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(traces.tracer("test"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false);
    let filter = tracing_subscriber::filter::filter_fn(|meta| meta.is_span() && meta.target().starts_with("gauntlet"));
    let subscriber = tracing_subscriber::registry().with(tracing_subscriber::Layer::with_filter(layer, filter));
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let measured = InMemoryMetricExporter::default();
    let metrics = SdkMeterProvider::builder().with_periodic_exporter(measured.clone()).build();
    let instruments = Instruments::new(&metrics);

    let fake = FakeApi::new(vec![challenge(
        "web-1",
        None,
        &[("7", from_now(-90)), ("8", from_now(-60)), ("9", from_now(-30)), ("10", None)],
    )])
    .deletion("8", Deletion::Fails(Code::Internal))
    .deletion("9", Deletion::NotFound)
    .extended();
    let (layer, routes) = (GrpcServerLayer::new(&instruments, [LIST, DELETE]), fake.routes());
    let server =
        FakeApi::serve_with(|incoming| Server::builder().layer(layer).add_routes(routes).serve_with_incoming(incoming))
            .await;
    let config = Config::new(server.url.parse().unwrap());
    let summary = run(&config, &instruments, CancellationToken::new()).await.unwrap();
    assert_eq!(summary, Summary { seen: 3, expired: 3, deleted: 1, gone: 1, failed: 1, ..Summary::default() });

    fake.wait_until("all spans have ended", |_| exporter.get_finished_spans().unwrap().len() == 12).await;
    let spans = exporter.get_finished_spans().unwrap();
    let roots: Vec<_> = spans.iter().filter(|span| span.parent_span_id == SpanId::INVALID).collect();
    assert_eq!(roots.len(), 1, "one root: {roots:#?}");
    assert!(spans.iter().all(|span| span.span_context.trace_id() == roots[0].span_context.trace_id()));
    assert_eq!(spans.iter().filter(|span| span.span_kind == SpanKind::Server).count(), 4);
    assert_eq!(fake.with(|state| state.traceparents.len()), 4, "every call carries its trace context");
    insta::assert_snapshot!(tree(&spans, SpanId::INVALID, 0).join("\n"));

    metrics.force_flush().unwrap();
    let mut counted = BTreeMap::new();
    let mut lags = 0;
    for metric in measured
        .get_finished_metrics()
        .unwrap()
        .iter()
        .flat_map(|all| all.scope_metrics())
        .flat_map(|scope| scope.metrics())
    {
        match (metric.name(), metric.data()) {
            ("gauntlet.janitor.expired", AggregatedMetrics::U64(MetricData::Sum(sum))) => {
                for point in sum.data_points() {
                    let outcome = point.attributes().next().unwrap().value.as_str().into_owned();
                    counted.insert(outcome, point.value());
                }
            }
            ("gauntlet.janitor.lag", AggregatedMetrics::F64(MetricData::Histogram(histogram))) => {
                for point in histogram.data_points() {
                    lags += point.count();
                    assert!(point.min().unwrap() >= 29.0 && point.max().unwrap() < 3600.0);
                }
            }
            _ => {}
        }
    }
    assert_eq!(format!("{counted:?}"), r#"{"error": 1, "gone": 1, "ok": 1}"#);
    assert_eq!(lags, 3);
}
