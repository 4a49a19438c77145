//! Processors and readers, as the configuration asks for them.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::propagation::{TextMapCompositePropagator, TextMapPropagator};
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatchConfig, BatchLogProcessor, LogExporter, LoggerProviderBuilder,
};
use opentelemetry_sdk::metrics::{MeterProviderBuilder, PeriodicReader};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatchConfig, BatchSpanProcessor, Sampler as SdkSampler, SamplingDecision, SamplingResult,
    ShouldSample, SpanExporter, TracerProviderBuilder,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::config::{Batch, Config, Exporter, Propagator, Sampler, Signal};
use crate::export::{Bounded, Guarded, Health, Hold, Reports};
use crate::exporters;
use crate::start::Error;

pub(crate) fn propagator(propagators: &[Propagator]) -> TextMapCompositePropagator {
    TextMapCompositePropagator::new(
        propagators
            .iter()
            .map(|propagator| -> Box<dyn TextMapPropagator + Send + Sync> {
                match propagator {
                    Propagator::TraceContext => Box::new(TraceContextPropagator::new()),
                    Propagator::Baggage => Box::new(BaggagePropagator::new()),
                }
            })
            .collect(),
    )
}

/// Records for the debug page what `inner` would drop; what is not sampled is never exported.
#[derive(Clone, Debug)]
struct RecordAll(SdkSampler);

impl ShouldSample for RecordAll {
    fn should_sample(
        &self,
        parent: Option<&opentelemetry::Context>,
        trace: opentelemetry::trace::TraceId,
        name: &str,
        kind: &opentelemetry::trace::SpanKind,
        attributes: &[opentelemetry::KeyValue],
        links: &[opentelemetry::trace::Link],
    ) -> SamplingResult {
        let mut result = self.0.should_sample(parent, trace, name, kind, attributes, links);
        if result.decision == SamplingDecision::Drop {
            result.decision = SamplingDecision::RecordOnly;
        }
        result
    }
}

/// Makes the processors and readers that the configuration asks for.
pub(crate) struct Pipeline<'a> {
    pub(crate) config: &'a Config,
    pub(crate) runtime: &'a Handle,
    pub(crate) closing: watch::Receiver<bool>,
    pub(crate) exporters: Vec<Arc<Health>>,
    pub(crate) reports: Reports,
    pub(crate) hold: Hold,
}

impl Pipeline<'_> {
    /// The state of a new exporter; with the others of this process it shares when trouble was last reported, and whether export has started.
    fn health(&self, signal: Signal, exporter: &'static str, target: String, capacity: usize) -> Arc<Health> {
        Health::new(signal, exporter, target, capacity, &self.reports, &self.hold)
    }

    pub(crate) fn sampler(&self, record_all: bool) -> Box<dyn ShouldSample> {
        let root = match self.config.sampler {
            Sampler::AlwaysOn => SdkSampler::AlwaysOn,
            Sampler::AlwaysOff => SdkSampler::AlwaysOff,
            Sampler::Ratio(ratio) => SdkSampler::TraceIdRatioBased(ratio),
        };
        let sampler = if self.config.parent_based { SdkSampler::ParentBased(Box::new(root)) } else { root };
        if record_all { Box::new(RecordAll(sampler)) } else { Box::new(sampler) }
    }

    fn guard<E>(&mut self, inner: E, limit: Duration, health: Arc<Health>) -> Guarded<E> {
        self.exporters.push(Arc::clone(&health));
        Guarded { inner, health, runtime: self.runtime.clone(), limit, closing: self.closing.clone() }
    }

    pub(crate) fn traces(&mut self, mut provider: TracerProviderBuilder) -> Result<TracerProviderBuilder, Error> {
        let config = self.config;
        if let Some(limit) = config.span_attributes {
            provider = provider.with_max_attributes_per_span(limit);
        }
        if let Some(limit) = config.span_events {
            provider = provider.with_max_events_per_span(limit);
        }
        if let Some(limit) = config.span_links {
            provider = provider.with_max_links_per_span(limit);
        }
        for exporter in &config.traces {
            provider = match exporter {
                Exporter::Otlp(otlp) => {
                    let kind = exporters::component(Signal::Traces, otlp.protocol);
                    let health = self.health(Signal::Traces, kind, otlp.endpoint.clone(), config.spans.queue);
                    provider.with_span_processor(self.span_processor(exporters::spans(otlp)?, health))
                }
                Exporter::Console | Exporter::Prometheus => {
                    let health =
                        self.health(Signal::Traces, "console_span_exporter", "console".into(), config.spans.queue);
                    provider
                        .with_span_processor(self.span_processor(opentelemetry_stdout::SpanExporter::default(), health))
                }
            };
        }
        Ok(provider)
    }

    fn span_processor(
        &mut self,
        exporter: impl SpanExporter + 'static,
        health: Arc<Health>,
    ) -> Bounded<BatchSpanProcessor> {
        let Batch { queue, batch, delay, timeout } = self.config.spans;
        let settings = SpanBatchConfig::default()
            .with_max_queue_size(queue)
            .with_max_export_batch_size(batch)
            .with_scheduled_delay(delay)
            .build();
        let exporter = self.guard(exporter, timeout, Arc::clone(&health));
        Bounded { inner: BatchSpanProcessor::new(exporter, settings), health }
    }

    pub(crate) fn logs(&mut self, mut provider: LoggerProviderBuilder) -> Result<LoggerProviderBuilder, Error> {
        let config = self.config;
        for exporter in &config.logs {
            provider = match exporter {
                Exporter::Otlp(otlp) => {
                    let kind = exporters::component(Signal::Logs, otlp.protocol);
                    let health = self.health(Signal::Logs, kind, otlp.endpoint.clone(), config.records.queue);
                    provider.with_log_processor(self.log_processor(exporters::logs(otlp)?, health))
                }
                Exporter::Console | Exporter::Prometheus => {
                    let health =
                        self.health(Signal::Logs, "console_log_exporter", "console".into(), config.records.queue);
                    provider
                        .with_log_processor(self.log_processor(opentelemetry_stdout::LogExporter::default(), health))
                }
            };
        }
        Ok(provider)
    }

    fn log_processor(
        &mut self,
        exporter: impl LogExporter + 'static,
        health: Arc<Health>,
    ) -> Bounded<BatchLogProcessor> {
        let Batch { queue, batch, delay, timeout } = self.config.records;
        let settings = LogBatchConfig::default()
            .with_max_queue_size(queue)
            .with_max_export_batch_size(batch)
            .with_scheduled_delay(delay)
            .build();
        let exporter = self.guard(exporter, timeout, Arc::clone(&health));
        Bounded { inner: BatchLogProcessor::builder(exporter).with_batch_config(settings).build(), health }
    }

    pub(crate) fn metrics(
        &mut self,
        mut provider: MeterProviderBuilder,
    ) -> Result<(MeterProviderBuilder, Option<prometheus::Registry>), Error> {
        let config = self.config;
        let (interval, limit) = (config.metric_interval, config.metric_timeout);
        let mut registry = None;
        for exporter in &config.metrics {
            provider = match exporter {
                Exporter::Otlp(otlp) => {
                    let kind = exporters::component(Signal::Metrics, otlp.protocol);
                    let health = self.health(Signal::Metrics, kind, otlp.endpoint.clone(), 0);
                    let exporter = self.guard(exporters::metrics(otlp, config.temporality)?, limit, health);
                    provider.with_reader(PeriodicReader::builder(exporter).with_interval(interval).build())
                }
                Exporter::Console => {
                    let health = self.health(Signal::Metrics, "console_metric_exporter", "console".into(), 0);
                    let exporter = self.guard(opentelemetry_stdout::MetricExporter::default(), limit, health);
                    provider.with_reader(PeriodicReader::builder(exporter).with_interval(interval).build())
                }
                Exporter::Prometheus => {
                    let prometheus = registry.insert(prometheus::Registry::new()).clone();
                    let reader = opentelemetry_prometheus::exporter()
                        .with_registry(prometheus)
                        .scope_info_enabled(false)
                        .build()
                        .map_err(|error| Error::Exporter { target: "prometheus".into(), reason: error.to_string() })?;
                    provider.with_reader(reader)
                }
            };
        }
        Ok((provider, registry))
    }
}
