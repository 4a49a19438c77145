//! Export to a collector that works, hangs, or is down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use gauntlet_telemetry::{FlushTimeout, Sample, context, names};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value;
use support::{Collector, attribute, attributes, closed_url, hanging_server, telemetry, wait_until};

#[test]
fn all_signals_are_exported_with_resource_and_trace_ids() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[
        ("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod%2D1,service.namespace=other"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret"),
    ]);
    let trace = tracing::dispatcher::with_default(&dispatch, || {
        let span = tracing::info_span!(names::LOCK_ACQUIRE.name, lock.kind = "challenge");
        span.in_scope(|| {
            tracing::warn!(answer = 42, "inside the span");
            context::trace_id().unwrap()
        })
    });
    telemetry.instruments().pool.record_claim("web", true);
    telemetry.shutdown().unwrap();

    let span = collector.span("lock.acquire");
    assert_eq!(attributes(&span.attributes), ["lock.kind=challenge"]);
    assert_eq!(hex(&span.trace_id), trace);
    let resource = collector.resource();
    assert_eq!(attribute(&resource, "service.name").unwrap(), "test");
    assert_eq!(attribute(&resource, "service.version").unwrap(), "1.2.3");
    assert_eq!(attribute(&resource, "service.namespace").unwrap(), "other");
    assert_eq!(attribute(&resource, "k8s.pod.name").unwrap(), "pod-1");
    assert_eq!(attribute(&resource, "process.pid").unwrap(), std::process::id().to_string());
    for key in ["service.instance.id", "host.name", "process.executable.name", "telemetry.sdk.version"] {
        assert!(attribute(&resource, key).is_some_and(|value| !value.is_empty()), "{key}");
    }
    let logs = collector.logs();
    let log = logs.iter().find(|log| hex(&log.trace_id) == trace).unwrap();
    assert_eq!(hex(&log.span_id), hex(&span.span_id));
    assert_eq!(attribute(&log.attributes, "answer").unwrap(), "42");
    assert!(collector.metric("gauntlet.pool.claims").is_some());
    assert_eq!(collector.headers("x-key"), ["secret"]);
}

#[test]
fn held_export_neither_sends_nor_counts_as_lost() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.held_telemetry();
    let emit = |kind: &'static str| {
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info_span!(names::LOCK_ACQUIRE.name, lock.kind = kind)
                .in_scope(|| tracing::warn!(kind, "a log record"));
        });
        telemetry.instruments().pool.record_claim("web", true);
        telemetry.flush().unwrap();
    };
    // More than the queue holds.
    for _ in 0..3_000 {
        tracing::dispatcher::with_default(&dispatch, || drop(tracing::info_span!(names::LOCK_ACQUIRE.name)));
    }
    emit("challenge");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let states = || runtime.block_on(telemetry.debug().snapshot()).exporters;
    assert_eq!(states().len(), 3);
    for state in states() {
        assert!(state.held && state.error.is_none(), "{state:?}");
        assert_eq!((state.queued, state.processed, state.dropped, state.failed), (0, 0, 0, 0), "{state:?}");
    }
    assert!(collector.is_empty());

    telemetry.export_start().start();
    emit("instance");
    assert_eq!(attributes(&collector.span("lock.acquire").attributes), ["lock.kind=instance"]);
    assert_eq!(collector.logs().len(), 1);
    assert!(collector.metric("gauntlet.pool.claims").is_some());
    for state in states() {
        assert!(!state.held && state.last_success.is_some() && state.dropped + state.failed == 0, "{state:?}");
    }
}

#[test]
fn exported_metrics_match_their_rows() {
    let collector = Collector::start();
    let (telemetry, _) = collector.telemetry(&[]);
    telemetry.instruments().lock.record_attempt("instance", "acquired", std::time::Duration::from_millis(3));
    let active = telemetry.instruments().provision.start_step("process", "up");
    telemetry.flush().unwrap();
    drop(active);
    let exported = collector.metrics();
    let mut count = 0;
    assert!(exported.len() > 10, "{exported:?}");
    for metric in &exported {
        let row = names::METRICS.iter().find(|row| row.name == metric.name);
        let row = row.unwrap_or_else(|| panic!("{} is not in names::METRICS", metric.name));
        assert_eq!((row.unit, row.description), (metric.unit.as_str(), metric.description.as_str()));
        let points: Vec<_> = match metric.data.clone().unwrap() {
            Data::Gauge(gauge) => gauge.data_points.into_iter().map(|point| point.attributes).collect(),
            Data::Sum(sum) => sum.data_points.into_iter().map(|point| point.attributes).collect(),
            Data::Histogram(histogram) => {
                assert_eq!(histogram.data_points[0].explicit_bounds, row.buckets, "{}", row.name);
                histogram.data_points.into_iter().map(|point| point.attributes).collect()
            }
            other => panic!("{other:?}"),
        };
        count += points.len() as u64;
        for key in points.iter().flatten().map(|pair| pair.key.as_str()) {
            assert!(row.attributes.contains(&key), "{} has no attribute {key}", row.name);
        }
    }
    let state = block_on(telemetry.debug().snapshot());
    let metrics = state.exporters.iter().find(|exporter| exporter.signal == "metrics").unwrap();
    assert_eq!((metrics.processed, metrics.exported), (count, count));
}

#[test]
fn active_count_returns_to_zero_when_the_guard_is_dropped() {
    let collector = Collector::start();
    let (telemetry, _) = collector.telemetry(&[]);
    let exported = || {
        telemetry.flush().unwrap();
        let Some(Data::Sum(sum)) = collector.metric("gauntlet.provision.active").unwrap().data else {
            panic!("gauntlet.provision.active is not a sum")
        };
        sum.data_points[0].value.unwrap()
    };
    let active = telemetry.instruments().provision.start_step("process", "up");
    assert_eq!(exported(), Value::AsInt(1));
    drop(active);
    assert_eq!(exported(), Value::AsInt(0));
}

#[test]
fn shutdown_gives_up_on_a_hanging_collector() {
    let (_listener, endpoint) = hanging_server();
    let (telemetry, dispatch) = telemetry([("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]);
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!("work").in_scope(|| tracing::info!("a log record"))
    });
    // The exporter's own timeout is longer than the shutdown's.
    assert_eq!(telemetry.shutdown(), Err(FlushTimeout));
    assert_eq!(telemetry.shutdown(), Ok(()));
}

#[tokio::test]
async fn shutdown_works_on_a_single_threaded_runtime() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[]);
    tracing::dispatcher::with_default(&dispatch, || drop(tracing::info_span!("work").entered()));
    telemetry.shutdown().unwrap();
    assert_eq!(collector.names(), ["work"]);
}

#[test]
fn refused_export_is_counted_as_failed() {
    let (telemetry, dispatch) =
        telemetry([("OTEL_EXPORTER_OTLP_ENDPOINT", closed_url()), ("OTEL_EXPORTER_OTLP_TIMEOUT", "500".into())]);
    tracing::dispatcher::with_default(&dispatch, || drop(tracing::info_span!("work").entered()));
    telemetry.flush().unwrap();
    let state = block_on(telemetry.debug().snapshot());
    let traces = state.exporters.iter().find(|exporter| exporter.signal == "traces").unwrap();
    assert_eq!((traces.processed, traces.exported, traces.failed, traces.queued), (1, 0, 1, 0));
    assert!(traces.error.is_some());
    telemetry.shutdown().unwrap();
}

#[test]
fn spans_beyond_the_queue_are_dropped_and_counted() {
    let (_listener, endpoint) = hanging_server();
    let collector = Collector::start();
    let (telemetry, dispatch) = telemetry([
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "10".into()),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "5".into()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "50".into()),
    ]);
    tracing::dispatcher::with_default(&dispatch, || {
        for _ in 0..1000 {
            drop(tracing::info_span!("work").entered());
        }
    });
    // The first batch of five has left the queue and hangs. The queue holds at most ten more.
    let state = block_on(telemetry.debug().snapshot());
    let traces = state.exporters.iter().find(|exporter| exporter.signal == "traces").unwrap();
    assert!(traces.queued <= 10 && traces.processed <= 10, "{traces:?}");
    assert_eq!(traces.queued + traces.processed + traces.dropped, 1000);
    // The count of drops is itself exported.
    let dropped = traces.dropped;
    wait_until("the count of dropped spans", || {
        let Some(metric) = collector.exported_metric("otel.sdk.processor.span.processed") else { return false };
        let Some(Data::Sum(sum)) = metric.data else { return false };
        sum.data_points.iter().any(|point| {
            attribute(&point.attributes, "error.type").as_deref() == Some("queue_full")
                && format!("{:?}", point.value).contains(&dropped.to_string())
        })
    });
    drop(telemetry);
}

#[test]
fn disabled_sdk_exports_nothing_and_the_page_reports_it() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[("OTEL_SDK_DISABLED", "true")]);
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!("work").in_scope(|| assert_eq!(context::current_traceparent(), None));
    });
    telemetry.instruments().pool.record_claim("web", false);
    let state = block_on(telemetry.debug().snapshot());
    assert!(state.disabled && state.exporters.is_empty());
    assert!(state.render(80).contains("OTEL_SDK_DISABLED"));
    telemetry.shutdown().unwrap();
    assert!(collector.spans().is_empty());
}

#[test]
fn export_is_not_traced() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[("RUST_LOG", "trace"), ("OTEL_BSP_SCHEDULE_DELAY", "10")]);
    tracing::dispatcher::with_default(&dispatch, || {
        for _ in 0..20 {
            drop(tracing::info_span!("work").entered());
            telemetry.flush().unwrap();
        }
    });
    telemetry.shutdown().unwrap();
    assert_eq!(collector.names(), ["work"; 20]);
}

#[test]
fn unsampled_spans_are_on_the_debug_page_and_not_exported() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[("OTEL_TRACES_SAMPLER", "always_off")]);
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!("work").in_scope(|| {
            assert!(context::current_traceparent().unwrap().ends_with("-00"));
        });
    });
    let state = block_on(telemetry.debug().snapshot());
    assert_eq!(state.operations.iter().map(|operation| operation.count).collect::<Vec<_>>(), [1]);
    telemetry.shutdown().unwrap();
    assert!(collector.spans().is_empty());
}

#[test]
fn span_links_to_a_stored_traceparent() {
    let collector = Collector::start();
    let (telemetry, dispatch) = collector.telemetry(&[]);
    tracing::dispatcher::with_default(&dispatch, || {
        let cause = tracing::info_span!("cause").in_scope(|| context::current_traceparent().unwrap());
        tracing::info_span!("effect").in_scope(|| {
            context::link_to(&cause);
            context::link_to("not a traceparent");
        });
    });
    telemetry.shutdown().unwrap();
    let (cause, effect) = (collector.span("cause"), collector.span("effect"));
    assert_ne!(cause.trace_id, effect.trace_id);
    assert_eq!(effect.links.len(), 1);
    assert_eq!((&effect.links[0].trace_id, &effect.links[0].span_id), (&cause.trace_id, &cause.span_id));
}

#[test]
fn gauges_are_read_at_collection_and_never_stale() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let collector = Collector::start();
    let (telemetry, _) = collector.telemetry(&[]);
    let stored = Arc::new(AtomicU64::new(3));
    let (read, reads) = (Arc::clone(&stored), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&reads);
    telemetry.gauges().register(&[&names::CHALLENGES, &names::INSTANCES], move || {
        counted.fetch_add(1, Ordering::SeqCst);
        let value = read.load(Ordering::SeqCst);
        async move {
            tokio::task::yield_now().await;
            if value == 0 {
                return Err("the store is unavailable".into());
            }
            Ok(vec![
                Sample::new(&names::CHALLENGES, value),
                Sample::new(&names::INSTANCES, value).with_attribute("state", "ready").with_attribute("pool", "false"),
            ])
        }
    });
    let exported = |name: &str| {
        let metric = collector.metric(name)?;
        let Some(Data::Gauge(gauge)) = metric.data else { panic!("{name} is not a gauge") };
        Some(format!("{:?} {:?}", gauge.data_points[0].value.unwrap(), attributes(&gauge.data_points[0].attributes)))
    };
    telemetry.flush().unwrap();
    assert_eq!(reads.load(Ordering::SeqCst), 1, "both gauges share one read");
    assert_eq!(exported("challenges").unwrap(), "AsInt(3) []");
    assert_eq!(exported("instances").unwrap(), r#"AsInt(3) ["pool=false", "state=ready"]"#);
    stored.store(4, Ordering::SeqCst);
    telemetry.flush().unwrap();
    assert_eq!(exported("challenges").unwrap(), "AsInt(4) []");
    stored.store(0, Ordering::SeqCst);
    telemetry.flush().unwrap();
    assert_eq!(exported("challenges"), None);
    assert_eq!(exported("instances"), None);
    telemetry.flush().unwrap();
    assert!(collector.metric("gauntlet.gauge.failures").is_some());
    telemetry.shutdown().unwrap();
}

#[test]
fn panicking_gauge_does_not_affect_others() {
    let collector = Collector::start();
    let (telemetry, _) = collector.telemetry(&[]);
    telemetry.gauges().register(&[&names::CHALLENGES], || -> std::future::Ready<Result<Vec<Sample>, _>> {
        panic!("a panic in a test")
    });
    telemetry
        .gauges()
        .register(&[&names::INSTANCES_OVERDUE], async || Ok(vec![Sample::new(&names::INSTANCES_OVERDUE, 1)]));
    for _ in 0..2 {
        telemetry.flush().unwrap();
        assert!(collector.metric("challenges").is_none());
        assert!(collector.metric("gauntlet.instances.overdue").is_some());
    }
    assert!(collector.metric("gauntlet.gauge.failures").is_some());
    let shown = block_on(telemetry.debug().snapshot());
    assert_eq!(shown.gauges.iter().map(|gauge| gauge.name).collect::<Vec<_>>(), ["gauntlet.instances.overdue"]);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
