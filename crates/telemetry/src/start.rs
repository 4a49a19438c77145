//! Starting and ending telemetry.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use opentelemetry::propagation::{TextMapCompositePropagator, TextMapPropagator};
use opentelemetry::trace::TracerProvider;
use opentelemetry::{global, metrics::MeterProvider as _};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatchConfig, BatchLogProcessor, LogExporter, SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatchConfig, BatchSpanProcessor, Sampler as SdkSampler, SamplingDecision, SamplingResult,
    SdkTracerProvider, ShouldSample, SpanExporter,
};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{Batch, Config, Exporter, LogFormat, Otlp, Propagator, Sampler, Signal};
use crate::debug::Debug;
use crate::env::{Env, EnvError};
use crate::export::{Bounded, Guarded, Health, Reports};
use crate::gauges::Gauges;
use crate::instruments::{Instruments, SCOPE};
use crate::logs::Line;
use crate::{exporters, process, resource};

/// How long [`Telemetry::shutdown`] takes at most.
pub const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);
/// How much of it is left to exporters to give up once they are told to.
const GIVE_UP_WITHIN: Duration = Duration::from_millis(500);

/// Libraries below the exporters. Their spans would make telemetry trace its own sending, and drown ours.
const PLUMBING: [&str; 7] = ["hyper", "h2", "tonic", "tower", "reqwest", "rustls", "opentelemetry"];

/// What a process says about itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `service.name` unless the environment says another.
    pub service_name: String,
    /// The `service.version`.
    pub service_version: String,
    /// The log filter unless the environment says another, such as `info`.
    pub log_filter: String,
    /// Whether spans are also kept for [`Telemetry::debug`]. Then unsampled spans are recorded too, but not exported.
    pub debug: bool,
}

impl Settings {
    /// Settings of a service that logs at `info` and has no debug page.
    pub fn new(service_name: impl Into<String>, service_version: impl Into<String>) -> Self {
        Self {
            service_name: service_name.into(),
            service_version: service_version.into(),
            log_filter: "info".into(),
            debug: false,
        }
    }

    /// The same with the debug page's view of spans.
    #[must_use]
    pub fn with_debug(self) -> Self {
        Self { debug: true, ..self }
    }
}

/// Why telemetry could not start. Each text names the variable and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The environment asks for something that is not understood.
    #[error(transparent)]
    Environment(#[from] EnvError),
    /// A file that a variable names could not be read.
    #[error("environment variable {variable}: {path:?} cannot be read: {error}")]
    File {
        /// The variable.
        variable: String,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// An exporter could not be made.
    #[error("the exporter to {target} cannot be made: {reason}")]
    Exporter {
        /// Where it would have sent.
        target: String,
        /// Why not.
        reason: String,
    },
    /// Telemetry's own thread could not be started.
    #[error("telemetry's thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
    /// A subscriber is installed already.
    #[error("telemetry is started already in this process")]
    Started,
}

impl Error {
    pub(crate) fn exporter(otlp: &Otlp, error: impl std::fmt::Display) -> Self {
        Self::Exporter { target: otlp.endpoint.clone(), reason: error.to_string() }
    }
}

/// The runtime that exporters send through. It may be dropped anywhere, unlike tokio's own.
#[derive(Debug)]
struct Sending(Option<Runtime>);

impl Sending {
    fn start() -> std::io::Result<(Self, Handle)> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            // For good: suppression does not follow a call into the tasks of its connection.
            .on_thread_start(|| std::mem::forget(opentelemetry::Context::enter_telemetry_suppressed_scope()))
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok((Self(Some(runtime)), handle))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What was still unsent when the time for shutting down was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("telemetry could not be flushed within {SHUTDOWN_WITHIN:?}; what was queued is lost")]
pub struct Unflushed;

/// The telemetry of this process.
///
/// It owns a runtime of one thread that all exporters send through, so that exporting depends on no other runtime and nothing
/// on that thread is ever traced. Dropping it is [`Telemetry::shutdown`].
#[derive(Debug)]
pub struct Telemetry {
    instruments: Instruments,
    gauges: Gauges,
    debug: Debug,
    providers: Providers,
    running: Mutex<Option<Sending>>,
    closing: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
struct Providers {
    traces: SdkTracerProvider,
    metrics: SdkMeterProvider,
    logs: SdkLoggerProvider,
}

impl Telemetry {
    /// Starts telemetry for the process: installs the subscriber of `tracing` and the propagators.
    ///
    /// May be called inside a tokio runtime or outside; inside, that runtime's saturation is measured (`tokio.*`).
    ///
    /// # Errors
    /// When the environment asks for what is not understood or cannot be had, or when it was started before.
    pub fn start(settings: &Settings, env: &Env) -> Result<Self, Error> {
        let (telemetry, dispatch) = Self::prepare(settings, env)?;
        tracing::dispatcher::set_global_default(dispatch).map_err(|_| Error::Started)?;
        Ok(telemetry)
    }

    /// As [`Telemetry::start`], but leaves it to the caller to install the subscriber, for tests.
    ///
    /// # Errors
    /// When the environment asks for what is not understood or cannot be had.
    pub fn prepare(settings: &Settings, env: &Env) -> Result<(Self, tracing::Dispatch), Error> {
        let config = Config::parse(env)?;
        let filters = (log_filter(settings, &config)?, log_filter(settings, &config)?);
        let (sending, runtime) = Sending::start()?;
        let (closing, watching) = watch::channel(false);
        let mut builder = Builder {
            config: &config,
            runtime: &runtime,
            closing: watching,
            exporters: Vec::new(),
            reports: Reports::default(),
        };
        let debug = Debug::new(config.disabled);
        let resource = resource::resource(settings, &config);

        let mut traces = SdkTracerProvider::builder().with_resource(resource.clone());
        let mut metrics = SdkMeterProvider::builder().with_resource(resource.clone());
        let mut logs = SdkLoggerProvider::builder().with_resource(resource);
        let mut registry = None;
        if !config.disabled {
            // Exporters over gRPC are made where there is a runtime.
            let _runtime = runtime.enter();
            traces = builder.traces(traces.with_sampler(builder.sampler(settings.debug)))?;
            if settings.debug {
                traces = traces.with_span_processor(debug.processor());
            }
            (metrics, registry) = builder.metrics(metrics)?;
            logs = builder.logs(logs)?;
        }
        let exporters = builder.exporters;
        let providers = Providers { traces: traces.build(), metrics: metrics.build(), logs: logs.build() };

        let meter = if config.disabled {
            opentelemetry::metrics::noop::NoopMeterProvider::new().meter(SCOPE)
        } else {
            providers.metrics.meter(SCOPE)
        };
        let instruments = if config.disabled { Instruments::noop() } else { Instruments::new(&providers.metrics) };
        process::observe_process(&meter, Instant::now());
        process::observe_exporters(&meter, &exporters);
        if let Ok(application) = Handle::try_current() {
            process::observe_runtime(&meter, &application);
        }
        let gauges = Gauges::new(runtime.clone(), meter);
        debug.connect(gauges.clone(), exporters, registry);

        global::set_text_map_propagator(propagator(&config.propagators));
        let dispatch = subscriber(filters, &config, &providers);
        let telemetry = Self { instruments, gauges, debug, providers, running: Mutex::new(Some(sending)), closing };
        Ok((telemetry, dispatch))
    }

    /// The instruments.
    pub fn instruments(&self) -> &Instruments {
        &self.instruments
    }

    /// The gauges that are read when collected.
    pub fn gauges(&self) -> &Gauges {
        &self.gauges
    }

    /// The live view of this process.
    pub fn debug(&self) -> &Debug {
        &self.debug
    }

    /// Exports what is queued, now, and reads the gauges. Takes at most [`SHUTDOWN_WITHIN`]. Blocks its thread, so
    /// it is for tests and tools; may be called on any.
    ///
    /// # Errors
    /// When it took too long.
    pub fn flush(&self) -> Result<(), Unflushed> {
        let providers = self.providers.clone();
        within(SHUTDOWN_WITHIN, move || {
            let _ = providers.traces.force_flush();
            let _ = providers.logs.force_flush();
            let _ = providers.metrics.force_flush();
        })
        .ok_or(Unflushed)
    }

    /// Exports what is queued and ends. Takes at most [`SHUTDOWN_WITHIN`], whatever the other side does, and may be called
    /// on any thread, of any runtime, more than once. It blocks its thread; nothing else depends on it.
    ///
    /// # Errors
    /// When the time was over before all was sent.
    pub fn shutdown(&self) -> Result<(), Unflushed> {
        let Some(sending) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let (done, ended) = mpsc::channel();
        let Providers { traces, metrics, logs } = self.providers.clone();
        // One thread each: a collector that hangs on one signal does not cost the others their time.
        let parts: [Box<dyn FnOnce() + Send>; 3] = [
            Box::new(move || drop(traces.shutdown_with_timeout(SHUTDOWN_WITHIN))),
            Box::new(move || drop(metrics.shutdown_with_timeout(SHUTDOWN_WITHIN))),
            Box::new(move || drop(logs.shutdown_with_timeout(SHUTDOWN_WITHIN))),
        ];
        for part in parts {
            let done = done.clone();
            std::thread::spawn(move || {
                part();
                let _ = done.send(());
            });
        }
        drop(done);
        let all_by = |deadline: Instant| {
            // The channel closes when every thread has ended.
            loop {
                match ended.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(()) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return true,
                    Err(mpsc::RecvTimeoutError::Timeout) => return false,
                }
            }
        };
        let deadline = Instant::now() + SHUTDOWN_WITHIN;
        let whole = all_by(deadline - GIVE_UP_WITHIN);
        if !whole {
            let _ = self.closing.send(true);
            all_by(deadline);
        }
        drop(sending);
        if whole { Ok(()) } else { Err(Unflushed) }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let _ = self.shutdown();
    }
}

/// Runs `work` on a thread of its own and waits for it, but not longer than `limit`.
fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    receiver.recv_timeout(limit).ok()
}

fn propagator(propagators: &[Propagator]) -> TextMapCompositePropagator {
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
struct Builder<'a> {
    config: &'a Config,
    runtime: &'a Handle,
    closing: watch::Receiver<bool>,
    exporters: Vec<Arc<Health>>,
    reports: Reports,
}

impl Builder<'_> {
    fn sampler(&self, record_all: bool) -> Box<dyn ShouldSample> {
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

    fn traces(
        &mut self,
        mut provider: opentelemetry_sdk::trace::TracerProviderBuilder,
    ) -> Result<opentelemetry_sdk::trace::TracerProviderBuilder, Error> {
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
                    let health =
                        Health::new(Signal::Traces, kind, otlp.endpoint.clone(), config.spans.queue, &self.reports);
                    provider.with_span_processor(self.span_processor(exporters::spans(otlp)?, health))
                }
                Exporter::Console | Exporter::Prometheus => {
                    let health = Health::new(
                        Signal::Traces,
                        "console_span_exporter",
                        "console".into(),
                        config.spans.queue,
                        &self.reports,
                    );
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

    fn logs(
        &mut self,
        mut provider: opentelemetry_sdk::logs::LoggerProviderBuilder,
    ) -> Result<opentelemetry_sdk::logs::LoggerProviderBuilder, Error> {
        let config = self.config;
        for exporter in &config.logs {
            provider = match exporter {
                Exporter::Otlp(otlp) => {
                    let kind = exporters::component(Signal::Logs, otlp.protocol);
                    let health =
                        Health::new(Signal::Logs, kind, otlp.endpoint.clone(), config.records.queue, &self.reports);
                    provider.with_log_processor(self.log_processor(exporters::logs(otlp)?, health))
                }
                Exporter::Console | Exporter::Prometheus => {
                    let health = Health::new(
                        Signal::Logs,
                        "console_log_exporter",
                        "console".into(),
                        config.records.queue,
                        &self.reports,
                    );
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

    fn metrics(
        &mut self,
        mut provider: opentelemetry_sdk::metrics::MeterProviderBuilder,
    ) -> Result<(opentelemetry_sdk::metrics::MeterProviderBuilder, Option<prometheus::Registry>), Error> {
        let config = self.config;
        let (interval, limit) = (config.metric_interval, config.metric_timeout);
        let mut registry = None;
        for exporter in &config.metrics {
            provider = match exporter {
                Exporter::Otlp(otlp) => {
                    let kind = exporters::component(Signal::Metrics, otlp.protocol);
                    let health = Health::new(Signal::Metrics, kind, otlp.endpoint.clone(), 0, &self.reports);
                    let exporter = self.guard(exporters::metrics(otlp, config.temporality)?, limit, health);
                    provider.with_reader(PeriodicReader::builder(exporter).with_interval(interval).build())
                }
                Exporter::Console => {
                    let health =
                        Health::new(Signal::Metrics, "console_metric_exporter", "console".into(), 0, &self.reports);
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

fn log_filter(settings: &Settings, config: &Config) -> Result<EnvFilter, EnvError> {
    let (variable, text) = match &config.log_filter {
        Some((variable, text)) => (variable.as_str(), text.as_str()),
        None => ("RUST_LOG", settings.log_filter.as_str()),
    };
    let fix = "set it to error, warn, info, debug, trace or off";
    if variable == "LOG_LEVEL" && text.parse::<LevelFilter>().is_err() {
        // The filter would take it for the name of a module and silence all others.
        return Err(EnvError::new(variable, text, fix));
    }
    // The SDK's own lines come per batch; what they say is counted and said once a minute by `export`.
    let filter = if text.contains("opentelemetry") { text.to_owned() } else { format!("opentelemetry=off,{text}") };
    EnvFilter::try_new(filter)
        .map_err(|_| EnvError::new(variable, text, format!("{fix}, or to a list such as info,gauntlet_manager=debug")))
}

fn subscriber(
    (for_lines, for_records): (EnvFilter, EnvFilter),
    config: &Config,
    providers: &Providers,
) -> tracing::Dispatch {
    let terminal = std::io::stderr().is_terminal();
    let line = match config.log_format {
        LogFormat::Human => Line::Human,
        LogFormat::Json => Line::Json,
        LogFormat::Auto => {
            if terminal {
                Line::Human
            } else {
                Line::Json
            }
        }
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(terminal && line == Line::Human)
        .event_format(line)
        .with_filter(for_lines);
    let plumbing = |target: &str| PLUMBING.iter().any(|library| target.starts_with(library));
    let spans = (!config.disabled).then(|| {
        tracing_opentelemetry::layer()
            .with_tracer(providers.traces.tracer(SCOPE))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_target(false)
            // Events are logs, exported as such with the ids of their span, so they are not repeated in the span.
            .with_filter(filter_fn(move |meta| {
                meta.is_span() && *meta.level() <= LevelFilter::INFO && !plumbing(meta.target())
            }))
    });
    let export_logs = !config.disabled && !config.logs.is_empty();
    let records = match export_logs {
        true => Some(
            OpenTelemetryTracingBridge::new(&providers.logs)
                .with_filter(for_records)
                .with_filter(filter_fn(move |meta| !plumbing(meta.target()))),
        ),
        false => None,
    };
    tracing_subscriber::registry().with(spans).with(lines).with(records).into()
}
