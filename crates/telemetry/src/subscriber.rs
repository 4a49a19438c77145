//! Where spans and log records go: lines on standard error, spans to the tracer, records to the logger.

use std::io::IsTerminal;

use opentelemetry::trace::TracerProvider;
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::{Config, LogFormat};
use crate::env::EnvError;
use crate::instruments::SCOPE;
use crate::logs::Line;
use crate::pipeline::Providers;
use crate::settings::Settings;

/// Libraries below the exporters. Their spans would make telemetry trace its own sending, and drown ours.
const PLUMBING: [&str; 7] = ["hyper", "h2", "tonic", "tower", "reqwest", "rustls", "opentelemetry"];

/// The filter of log lines and records. Made anew for each layer that needs one.
pub(crate) fn log_filter(settings: &Settings, config: &Config) -> Result<EnvFilter, EnvError> {
    let (variable, text) = match &config.log_filter {
        Some((variable, text)) => (variable.as_str(), text.as_str()),
        None => ("LOG_LEVEL", settings.log_filter.as_str()),
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

pub(crate) fn subscriber(
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
