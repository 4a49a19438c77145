//! The `tracing` subscriber: log lines to standard error, spans to the tracer, log records to the logger.

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
use crate::logs::LineFormat;
use crate::pipeline::Providers;
use crate::settings::Settings;

/// The libraries that exporters use. With their spans, telemetry would trace its own export.
const TRANSPORT_LIBRARIES: [&str; 7] = ["hyper", "h2", "tonic", "tower", "reqwest", "rustls", "opentelemetry"];

const LEVELS: &str = "error, warn, info, debug, trace or off, or a list";

/// The filter of log lines and log records. A filter cannot be cloned, so each layer needs its own.
pub(crate) fn log_filter(settings: &Settings, config: &Config) -> Result<EnvFilter, EnvError> {
    let (variable, text) = match &config.log_filter {
        Some((variable, text)) => (variable.as_str(), text.as_str()),
        None => ("LOG_LEVEL", settings.log_filter.as_str()),
    };
    let invalid = || {
        let fix = format!("set it to {LEVELS} such as info,gauntlet_manager=debug");
        EnvError::new(variable, text, fix)
    };
    // EnvFilter would take an unknown level for the name of a module, and silence all others.
    if variable == "LOG_LEVEL" && !text.is_empty() && !text.split(',').all(is_level_directive) {
        return Err(invalid());
    }
    // The SDK logs every failed batch. `export::Health` counts them and warns once a minute.
    let filter = if text.contains("opentelemetry") { text.to_owned() } else { format!("opentelemetry=off,{text}") };
    EnvFilter::try_new(filter).map_err(|_| invalid())
}

/// Parses the value of a flag for the log level: a level, or a list with levels of modules. An empty text is `info`, because empty variables
/// count as unset.
///
/// # Errors
/// What was expected, and the value.
pub fn log_level(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok("info".to_owned());
    }
    if text.split(',').all(is_level_directive) {
        return Ok(text.to_owned());
    }
    Err(format!("expected {LEVELS} such as info,gauntlet_manager=debug; got {text:?}"))
}

/// Whether a part of a log filter is a level, or the level of a module such as `gauntlet_manager=debug`.
fn is_level_directive(directive: &str) -> bool {
    let (module, level) = directive.rsplit_once('=').map_or((None, directive), |(module, level)| (Some(module), level));
    module != Some("") && !level.is_empty() && level.parse::<LevelFilter>().is_ok()
}

/// The format of log lines, and whether they have colours.
fn line_format(configured: LogFormat, is_terminal: bool) -> (LineFormat, bool) {
    match configured {
        LogFormat::Json => (LineFormat::Json, false),
        LogFormat::Auto if !is_terminal => (LineFormat::Json, false),
        LogFormat::Auto | LogFormat::Human => (LineFormat::Human, is_terminal),
    }
}

pub(crate) fn subscriber(
    (line_filter, record_filter): (EnvFilter, EnvFilter),
    config: &Config,
    providers: &Providers,
) -> tracing::Dispatch {
    let (format, has_colours) = line_format(config.log_format, std::io::stderr().is_terminal());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(has_colours)
        .event_format(format)
        .with_filter(line_filter);
    let is_transport = |target: &str| TRANSPORT_LIBRARIES.iter().any(|library| target.starts_with(library));
    let spans = (!config.disabled).then(|| {
        tracing_opentelemetry::layer()
            .with_tracer(providers.traces.tracer(SCOPE))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_target(false)
            // Events are exported as log records with the ids of their span, so they are not added to the span.
            .with_filter(filter_fn(move |meta| {
                meta.is_span() && *meta.level() <= LevelFilter::INFO && !is_transport(meta.target())
            }))
    });
    let records = (!config.disabled && !config.logs.is_empty()).then(|| {
        OpenTelemetryTracingBridge::new(&providers.logs)
            .with_filter(record_filter)
            .with_filter(filter_fn(move |meta| !is_transport(meta.target())))
    });
    tracing_subscriber::registry().with(spans).with(lines).with(records).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn log_level_takes_levels_of_modules() {
        assert_eq!(log_level("").as_deref(), Ok("info"));
        for valid in ["info", "off", "info,gauntlet_manager=debug", "gauntlet_manager=debug"] {
            assert_eq!(log_level(valid).as_deref(), Ok(valid));
        }
        for invalid in [",", "loud", "info,", "=debug", "gauntlet_manager", "gauntlet_manager=loud"] {
            let error = log_level(invalid).unwrap_err();
            assert!(error.contains(&format!("got {invalid:?}")), "{error}");
        }
    }

    #[test]
    fn only_human_lines_on_a_terminal_have_colours() {
        let formats = [LogFormat::Auto, LogFormat::Human, LogFormat::Json];
        let human = LineFormat::Human;
        let json = LineFormat::Json;
        assert_eq!(formats.map(|format| line_format(format, true)), [(human, true), (human, true), (json, false)]);
        assert_eq!(formats.map(|format| line_format(format, false)), [(json, false), (human, false), (json, false)]);
    }
}
