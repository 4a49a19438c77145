//! Exporters with a deadline. A failed export is counted and reported by [`Health`]; returning it would make the SDK log it again for each batch.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics};
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::{Health, forward};

/// An exporter with a deadline, whose results are counted.
#[derive(Debug)]
pub(crate) struct GuardedExporter<E> {
    pub(crate) inner: E,
    pub(crate) health: Arc<Health>,
    /// Entered while the export is polled: the SDK calls exporters on threads of its own, outside any runtime.
    pub(crate) runtime: Handle,
    /// The deadline of one export.
    pub(crate) timeout: Duration,
    /// Becomes true when exports must be abandoned.
    pub(crate) closing: watch::Receiver<bool>,
}

impl<E> GuardedExporter<E> {
    async fn run(&self, count: u64, export: impl Future<Output = OTelSdkResult>) {
        self.health.record_dequeued(count);
        let mut closing = self.closing.clone();
        let mut bounded = pin!(async {
            tokio::select! {
                ended = tokio::time::timeout(self.timeout, export) => ended.unwrap_or(Err(OTelSdkError::Timeout(self.timeout))),
                _ = closing.wait_for(|closing| *closing) => Err(OTelSdkError::AlreadyShutdown),
            }
        });
        let result = std::future::poll_fn(|cx| {
            let _runtime = self.runtime.enter();
            let polled: Poll<OTelSdkResult> = bounded.as_mut().poll(cx);
            polled
        })
        .await;
        self.health.record_result(count, &result);
    }
}

impl<E: SpanExporter> SpanExporter for GuardedExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.run(batch.len() as u64, self.inner.export(batch)).await;
        Ok(())
    }

    forward!(exporter);
}

impl<E: LogExporter> LogExporter for GuardedExporter<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.run(batch.iter().count() as u64, self.inner.export(batch)).await;
        Ok(())
    }

    forward!(exporter);
}

impl<E: PushMetricExporter> PushMetricExporter for GuardedExporter<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        // Held sums are not lost: they are cumulative, so the first export contains them.
        if !self.health.is_held() {
            self.run(data_points(metrics), self.inner.export(metrics)).await;
        }
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
    fn count<T>(data: &MetricData<T>) -> usize {
        match data {
            MetricData::Gauge(gauge) => gauge.data_points().count(),
            MetricData::Sum(sum) => sum.data_points().count(),
            MetricData::Histogram(histogram) => histogram.data_points().count(),
            MetricData::ExponentialHistogram(histogram) => histogram.data_points().count(),
        }
    }
    let points = metrics.scope_metrics().flat_map(|scope| scope.metrics()).map(|metric| match metric.data() {
        AggregatedMetrics::F64(data) => count(data),
        AggregatedMetrics::U64(data) => count(data),
        AggregatedMetrics::I64(data) => count(data),
    });
    points.sum::<usize>() as u64
}
