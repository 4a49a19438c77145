//! The health of one exporter: how much it queued, sent and lost, and its last error.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};

use super::ExportHold;
use crate::config::Signal;

/// The shortest time between two warnings.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// Counts the spans, log records or data points of one exporter.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) signal: Signal,
    /// The `otel.component.type` of the exporter.
    pub(crate) exporter: &'static str,
    /// The exporter's destination, for messages.
    pub(crate) target: String,
    /// The length of the queue; 0 for metrics, which do not queue.
    pub(crate) capacity: u64,
    queued: AtomicU64,
    processed: AtomicU64,
    dropped: AtomicU64,
    exported: AtomicU64,
    failed: AtomicU64,
    outage: Mutex<Outage>,
    warnings: WarningLimit,
    hold: ExportHold,
}

/// When any exporter of this process last warned. It is shared, because a collector that is down fails every signal at once.
#[derive(Clone, Debug, Default)]
pub(crate) struct WarningLimit(Arc<Mutex<Option<Instant>>>);

impl WarningLimit {
    /// Whether a warning is due. If it is, the next one is due after [`WARN_INTERVAL`].
    fn try_acquire(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

/// The failures since the last successful export.
#[derive(Debug, Default)]
struct Outage {
    error: Option<String>,
    /// Whether a warning reported this outage, so that its end is logged too.
    reported: bool,
    last_success: Option<SystemTime>,
    lost: u64,
}

/// The health of one exporter at one moment. Counts are spans, log records or metric data points since the start.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ExportState {
    /// Whether export is held.
    pub held: bool,
    /// `traces`, `metrics` or `logs`.
    pub signal: &'static str,
    /// The kind of exporter, as in the attribute `otel.component.type`.
    pub exporter: &'static str,
    /// The exporter's destination.
    pub target: String,
    /// Items waiting in the queue now.
    pub queued: u64,
    /// The length of the queue; 0 for metrics, which do not queue.
    pub capacity: u64,
    /// Items handed to the exporter.
    pub processed: u64,
    /// Items dropped because the queue was full.
    pub dropped: u64,
    /// Items that the destination accepted.
    pub exported: u64,
    /// Items lost because their export failed.
    pub failed: u64,
    /// The error of the last export; `None` if it succeeded.
    pub error: Option<String>,
    /// The time of the last successful export, in seconds since the Unix epoch.
    pub last_success: Option<u64>,
}

impl Health {
    pub(crate) fn new(
        signal: Signal,
        exporter: &'static str,
        target: String,
        capacity: usize,
        warnings: &WarningLimit,
        hold: &ExportHold,
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
            outage: Mutex::default(),
            warnings: warnings.clone(),
            hold: hold.clone(),
        })
    }

    pub(crate) fn state(&self) -> ExportState {
        let outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        ExportState {
            held: self.is_held(),
            signal: self.signal.lower(),
            exporter: self.exporter,
            target: self.target.clone(),
            queued: self.queued.load(Ordering::Relaxed),
            capacity: self.capacity,
            processed: self.processed.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            exported: self.exported.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            error: outage.error.clone(),
            last_success: outage.last_success.map(since_epoch),
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.hold.is_held()
    }

    /// Reserves room in the queue. Counts a drop if the queue is full, and nothing while export is held.
    ///
    /// The SDK's own queue has the same length and is drained before [`Health::record_dequeued`], so it never drops on its own.
    pub(super) fn try_enqueue(&self) -> bool {
        if self.is_held() {
            return false;
        }
        let reserve = |queued| (queued < self.capacity).then_some(queued + 1);
        let reserved = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve).is_ok();
        if !reserved {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        reserved
    }

    /// Counts a batch that left the queue for the exporter.
    pub(super) fn record_dequeued(&self, count: u64) {
        let remaining = |queued: u64| Some(queued.saturating_sub(count));
        let _ = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, remaining);
        self.processed.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts the result of an export. Logs a failure if a warning is due, and the recovery from an outage that was logged.
    pub(super) fn record_result(&self, count: u64, result: &OTelSdkResult) {
        match result {
            Ok(()) => self.record_success(count),
            Err(error) => self.record_failure(count, error),
        }
    }

    fn record_success(&self, count: u64) {
        self.exported.fetch_add(count, Ordering::Relaxed);
        let success = Outage { last_success: Some(SystemTime::now()), ..Outage::default() };
        let outage = std::mem::replace(&mut *self.outage.lock().unwrap_or_else(PoisonError::into_inner), success);
        if outage.reported {
            tracing::info!(
                signal = self.signal.lower(), endpoint = %self.target, lost = outage.lost, "telemetry is exported again"
            );
        }
    }

    fn record_failure(&self, count: u64, error: &OTelSdkError) {
        self.failed.fetch_add(count, Ordering::Relaxed);
        let error = match error {
            OTelSdkError::Timeout(timeout) => format!("no answer within {timeout:?}"),
            OTelSdkError::AlreadyShutdown => "shut down before it was sent".to_owned(),
            OTelSdkError::InternalFailure(text) => text.clone(),
        };
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        outage.lost += count;
        outage.error = Some(error.clone());
        let lost = outage.lost;
        let is_due = self.warnings.try_acquire();
        outage.reported |= is_due;
        drop(outage);
        if is_due {
            tracing::warn!(
                signal = self.signal.lower(), endpoint = %self.target, lost, error,
                "telemetry is not exported; the service keeps running without it. Set OTEL_EXPORTER_OTLP_ENDPOINT to the address of a \
                 collector, or OTEL_SDK_DISABLED=true to turn telemetry off. This warning appears at most once a minute"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tracing_subscriber::layer::{Layer, SubscriberExt};

    use super::*;

    /// Counts log events by level.
    #[derive(Clone, Default)]
    struct EventCounts(Arc<[AtomicUsize; 2]>);

    impl EventCounts {
        /// Warnings, and events of other levels.
        fn get(&self) -> (usize, usize) {
            let [warnings, others] = &*self.0;
            (warnings.load(Ordering::Relaxed), others.load(Ordering::Relaxed))
        }
    }

    impl<S: tracing::Subscriber> Layer<S> for EventCounts {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            let [warnings, others] = &*self.0;
            let count = if *event.metadata().level() == tracing::Level::WARN { warnings } else { others };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn health(signal: Signal, capacity: usize, warnings: &WarningLimit) -> Arc<Health> {
        Health::new(signal, "exporter", "http://nowhere".into(), capacity, warnings, &ExportHold::default())
    }

    #[test]
    fn outage_of_several_exporters_is_logged_once_and_so_is_its_end() {
        let events = EventCounts::default();
        let warnings = WarningLimit::default();
        let (traces, logs) = (health(Signal::Traces, 8, &warnings), health(Signal::Logs, 8, &warnings));
        let failure = || Err(OTelSdkError::InternalFailure("refused".into()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(events.clone()), || {
            for _ in 0..100 {
                traces.record_result(2, &failure());
                logs.record_result(3, &failure());
            }
            assert_eq!(events.get(), (1, 0));
            traces.record_result(2, &Ok(()));
            logs.record_result(3, &Ok(()));
            assert_eq!(events.get(), (1, 1), "an outage that was not logged has no logged end");
            traces.record_result(2, &failure());
            traces.record_result(2, &Ok(()));
            assert_eq!(events.get(), (1, 1), "an exporter that keeps failing and recovering does not flood the log");
        });
        assert_eq!((traces.state().failed, traces.state().exported), (202, 4));
    }

    #[test]
    fn full_queue_drops_and_counts() {
        let health = health(Signal::Traces, 2, &WarningLimit::default());
        assert_eq!([health.try_enqueue(), health.try_enqueue(), health.try_enqueue()], [true, true, false]);
        health.record_dequeued(2);
        assert!(health.try_enqueue());
        let state = health.state();
        assert_eq!((state.queued, state.processed, state.dropped), (1, 2, 1));
    }
}
