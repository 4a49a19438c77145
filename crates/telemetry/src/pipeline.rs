//! The providers of the three signals, with the processors and readers that the configuration selects.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatchConfig, BatchLogProcessor, LogExporter, SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatchConfig, BatchSpanProcessor, SdkTracerProvider, SpanExporter, SpanProcessor,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::config::{Batch, Config, Exporter, Signal};
use crate::error::Error;
use crate::export::{BoundedProcessor, ExportHold, GuardedExporter, Health, WarningLimit};
use crate::exporters;
use crate::sampler::sampler;

/// The providers of the three signals.
#[derive(Clone, Debug)]
pub(crate) struct Providers {
    pub(crate) traces: SdkTracerProvider,
    pub(crate) metrics: SdkMeterProvider,
    pub(crate) logs: SdkLoggerProvider,
}

/// Builds the providers, and collects the health of each exporter on the way.
pub(crate) struct Pipeline<'a> {
    config: &'a Config,
    resource: Resource,
    runtime: &'a Handle,
    /// Becomes true when exports must be abandoned.
    closing: watch::Receiver<bool>,
    hold: ExportHold,
    warnings: WarningLimit,
    pub(crate) exporters: Vec<Arc<Health>>,
    /// What `/metrics` serves; `None` unless Prometheus is a configured exporter.
    pub(crate) registry: Option<prometheus::Registry>,
}

/// The SDK has one builder for each signal, with the same methods and no common trait.
macro_rules! batch_config {
    ($builder:ident, $batch:expr) => {
        $builder::default()
            .with_max_queue_size($batch.queue)
            .with_max_export_batch_size($batch.batch)
            .with_scheduled_delay($batch.delay)
            .build()
    };
}

impl<'a> Pipeline<'a> {
    pub(crate) fn new(
        config: &'a Config,
        resource: Resource,
        runtime: &'a Handle,
        closing: watch::Receiver<bool>,
        hold: ExportHold,
    ) -> Self {
        let warnings = WarningLimit::default();
        Self { config, resource, runtime, closing, hold, warnings, exporters: Vec::new(), registry: None }
    }

    /// Builds the providers. `debug`, if any, sees every finished span, sampled or not. A disabled SDK gets providers without processors.
    ///
    /// # Errors
    /// When an exporter cannot be created.
    pub(crate) fn build(&mut self, debug: Option<impl SpanProcessor + 'static>) -> Result<Providers, Error> {
        // Creating an exporter over gRPC needs a runtime.
        let _runtime = self.runtime.enter();
        Ok(Providers { traces: self.traces(debug)?, metrics: self.metrics()?, logs: self.logs()? })
    }

    fn traces(&mut self, debug: Option<impl SpanProcessor + 'static>) -> Result<SdkTracerProvider, Error> {
        let config = self.config;
        let mut provider = SdkTracerProvider::builder().with_resource(self.resource.clone());
        if config.disabled {
            return Ok(provider.build());
        }
        provider = provider.with_sampler(sampler(config, debug.is_some()));
        if let Some(limit) = config.span_attributes {
            provider = provider.with_max_attributes_per_span(limit);
        }
        if let Some(limit) = config.span_events {
            provider = provider.with_max_events_per_span(limit);
        }
        if let Some(limit) = config.span_links {
            provider = provider.with_max_links_per_span(limit);
        }
        for kind in &config.traces {
            provider = provider.with_span_processor(match kind {
                Exporter::Otlp(otlp) => self.span_processor(kind, exporters::spans(otlp)?),
                Exporter::Console | Exporter::Prometheus => {
                    self.span_processor(kind, opentelemetry_stdout::SpanExporter::default())
                }
            });
        }
        if let Some(debug) = debug {
            provider = provider.with_span_processor(debug);
        }
        Ok(provider.build())
    }

    fn span_processor(
        &mut self,
        kind: &Exporter,
        exporter: impl SpanExporter + 'static,
    ) -> BoundedProcessor<BatchSpanProcessor> {
        let batch = self.config.spans;
        let (exporter, health) = self.guard_batches(Signal::Traces, kind, batch, exporter);
        let inner = BatchSpanProcessor::new(exporter, batch_config!(SpanBatchConfig, batch));
        BoundedProcessor { inner, health }
    }

    fn logs(&mut self) -> Result<SdkLoggerProvider, Error> {
        let config = self.config;
        let mut provider = SdkLoggerProvider::builder().with_resource(self.resource.clone());
        if config.disabled {
            return Ok(provider.build());
        }
        for kind in &config.logs {
            provider = provider.with_log_processor(match kind {
                Exporter::Otlp(otlp) => self.log_processor(kind, exporters::logs(otlp)?),
                Exporter::Console | Exporter::Prometheus => {
                    self.log_processor(kind, opentelemetry_stdout::LogExporter::default())
                }
            });
        }
        Ok(provider.build())
    }

    fn log_processor(
        &mut self,
        kind: &Exporter,
        exporter: impl LogExporter + 'static,
    ) -> BoundedProcessor<BatchLogProcessor> {
        let batch = self.config.records;
        let (exporter, health) = self.guard_batches(Signal::Logs, kind, batch, exporter);
        let config = batch_config!(LogBatchConfig, batch);
        let inner = BatchLogProcessor::builder(exporter).with_batch_config(config).build();
        BoundedProcessor { inner, health }
    }

    fn metrics(&mut self) -> Result<SdkMeterProvider, Error> {
        let config = self.config;
        let mut provider = SdkMeterProvider::builder().with_resource(self.resource.clone());
        if config.disabled {
            return Ok(provider.build());
        }
        for kind in &config.metrics {
            provider = match kind {
                Exporter::Otlp(otlp) => {
                    provider.with_reader(self.metric_reader(kind, exporters::metrics(otlp, config.temporality)?))
                }
                Exporter::Console => {
                    provider.with_reader(self.metric_reader(kind, opentelemetry_stdout::MetricExporter::default()))
                }
                Exporter::Prometheus => {
                    let registry = self.registry.insert(prometheus::Registry::new()).clone();
                    let reader = opentelemetry_prometheus::exporter()
                        .with_registry(registry)
                        .scope_info_enabled(false)
                        .build()
                        .map_err(|error| Error::Exporter { target: "prometheus".into(), reason: error.to_string() })?;
                    provider.with_reader(reader)
                }
            };
        }
        Ok(provider.build())
    }

    fn metric_reader<E: PushMetricExporter>(
        &mut self,
        kind: &Exporter,
        exporter: E,
    ) -> PeriodicReader<GuardedExporter<E>> {
        // Metrics do not queue.
        let exporter = self.guard(Signal::Metrics, kind, 0, self.config.metric_timeout, exporter);
        PeriodicReader::builder(exporter).with_interval(self.config.metric_interval).build()
    }

    fn guard_batches<E>(
        &mut self,
        signal: Signal,
        kind: &Exporter,
        batch: Batch,
        inner: E,
    ) -> (GuardedExporter<E>, Arc<Health>) {
        let exporter = self.guard(signal, kind, batch.queue, batch.timeout, inner);
        let health = Arc::clone(&exporter.health);
        (exporter, health)
    }

    /// Wraps an exporter, and keeps its health for the debug page and for `otel.sdk.*`.
    fn guard<E>(
        &mut self,
        signal: Signal,
        kind: &Exporter,
        capacity: usize,
        timeout: Duration,
        inner: E,
    ) -> GuardedExporter<E> {
        let (component, target) = (exporters::component(signal, kind), exporters::target(kind));
        let health = Health::new(signal, component, target, capacity, &self.warnings, &self.hold);
        self.exporters.push(Arc::clone(&health));
        GuardedExporter { inner, health, runtime: self.runtime.clone(), timeout, closing: self.closing.clone() }
    }
}
