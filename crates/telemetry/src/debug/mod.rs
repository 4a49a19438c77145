//! The live view of this process: what it serves, how fast, what waits, what was slow and what failed, without any
//! backend. It is fed by the spans that end here and by the gauges, and it is bounded in every direction.

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

/// How old the gauges of a snapshot may be, so that many viewers do not mean many reads.
const GAUGES_FOR: Duration = Duration::from_millis(900);

type Panel = dyn Fn() -> serde_json::Value + Send + Sync;

/// The live view. Clones share it.
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

/// The process at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// Seconds since the epoch.
    pub at: u64,
    /// Seconds since telemetry started.
    pub uptime: u64,
    /// Whether the SDK is disabled, so that no spans are seen.
    pub disabled: bool,
    /// The values of the gauges.
    pub gauges: Vec<GaugeValue>,
    /// The operations, by group and name.
    pub operations: Vec<Operation>,
    /// The slowest traces of the last ten minutes, slowest first.
    pub slow: Vec<Trace>,
    /// The last traces with a failed span, newest first.
    pub failed: Vec<Trace>,
    /// The exporters and what they lost.
    pub exporters: Vec<ExportState>,
    /// What was registered with [`DebugPage::add_panel`].
    pub panels: BTreeMap<String, serde_json::Value>,
}

/// One value of one gauge.
#[derive(Clone, Debug, Serialize)]
pub struct GaugeValue {
    /// The metric's name.
    pub name: &'static str,
    /// The value.
    pub value: u64,
    /// The attributes.
    pub attributes: BTreeMap<&'static str, String>,
}

/// Spans of one name.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    /// What kind of work it is.
    pub group: Group,
    /// The span's name.
    pub name: String,
    /// How many ended since the start.
    pub count: u64,
    /// How many of them failed: their span's status is Error.
    pub errors: u64,
    /// How many of them were refused: they have an `error.type`, but the fault is the caller's.
    pub refused: u64,
    /// How many ended in each second, over the last minute.
    pub rate: f64,
    /// Durations over the last minute in milliseconds; none when nothing ended in it.
    pub latency: Option<Latency>,
}

/// Percentiles in milliseconds, within one percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// 95 of 100 are as fast.
    pub p95: f64,
    /// 99 of 100 are as fast.
    pub p99: f64,
}

/// A group of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Calls served.
    Served,
    /// Locks waited for and held.
    Locks,
    /// Work inside the process.
    Work,
    /// Calls made.
    Called,
}

/// The part of a trace that is of this process.
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// The id of the whole trace.
    pub trace_id: String,
    /// The name of the span that began it here.
    pub name: String,
    /// When it began, in milliseconds since the epoch.
    pub started: u64,
    /// How long it took, in milliseconds.
    pub duration: f64,
    /// Whether spans were left out because there were too many.
    pub cut: bool,
    /// Its spans, parents before children, each level by start.
    pub spans: Vec<TraceSpan>,
}

/// One span of a [`Trace`].
#[derive(Clone, Debug, Serialize)]
pub struct TraceSpan {
    /// Its id.
    pub span_id: String,
    /// How many spans are above it.
    pub depth: usize,
    /// Its name.
    pub name: String,
    /// When it began after the trace began, in milliseconds.
    pub offset: f64,
    /// How long it took, in milliseconds.
    pub duration: f64,
    /// What went wrong, if anything did.
    pub error: Option<String>,
    /// Some of its attributes.
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

    /// Adds a panel: `read` is called for every snapshot, so it must be quick and must not block. A panel of the same name is
    /// replaced.
    pub fn add_panel(&self, name: impl Into<String>, read: impl Fn() -> serde_json::Value + Send + Sync + 'static) {
        self.shared.panels.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), Arc::new(read));
    }

    /// The process now. Reads the gauges unless that was done within the last second.
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
        // Held over the read on purpose: whoever asks meanwhile shares its answer. The read has a deadline.
        let mut read = self.shared.gauges_read.lock().await;
        let samples = match read.take() {
            Some((at, samples)) if at.elapsed() < GAUGES_FOR => read.insert((at, samples)),
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

/// Feeds the view with the spans that end.
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
