//! Starting and ending telemetry.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use opentelemetry::{global, metrics::MeterProvider as _};
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use crate::config::{Config, Otlp};
use crate::debug::Debug;
use crate::env::{Env, EnvError};
use crate::export::{ExportStart, Hold, Reports};
use crate::gauges::Gauges;
use crate::instruments::{Instruments, SCOPE};
use crate::pipeline::{Pipeline, propagator};
use crate::subscriber::{log_filter, subscriber};
use crate::{process, resource};

/// How long [`Telemetry::shutdown`] takes at most.
pub const SHUTDOWN_WITHIN: Duration = Duration::from_secs(2);
/// How long [`Telemetry::flush`] takes at most.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);
/// How much of it is left to exporters to give up once they are told to.
const GIVE_UP_WITHIN: Duration = Duration::from_millis(500);

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
    /// Whether nothing is exported before [`ExportStart::start`].
    pub hold_export: bool,
}

impl Settings {
    /// Settings of a service that logs at `info` and has no debug page.
    pub fn new(service_name: impl Into<String>, service_version: impl Into<String>) -> Self {
        Self {
            service_name: service_name.into(),
            service_version: service_version.into(),
            log_filter: "info".into(),
            debug: false,
            hold_export: false,
        }
    }

    /// The same with the debug page's view of spans.
    #[must_use]
    pub fn with_debug(self) -> Self {
        Self { debug: true, ..self }
    }

    /// The same with nothing exported until [`ExportStart::start`], for a receiver that is not there yet: what ends or is logged before
    /// is not exported and not counted as lost. Nothing is kept for later.
    #[must_use]
    pub fn with_export_held(self) -> Self {
        Self { hold_export: true, ..self }
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
#[error("telemetry could not be flushed in time; what was queued is lost")]
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
    export_start: ExportStart,
    providers: Providers,
    running: Mutex<Option<Sending>>,
    closing: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
pub(crate) struct Providers {
    pub(crate) traces: SdkTracerProvider,
    pub(crate) metrics: SdkMeterProvider,
    pub(crate) logs: SdkLoggerProvider,
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
        let mut pipeline = Pipeline {
            config: &config,
            runtime: &runtime,
            closing: watching,
            exporters: Vec::new(),
            reports: Reports::default(),
            hold: Hold::new(settings.hold_export),
        };
        let export_start = ExportStart(pipeline.hold.clone());
        let debug = Debug::new(config.disabled);
        let resource = resource::resource(settings, &config);

        let mut traces = SdkTracerProvider::builder().with_resource(resource.clone());
        let mut metrics = SdkMeterProvider::builder().with_resource(resource.clone());
        let mut logs = SdkLoggerProvider::builder().with_resource(resource);
        let mut registry = None;
        if !config.disabled {
            // Exporters over gRPC are made where there is a runtime.
            let _runtime = runtime.enter();
            traces = pipeline.traces(traces.with_sampler(pipeline.sampler(settings.debug)))?;
            if settings.debug {
                traces = traces.with_span_processor(debug.processor());
            }
            (metrics, registry) = pipeline.metrics(metrics)?;
            logs = pipeline.logs(logs)?;
        }
        let exporters = pipeline.exporters;
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
        let running = Mutex::new(Some(sending));
        let telemetry = Self { instruments, gauges, debug, export_start, providers, running, closing };
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

    /// What starts the export of a process whose settings hold it.
    pub fn export_start(&self) -> &ExportStart {
        &self.export_start
    }

    /// Exports what is queued, now, and reads the gauges. Takes at most 5 s. Blocks its thread, so
    /// it is for tests and tools; may be called on any.
    ///
    /// # Errors
    /// When it took too long.
    pub fn flush(&self) -> Result<(), Unflushed> {
        let providers = self.providers.clone();
        within(FLUSH_WITHIN, move || {
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
