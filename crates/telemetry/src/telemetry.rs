//! The telemetry of a process, from start to shutdown.

use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use opentelemetry::{global, metrics::MeterProvider as _};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::config::Config;
use crate::context;
use crate::debug::DebugPage;
use crate::env::Env;
use crate::error::Error;
use crate::export::{ExportHold, ExportStart};
use crate::gauges::Gauges;
use crate::instruments::{Instruments, SCOPE};
use crate::pipeline::{Pipeline, Providers};
use crate::runtime::ExportRuntime;
use crate::settings::Settings;
use crate::subscriber::{log_filter, subscriber};
use crate::{process, resource};

/// The longest that [`Telemetry::shutdown`] takes.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest that [`Telemetry::flush`] takes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// The part of [`SHUTDOWN_TIMEOUT`] that is reserved for exporters to abandon their last export.
const ABANDON_TIMEOUT: Duration = Duration::from_millis(500);

/// The time for flushing or shutting down ran out before everything was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("telemetry could not be flushed in time; queued spans, metrics and log records are lost")]
pub struct FlushTimeout;

/// The telemetry of a process.
///
/// All exporters send on one thread that this owns, so export needs no other runtime and is itself never traced. Dropping it calls
/// [`Telemetry::shutdown`].
#[derive(Debug)]
pub struct Telemetry {
    instruments: Instruments,
    gauges: Gauges,
    debug: DebugPage,
    export_start: ExportStart,
    providers: Providers,
    /// `None` after shutdown.
    runtime: Mutex<Option<ExportRuntime>>,
    closing: watch::Sender<bool>,
}

impl Telemetry {
    /// Starts the telemetry of this process, and installs the `tracing` subscriber and the propagators.
    ///
    /// May be called inside a tokio runtime or outside. Inside, the metrics `tokio.*` report that runtime.
    ///
    /// # Errors
    /// When a variable cannot be used, an exporter cannot be created, or telemetry has been started before.
    pub fn start(settings: &Settings, env: &Env) -> Result<Self, Error> {
        let (telemetry, dispatch) = Self::prepare(settings, env)?;
        tracing::dispatcher::set_global_default(dispatch).map_err(|_| Error::AlreadyStarted)?;
        Ok(telemetry)
    }

    /// Like [`Telemetry::start`], but returns the subscriber instead of installing it, so that a test can have its own.
    ///
    /// # Errors
    /// When a variable cannot be used or an exporter cannot be created.
    pub fn prepare(settings: &Settings, env: &Env) -> Result<(Self, tracing::Dispatch), Error> {
        let config = Config::parse(env)?;
        let filters = (log_filter(settings, &config)?, log_filter(settings, &config)?);
        let (runtime, handle) = ExportRuntime::start()?;
        let (closing, closed) = watch::channel(false);
        let hold = ExportHold::new(settings.hold_export);
        let debug = DebugPage::new(config.disabled);

        let resource = resource::resource(settings, &config);
        let mut pipeline = Pipeline::new(&config, resource, &handle, closed, hold.clone());
        let providers = pipeline.build(settings.debug.then(|| debug.processor()))?;
        let Pipeline { exporters, registry, .. } = pipeline;

        let (meter, instruments) = if config.disabled {
            (opentelemetry::metrics::noop::NoopMeterProvider::new().meter(SCOPE), Instruments::noop())
        } else {
            (providers.metrics.meter(SCOPE), Instruments::new(&providers.metrics))
        };
        process::observe_process(&meter, Instant::now());
        process::observe_exporters(&meter, &exporters);
        if let Ok(application) = Handle::try_current() {
            process::observe_runtime(&meter, &application);
        }
        let gauges = Gauges::new(handle, meter);
        debug.connect(gauges.clone(), exporters, registry);

        global::set_text_map_propagator(context::propagator(&config.propagators));
        let dispatch = subscriber(filters, &config, &providers);
        let (export_start, runtime) = (ExportStart(hold), Mutex::new(Some(runtime)));
        Ok((Self { instruments, gauges, debug, export_start, providers, runtime, closing }, dispatch))
    }

    /// The instruments.
    pub fn instruments(&self) -> &Instruments {
        &self.instruments
    }

    /// The gauges.
    pub fn gauges(&self) -> &Gauges {
        &self.gauges
    }

    /// The debug page.
    pub fn debug(&self) -> &DebugPage {
        &self.debug
    }

    /// The handle that starts export in a process whose settings hold it.
    pub fn export_start(&self) -> &ExportStart {
        &self.export_start
    }

    /// Reads the gauges and exports everything queued, within 5 s. For tests and tools: it blocks its thread. May be called on any thread.
    ///
    /// # Errors
    /// When the time ran out.
    pub fn flush(&self) -> Result<(), FlushTimeout> {
        let providers = self.providers.clone();
        let (done, flushed) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let _ = providers.traces.force_flush();
            let _ = providers.logs.force_flush();
            let _ = providers.metrics.force_flush();
            let _ = done.send(());
        });
        flushed.recv_timeout(FLUSH_TIMEOUT).map_err(|_| FlushTimeout)
    }

    /// Exports everything queued and stops export, within [`SHUTDOWN_TIMEOUT`] even if the collector hangs. Blocks its thread, and may be
    /// called on any thread, inside or outside a runtime. A second call does nothing.
    ///
    /// # Errors
    /// When the time ran out before everything was sent.
    pub fn shutdown(&self) -> Result<(), FlushTimeout> {
        let Some(runtime) = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let (done, finished) = mpsc::channel();
        let Providers { traces, metrics, logs } = self.providers.clone();
        // One thread for each signal: one that hangs does not take the time of the others.
        let shutdowns: [Box<dyn FnOnce() + Send>; 3] = [
            Box::new(move || drop(traces.shutdown_with_timeout(SHUTDOWN_TIMEOUT))),
            Box::new(move || drop(metrics.shutdown_with_timeout(SHUTDOWN_TIMEOUT))),
            Box::new(move || drop(logs.shutdown_with_timeout(SHUTDOWN_TIMEOUT))),
        ];
        for shutdown in shutdowns {
            let done = done.clone();
            std::thread::spawn(move || {
                shutdown();
                let _ = done.send(());
            });
        }
        drop(done);
        let all_finish_by = |deadline: Instant| {
            // The channel is disconnected once every thread has finished.
            loop {
                match finished.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(()) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return true,
                    Err(mpsc::RecvTimeoutError::Timeout) => return false,
                }
            }
        };
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        let is_flushed = all_finish_by(deadline - ABANDON_TIMEOUT);
        if !is_flushed {
            let _ = self.closing.send(true);
            all_finish_by(deadline);
        }
        drop(runtime);
        if is_flushed { Ok(()) } else { Err(FlushTimeout) }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let _ = self.shutdown();
    }
}
