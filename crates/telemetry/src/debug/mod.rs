//! The debug page: operations, latencies, slow and failed traces, gauges and exporters of this process, live and without a backend.
//!
//! Its data are the finished spans of this process and the gauges. Memory is bounded.

mod http;
mod render;
mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use serde::Serialize;

use crate::export::{ExportState, Health};
use crate::gauges::{Gauges, Sample};
use view::View;

/// The largest age of the gauges in a snapshot, so that many viewers do not cause many reads.
const MAX_GAUGE_AGE: Duration = Duration::from_millis(900);

type Panel = dyn Fn() -> serde_json::Value + Send + Sync;

/// The debug page. Clones share its data.
#[derive(Clone)]
pub struct DebugPage {
    shared: Arc<Shared>,
}

struct Shared {
    started: Instant,
    disabled: bool,
    view: Mutex<View>,
    panels: Mutex<BTreeMap<String, Arc<Panel>>>,
    gauges_read: tokio::sync::Mutex<Option<(Instant, Vec<Sample>)>>,
    sources: OnceLock<Sources>,
}

struct Sources {
    gauges: Gauges,
    exporters: Vec<Arc<Health>>,
    registry: Option<prometheus::Registry>,
}

impl std::fmt::Debug for DebugPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DebugPage").finish_non_exhaustive()
    }
}

/// The state of the process at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The time, in seconds since the Unix epoch.
    pub at: u64,
    /// Seconds since telemetry started.
    pub uptime: u64,
    /// Whether the SDK is disabled. Then there are no operations and no traces.
    pub disabled: bool,
    /// The values of the gauges.
    pub gauges: Vec<GaugeValue>,
    /// The operations, by group and name.
    pub operations: Vec<Operation>,
    /// The slowest traces of the last ten minutes, slowest first.
    pub slow: Vec<Trace>,
    /// The most recent traces with a failed span, newest first.
    pub failed: Vec<Trace>,
    /// The health of the exporters.
    pub exporters: Vec<ExportState>,
    /// The panels added with [`DebugPage::add_panel`].
    pub panels: BTreeMap<String, serde_json::Value>,
}

/// One value of a gauge.
#[derive(Clone, Debug, Serialize)]
pub struct GaugeValue {
    /// The name of the metric.
    pub name: &'static str,
    /// The value.
    pub value: u64,
    /// The attributes.
    pub attributes: BTreeMap<&'static str, String>,
}

/// The spans of one name.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    /// The group in which the page lists it.
    pub group: Group,
    /// The span's name.
    pub name: String,
    /// Spans finished since the start.
    pub count: u64,
    /// Spans that failed: their status is Error.
    pub errors: u64,
    /// Spans of rejected calls: they have an `error.type`, but the caller is at fault.
    pub refused: u64,
    /// Spans finished per second, over the last minute.
    pub rate: f64,
    /// Durations over the last minute; `None` if no span finished in it.
    pub latency: Option<Latency>,
}

/// Percentiles in milliseconds, accurate to one percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// A group of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Calls served.
    Served,
    /// Waiting for and holding locks.
    Locks,
    /// Other work inside the process.
    Work,
    /// Calls made.
    Called,
}

/// The part of a trace that this process recorded.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// The id of the whole trace.
    pub trace_id: String,
    /// The name of its first span in this process.
    pub name: String,
    /// The start, in milliseconds since the Unix epoch.
    pub started: u64,
    /// The duration, in milliseconds.
    pub duration: f64,
    /// Whether spans are missing because there were too many.
    pub cut: bool,
    /// The spans: parents before children, siblings by start.
    pub spans: Vec<TraceSpan>,
}

/// One span of a [`Trace`].
#[derive(Clone, Debug, Serialize)]
pub struct TraceSpan {
    /// The id of the span.
    pub span_id: String,
    /// The number of its ancestors in this process.
    pub depth: usize,
    /// The name of the span.
    pub name: String,
    /// The time from the start of the trace to the start of the span, in milliseconds.
    pub offset: f64,
    /// The duration, in milliseconds.
    pub duration: f64,
    /// The error, if it failed.
    pub error: Option<String>,
    /// Its first attributes.
    pub attributes: BTreeMap<String, String>,
}

impl DebugPage {
    pub(crate) fn new(disabled: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                started: Instant::now(),
                disabled,
                view: Mutex::new(View::new(Instant::now())),
                panels: Mutex::default(),
                gauges_read: tokio::sync::Mutex::new(None),
                sources: OnceLock::new(),
            }),
        }
    }

    pub(crate) fn connect(&self, gauges: Gauges, exporters: Vec<Arc<Health>>, registry: Option<prometheus::Registry>) {
        let _ = self.shared.sources.set(Sources { gauges, exporters, registry });
    }

    pub(crate) fn processor(&self) -> impl SpanProcessor + 'static {
        SpanFeed(self.clone())
    }

    /// Adds a panel, or replaces the panel of the same name. `read` is called for every snapshot and must not block.
    pub fn add_panel(&self, name: impl Into<String>, read: impl Fn() -> serde_json::Value + Send + Sync + 'static) {
        self.shared.panels.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), Arc::new(read));
    }

    /// The current state. Reads the gauges, unless the last snapshot did so within the last second.
    pub async fn snapshot(&self) -> Snapshot {
        let shared = &self.shared;
        let gauges = self.gauges().await;
        let panels = shared.panels.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let exporters =
            shared.sources.get().map(|sources| sources.exporters.iter().map(|health| health.state()).collect());
        let (operations, slow, failed) = {
            let mut view = shared.view.lock().unwrap_or_else(PoisonError::into_inner);
            view.read(Instant::now())
        };
        Snapshot {
            at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            uptime: shared.started.elapsed().as_secs(),
            disabled: shared.disabled,
            gauges,
            operations,
            slow,
            failed,
            exporters: exporters.unwrap_or_default(),
            panels: panels.into_iter().map(|(name, read)| (name, read())).collect(),
        }
    }

    async fn gauges(&self) -> Vec<GaugeValue> {
        let Some(sources) = self.shared.sources.get() else { return Vec::new() };
        // The lock is held during the read, which has a deadline, so that concurrent snapshots share one read.
        let mut read = self.shared.gauges_read.lock().await;
        let samples = match read.take() {
            Some((at, samples)) if at.elapsed() < MAX_GAUGE_AGE => read.insert((at, samples)),
            _ => read.insert((Instant::now(), sources.gauges.read().await)),
        };
        let value = |sample: &Sample| GaugeValue {
            name: sample.metric.name,
            value: sample.value,
            attributes: sample.attributes.iter().cloned().collect(),
        };
        samples.1.iter().map(value).collect()
    }
}

/// Passes finished spans to the view.
struct SpanFeed(DebugPage);

impl std::fmt::Debug for SpanFeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SpanFeed")
    }
}

impl SpanProcessor for SpanFeed {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.shared.view.lock().unwrap_or_else(PoisonError::into_inner).add(Instant::now(), span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}
