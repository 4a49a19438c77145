//! Exporting that never blocks, never floods the log, and is honest about what it lost.
//!
//! The SDK's batch processors drop without a count when their queue is full, its periodic reader waits for an exporter
//! for ever, and each failed batch is an error in the log. So each is wrapped: [`Bounded`] admits
//! only what there is room for and counts the rest; [`Guarded`] gives each export a deadline, counts how it ended and
//! reports trouble at most once a minute.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::InstrumentationScope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter, LogProcessor, SdkLogRecord};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics};
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::config::Signal;

/// How often trouble is reported.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// What became of the telemetry given to one exporter.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) signal: Signal,
    /// The `otel.component.type` of the exporter.
    pub(crate) exporter: &'static str,
    /// Where it goes, for texts.
    pub(crate) target: String,
    /// How much may wait; 0 where nothing waits.
    pub(crate) capacity: u64,
    queued: AtomicU64,
    processed: AtomicU64,
    dropped: AtomicU64,
    exported: AtomicU64,
    failed: AtomicU64,
    trouble: Mutex<Trouble>,
    reports: Reports,
    hold: Hold,
}

/// Whether export has yet to start. Until then spans, records and metrics are neither queued nor sent, nor counted as lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hold(Arc<AtomicBool>);

impl Hold {
    pub(crate) fn new(is_held: bool) -> Self {
        Self(Arc::new(AtomicBool::new(is_held)))
    }

    fn is_held(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Starts the export of a process that was told to hold it. See [`crate::Settings::with_export_held`].
#[derive(Clone, Debug)]
pub struct ExportStart(pub(crate) Hold);

impl ExportStart {
    /// What ends, is logged and is measured from now on is exported. Nothing happens when export has started before.
    pub fn start(&self) {
        self.0.0.store(false, Ordering::Relaxed);
    }
}

/// When trouble was last reported, by any exporter of this process: a collector that is down is one trouble.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reports(Arc<Mutex<Option<Instant>>>);

impl Reports {
    /// Whether it is time to say something; then the next time is a while away.
    fn due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= REPORT_EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

#[derive(Debug, Default)]
struct Trouble {
    error: Option<String>,
    /// Whether this trouble was reported, so that its end is reported too.
    reported: bool,
    last_success: Option<SystemTime>,
    lost: u64,
}

/// What became of the telemetry given to one exporter, at one moment.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ExportState {
    /// Whether it has yet to start.
    pub held: bool,
    /// `traces`, `metrics` or `logs`.
    pub signal: &'static str,
    /// The kind of exporter, as `otel.component.type` has it.
    pub exporter: &'static str,
    /// Where it goes.
    pub target: String,
    /// How many wait to be exported.
    pub queued: u64,
    /// How many may wait; 0 for metrics, which do not.
    pub capacity: u64,
    /// How many were handed to the exporter.
    pub processed: u64,
    /// How many were dropped because the queue was full.
    pub dropped: u64,
    /// How many the other side took.
    pub exported: u64,
    /// How many were lost because their export failed.
    pub failed: u64,
    /// What is wrong now, if anything.
    pub error: Option<String>,
    /// When an export last worked, in seconds since the epoch.
    pub last_success: Option<u64>,
}

impl Health {
    pub(crate) fn new(
        signal: Signal,
        exporter: &'static str,
        target: String,
        capacity: usize,
        reports: &Reports,
        hold: &Hold,
    ) -> Arc<Self> {
        Arc::new(Self {
            signal,
            exporter,
            target,
            capacity: capacity as u64,
            queued: AtomicU64::new(0),
            processed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            exported: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            trouble: Mutex::default(),
            reports: reports.clone(),
            hold: hold.clone(),
        })
    }

    pub(crate) fn state(&self) -> ExportState {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        ExportState {
            held: self.hold.is_held(),
            signal: self.signal.lower(),
            exporter: self.exporter,
            target: self.target.clone(),
            queued: self.queued.load(Ordering::Relaxed),
            capacity: self.capacity,
            processed: self.processed.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            exported: self.exported.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            error: trouble.error.clone(),
            last_success: trouble.last_success.map(since_epoch),
        }
    }

    /// Takes a place in the queue, or counts a drop; refuses without a count while export is held. The SDK's own queue is as long and is
    /// emptied before [`Health::taken`], so it never drops by itself.
    fn admit(&self) -> bool {
        if self.hold.is_held() {
            return false;
        }
        let place = |queued| (queued < self.capacity).then_some(queued + 1);
        let admitted = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, place).is_ok();
        if !admitted {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }

    fn taken(&self, count: u64) {
        let left = |queued: u64| Some(queued.saturating_sub(count));
        let _ = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
        self.processed.fetch_add(count, Ordering::Relaxed);
    }

    fn ended(&self, count: u64, result: &OTelSdkResult) {
        match result {
            Ok(()) => {
                self.exported.fetch_add(count, Ordering::Relaxed);
                let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                trouble.last_success = Some(SystemTime::now());
                trouble.error = None;
                let recovered = std::mem::take(&mut trouble.reported);
                let lost = std::mem::take(&mut trouble.lost);
                drop(trouble);
                if recovered {
                    tracing::info!(signal = self.signal.lower(), endpoint = %self.target, lost, "telemetry is exported again");
                }
            }
            Err(error) => {
                self.failed.fetch_add(count, Ordering::Relaxed);
                let error = match error {
                    OTelSdkError::Timeout(limit) => format!("no answer within {limit:?}"),
                    OTelSdkError::AlreadyShutdown => "shut down before it was sent".to_owned(),
                    OTelSdkError::InternalFailure(text) => text.clone(),
                };
                let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                trouble.lost += count;
                trouble.error = Some(error.clone());
                let lost = trouble.lost;
                let due = self.reports.due();
                trouble.reported |= due;
                drop(trouble);
                if due {
                    tracing::warn!(
                        signal = self.signal.lower(), endpoint = %self.target, lost, error,
                        "telemetry is not exported; the service goes on without, and this is said at most once a minute \
                         (OTEL_EXPORTER_OTLP_ENDPOINT says where to, OTEL_SDK_DISABLED=true turns it off)"
                    );
                }
            }
        }
    }
}

/// An exporter with a deadline and a count.
#[derive(Debug)]
pub(crate) struct Guarded<E> {
    pub(crate) inner: E,
    pub(crate) health: Arc<Health>,
    /// Exporters use the network through this runtime, whatever thread they are asked on.
    pub(crate) runtime: Handle,
    /// The time one export may take.
    pub(crate) limit: Duration,
    /// Becomes true when exports are to be given up.
    pub(crate) closing: watch::Receiver<bool>,
}

impl<E> Guarded<E> {
    async fn run(&self, count: u64, export: impl Future<Output = OTelSdkResult>) {
        let mut closing = self.closing.clone();
        let mut bounded = pin!(async {
            tokio::select! {
                ended = tokio::time::timeout(self.limit, export) => ended.unwrap_or(Err(OTelSdkError::Timeout(self.limit))),
                _ = closing.wait_for(|closing| *closing) => Err(OTelSdkError::AlreadyShutdown),
            }
        });
        let result = std::future::poll_fn(|cx| {
            let _runtime = self.runtime.enter();
            let polled: Poll<OTelSdkResult> = bounded.as_mut().poll(cx);
            polled
        })
        .await;
        self.health.ended(count, &result);
    }
}

// An export that fails is counted and reported here; the SDK would only log it again, for every batch.

impl<E: SpanExporter> SpanExporter for Guarded<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len() as u64;
        self.health.taken(count);
        self.run(count, self.inner.export(batch)).await;
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Guarded<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count() as u64;
        self.health.taken(count);
        self.run(count, self.inner.export(batch)).await;
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Guarded<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        // Sums are cumulative: the first export has what was counted until then.
        if self.health.hold.is_held() {
            return Ok(());
        }
        let count = data_points(metrics);
        self.health.taken(count);
        self.run(count, self.inner.export(metrics)).await;
        Ok(())
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

fn data_points(metrics: &ResourceMetrics) -> u64 {
    fn of<T>(data: &MetricData<T>) -> usize {
        match data {
            MetricData::Gauge(gauge) => gauge.data_points().count(),
            MetricData::Sum(sum) => sum.data_points().count(),
            MetricData::Histogram(histogram) => histogram.data_points().count(),
            MetricData::ExponentialHistogram(histogram) => histogram.data_points().count(),
        }
    }
    let points = metrics.scope_metrics().flat_map(|scope| scope.metrics()).map(|metric| match metric.data() {
        AggregatedMetrics::F64(data) => of(data),
        AggregatedMetrics::U64(data) => of(data),
        AggregatedMetrics::I64(data) => of(data),
    });
    points.sum::<usize>() as u64
}

/// A batch processor that takes no more than there is room for.
#[derive(Debug)]
pub(crate) struct Bounded<P> {
    pub(crate) inner: P,
    pub(crate) health: Arc<Health>,
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        // Spans that are recorded for the debug page alone are not sampled.
        if span.span_context.is_sampled() && self.health.admit() {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<P: LogProcessor> LogProcessor for Bounded<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.health.admit() {
            self.inner.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tracing_subscriber::layer::{Layer, SubscriberExt};

    use super::*;

    /// Counts lines by level.
    #[derive(Clone, Default)]
    struct Lines(Arc<[AtomicUsize; 2]>);

    impl<S: tracing::Subscriber> Layer<S> for Lines {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            let [warned, informed] = &*self.0;
            let count = if *event.metadata().level() == tracing::Level::WARN { warned } else { informed };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn trouble_is_said_once_and_so_is_its_end() {
        let lines = Lines::default();
        let said = || {
            let [warned, informed] = &*lines.0;
            (warned.load(Ordering::Relaxed), informed.load(Ordering::Relaxed))
        };
        let reports = Reports::default();
        let new = |signal| Health::new(signal, "exporter", "http://nowhere".into(), 8, &reports, &Hold::default());
        let (traces, logs) = (new(Signal::Traces), new(Signal::Logs));
        let failure = || Err(OTelSdkError::InternalFailure("refused".into()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines.clone()), || {
            for _ in 0..100 {
                traces.ended(2, &failure());
                logs.ended(3, &failure());
            }
            assert_eq!(said(), (1, 0));
            traces.ended(2, &Ok(()));
            logs.ended(3, &Ok(()));
            assert_eq!(said(), (1, 1), "what was not reported needs no end");
            traces.ended(2, &failure());
            traces.ended(2, &Ok(()));
            assert_eq!(said(), (1, 1), "an exporter that comes and goes is no flood");
        });
        assert_eq!((traces.state().failed, traces.state().exported), (202, 4));
    }

    #[test]
    fn the_queue_holds_what_it_holds() {
        let health =
            Health::new(Signal::Traces, "exporter", "http://nowhere".into(), 2, &Reports::default(), &Hold::default());
        assert_eq!([health.admit(), health.admit(), health.admit()], [true, true, false]);
        health.taken(2);
        assert!(health.admit());
        let state = health.state();
        assert_eq!((state.queued, state.processed, state.dropped), (1, 2, 1));
    }
}
