//! A collector on a thread of this process that keeps every request.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "tests; each of them uses a part of this module"
)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gauntlet_telemetry::{Env, Settings, Telemetry};
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::trace::v1::Span;
use tonic::{Request, Response, Status};

/// What the collector received, with headers.
#[derive(Clone, Default)]
pub struct Received {
    traces: Arc<Mutex<Vec<Request<ExportTraceServiceRequest>>>>,
    metrics: Arc<Mutex<Vec<Request<ExportMetricsServiceRequest>>>>,
    logs: Arc<Mutex<Vec<Request<ExportLogsServiceRequest>>>>,
}

macro_rules! keep_requests {
    ($service:ident, $request:ident, $response:ident, $field:ident) => {
        #[tonic::async_trait]
        impl $service for Received {
            async fn export(&self, request: Request<$request>) -> Result<Response<$response>, Status> {
                self.$field.lock().unwrap().push(request);
                Ok(Response::new(Default::default()))
            }
        }
    };
}
keep_requests!(TraceService, ExportTraceServiceRequest, ExportTraceServiceResponse, traces);
keep_requests!(MetricsService, ExportMetricsServiceRequest, ExportMetricsServiceResponse, metrics);
keep_requests!(LogsService, ExportLogsServiceRequest, ExportLogsServiceResponse, logs);

pub struct Collector {
    pub address: SocketAddr,
    received: Received,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Collector {
    pub fn start() -> Self {
        let received = Received::default();
        let served = received.clone();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tonic::transport::Server::builder()
                    .add_service(TraceServiceServer::new(served.clone()))
                    .add_service(MetricsServiceServer::new(served.clone()))
                    .add_service(LogsServiceServer::new(served))
                    .serve_with_incoming_shutdown(tokio_stream::wrappers::TcpListenerStream::new(listener), async {
                        let _ = stopped.await;
                    })
                    .await
                    .unwrap();
            });
        });
        Self { address, received, _stop: stop }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT", self.endpoint()), ("OTEL_METRIC_EXPORT_INTERVAL", "3600000".into())]
    }

    /// Telemetry that exports to this collector, with further variables.
    pub fn telemetry(&self, more: &[(&'static str, &str)]) -> (Telemetry, tracing::Dispatch) {
        telemetry(self.env().into_iter().chain(more.iter().map(|(name, value)| (*name, (*value).to_owned()))))
    }

    /// Telemetry that exports to this collector once its export is started.
    pub fn held_telemetry(&self) -> (Telemetry, tracing::Dispatch) {
        let env = self.env().into_iter().collect();
        Telemetry::prepare(&Settings::new("test", "1.2.3").with_debug().with_export_held(), &env).unwrap()
    }

    pub fn spans(&self) -> Vec<Span> {
        let requests = self.received.traces.lock().unwrap();
        let scopes =
            requests.iter().flat_map(|request| &request.get_ref().resource_spans).flat_map(|spans| &spans.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    pub fn span(&self, name: &str) -> Span {
        let found: Vec<_> = self.spans().into_iter().filter(|span| span.name == name).collect();
        assert_eq!(found.len(), 1, "{name} in {:?}", self.names());
        found.into_iter().next().unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.spans().into_iter().map(|span| span.name).collect()
    }

    pub fn resource(&self) -> Vec<KeyValue> {
        self.received.traces.lock().unwrap()[0].get_ref().resource_spans[0].resource.clone().unwrap().attributes
    }

    pub fn logs(&self) -> Vec<LogRecord> {
        let requests = self.received.logs.lock().unwrap();
        let scopes =
            requests.iter().flat_map(|request| &request.get_ref().resource_logs).flat_map(|logs| &logs.scope_logs);
        scopes.flat_map(|scope| scope.log_records.clone()).collect()
    }

    /// The metrics of the last export.
    pub fn metrics(&self) -> Vec<Metric> {
        let requests = self.received.metrics.lock().unwrap();
        let scopes =
            requests.last().unwrap().get_ref().resource_metrics.iter().flat_map(|metrics| &metrics.scope_metrics);
        scopes.flat_map(|scope| scope.metrics.clone()).collect()
    }

    pub fn metric(&self, name: &str) -> Option<Metric> {
        self.metrics().into_iter().find(|metric| metric.name == name)
    }

    /// Whether no request was received.
    pub fn is_empty(&self) -> bool {
        let Received { traces, metrics, logs } = &self.received;
        traces.lock().unwrap().is_empty() && metrics.lock().unwrap().is_empty() && logs.lock().unwrap().is_empty()
    }

    /// A metric of the last export; `None` before the first.
    pub fn exported_metric(&self, name: &str) -> Option<Metric> {
        let any = !self.received.metrics.lock().unwrap().is_empty();
        if any { self.metric(name) } else { None }
    }

    /// The values of a header of the trace requests.
    pub fn headers(&self, name: &str) -> Vec<String> {
        let requests = self.received.traces.lock().unwrap();
        let values = requests.iter().filter_map(|request| request.metadata().get(name));
        values.map(|value| value.to_str().unwrap().to_owned()).collect()
    }
}

pub fn telemetry<V: Into<String>>(env: impl IntoIterator<Item = (&'static str, V)>) -> (Telemetry, tracing::Dispatch) {
    let env: Env = env.into_iter().map(|(name, value)| (name, value.into())).collect();
    Telemetry::prepare(&Settings::new("test", "1.2.3").with_debug(), &env).unwrap()
}

/// `key=value` of each attribute, sorted.
pub fn attributes(attributes: &[KeyValue]) -> Vec<String> {
    let mut all: Vec<_> = attributes.iter().map(|pair| format!("{}={}", pair.key, text(pair))).collect();
    all.sort();
    all
}

pub fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    attributes.iter().find(|pair| pair.key == key).map(text)
}

fn text(pair: &KeyValue) -> String {
    match pair.value.as_ref().and_then(|value| value.value.clone()) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(value)) => value.to_string(),
        Some(any_value::Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// A listener that accepts connections and never answers.
pub fn hanging_server() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    (listener, address)
}

/// The URL of a port on which nothing listens.
pub fn closed_url() -> String {
    hanging_server().1
}

/// Waits until `done`. Panics after a minute.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A collector, telemetry that exports to it, and its subscriber, installed on this thread.
pub struct Fixture {
    _subscriber: tracing::dispatcher::DefaultGuard,
    // Dropped before the collector, to which it exports while it shuts down.
    pub telemetry: Telemetry,
    pub collector: Collector,
}

impl Fixture {
    pub fn new(env: &[(&'static str, &str)]) -> Self {
        let collector = Collector::start();
        let (telemetry, dispatch) = collector.telemetry(env);
        Self { _subscriber: tracing::dispatcher::set_default(&dispatch), telemetry, collector }
    }
}
