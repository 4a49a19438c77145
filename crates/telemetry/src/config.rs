//! The configuration from OpenTelemetry's standard environment variables. All of it is validated before anything starts.

use std::time::Duration;

use opentelemetry_sdk::metrics::Temporality;
use percent_encoding::percent_decode_str;

use crate::env::{Env, EnvError};

mod otlp;

pub(crate) use otlp::{Otlp, Protocol};

/// A signal of OpenTelemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    fn upper(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
            Self::Logs => "LOGS",
        }
    }

    pub(crate) fn lower(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Exporter {
    Otlp(Box<Otlp>),
    Console,
    Prometheus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagator {
    TraceContext,
    Baggage,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sampler {
    AlwaysOn,
    AlwaysOff,
    Ratio(f64),
}

/// The bounds of a batch processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// The length of the queue.
    pub(crate) queue: usize,
    /// The most items in one export.
    pub(crate) batch: usize,
    /// The time between two exports.
    pub(crate) delay: Duration,
    /// The deadline of one export.
    pub(crate) timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Human-readable on a terminal, JSON otherwise.
    Auto,
    Human,
    Json,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) disabled: bool,
    pub(crate) traces: Vec<Exporter>,
    pub(crate) metrics: Vec<Exporter>,
    pub(crate) logs: Vec<Exporter>,
    pub(crate) propagators: Vec<Propagator>,
    pub(crate) sampler: Sampler,
    /// Whether a span with a parent follows the decision of its parent.
    pub(crate) parent_based: bool,
    pub(crate) spans: Batch,
    /// Log records.
    pub(crate) records: Batch,
    pub(crate) metric_interval: Duration,
    pub(crate) metric_timeout: Duration,
    pub(crate) temporality: Temporality,
    pub(crate) span_attributes: Option<u32>,
    pub(crate) span_events: Option<u32>,
    pub(crate) span_links: Option<u32>,
    pub(crate) service_name: Option<String>,
    pub(crate) resource: Vec<(String, String)>,
    /// The variable that sets the log filter, and its value.
    pub(crate) log_filter: Option<(String, String)>,
    pub(crate) log_format: LogFormat,
}

impl Config {
    pub(crate) fn parse(env: &Env) -> Result<Self, EnvError> {
        let (parent_based, sampler) = sampler(env)?;
        let resource = pairs(env, "OTEL_RESOURCE_ATTRIBUTES")?;
        let in_resource = || resource.iter().find(|(key, _)| key == "service.name").map(|(_, name)| name.clone());
        Ok(Self {
            disabled: env.flag("OTEL_SDK_DISABLED")?,
            traces: exporters(env, Signal::Traces)?,
            metrics: exporters(env, Signal::Metrics)?,
            logs: exporters(env, Signal::Logs)?,
            propagators: propagators(env)?,
            sampler,
            parent_based,
            spans: batch(env, "OTEL_BSP", Duration::from_secs(5))?,
            records: batch(env, "OTEL_BLRP", Duration::from_secs(1))?,
            metric_interval: env.millis(&["OTEL_METRIC_EXPORT_INTERVAL"])?.unwrap_or(Duration::from_secs(60)),
            metric_timeout: env.millis(&["OTEL_METRIC_EXPORT_TIMEOUT"])?.unwrap_or(Duration::from_secs(30)),
            temporality: temporality(env)?,
            span_attributes: env
                .number("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", 0)?
                .or(env.number("OTEL_ATTRIBUTE_COUNT_LIMIT", 0)?),
            span_events: env.number("OTEL_SPAN_EVENT_COUNT_LIMIT", 0)?,
            span_links: env.number("OTEL_SPAN_LINK_COUNT_LIMIT", 0)?,
            service_name: env.get("OTEL_SERVICE_NAME").map(str::to_owned).or_else(in_resource),
            resource,
            log_filter: env
                .first(&["RUST_LOG", "LOG_LEVEL"])
                .map(|(name, filter)| (name.to_owned(), filter.to_owned())),
            log_format: match env.get("LOG_FORMAT") {
                None | Some("auto") => LogFormat::Auto,
                Some("human" | "text") => LogFormat::Human,
                Some("json") => LogFormat::Json,
                Some(value) => return Err(EnvError::new("LOG_FORMAT", value, "set it to auto, human or json")),
            },
        })
    }
}

fn exporters(env: &Env, signal: Signal) -> Result<Vec<Exporter>, EnvError> {
    let name = format!("OTEL_{}_EXPORTER", signal.upper());
    let value = env.get(&name).unwrap_or("otlp");
    let mut exporters = Vec::new();
    for part in value.split(',').map(str::trim) {
        exporters.push(match part {
            "otlp" => Exporter::Otlp(Box::new(Otlp::parse(env, signal)?)),
            "console" => Exporter::Console,
            "prometheus" if signal == Signal::Metrics => Exporter::Prometheus,
            "none" if value == "none" => return Ok(Vec::new()),
            _ => {
                let prometheus = if signal == Signal::Metrics { ", prometheus" } else { "" };
                return Err(EnvError::new(
                    &name,
                    value,
                    format!("set it to otlp, console{prometheus}, a comma-separated list of these, or none"),
                ));
            }
        });
    }
    Ok(exporters)
}

/// Parses percent-encoded `key=value` pairs, separated by commas.
fn pairs(env: &Env, name: &str) -> Result<Vec<(String, String)>, EnvError> {
    let Some(text) = env.get(name) else { return Ok(Vec::new()) };
    let invalid = || {
        // Headers usually contain secrets.
        let shown = if name.ends_with("HEADERS") { "(hidden)" } else { text };
        EnvError::new(
            name,
            shown,
            "set it to key=value pairs separated by commas, with special characters percent-encoded",
        )
    };
    let mut pairs = Vec::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(invalid)?;
        let value = percent_decode_str(value.trim()).decode_utf8().map_err(|_| invalid())?;
        let key = key.trim();
        if key.is_empty() {
            return Err(invalid());
        }
        pairs.push((key.to_owned(), value.into_owned()));
    }
    Ok(pairs)
}

fn propagators(env: &Env) -> Result<Vec<Propagator>, EnvError> {
    let value = env.get("OTEL_PROPAGATORS").unwrap_or("tracecontext,baggage");
    let mut propagators = Vec::new();
    for part in value.split(',').map(str::trim) {
        let propagator = match part {
            "tracecontext" => Propagator::TraceContext,
            "baggage" => Propagator::Baggage,
            "none" if value == "none" => return Ok(Vec::new()),
            _ => {
                return Err(EnvError::new(
                    "OTEL_PROPAGATORS",
                    value,
                    "set it to tracecontext, baggage, both separated by a comma, or none",
                ));
            }
        };
        if !propagators.contains(&propagator) {
            propagators.push(propagator);
        }
    }
    Ok(propagators)
}

/// Returns whether the sampler is parent-based, and its root sampler.
fn sampler(env: &Env) -> Result<(bool, Sampler), EnvError> {
    let value = env.get("OTEL_TRACES_SAMPLER").unwrap_or("parentbased_always_on");
    let (parent_based, kind) = match value.strip_prefix("parentbased_") {
        Some(kind) => (true, kind),
        None => (false, value),
    };
    let sampler = match kind {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => match env.get("OTEL_TRACES_SAMPLER_ARG") {
            None => Sampler::Ratio(1.0),
            Some(ratio) => match ratio.parse::<f64>() {
                Ok(number) if (0.0..=1.0).contains(&number) => Sampler::Ratio(number),
                _ => return Err(EnvError::new("OTEL_TRACES_SAMPLER_ARG", ratio, "set it to a number from 0 to 1")),
            },
        },
        _ => {
            return Err(EnvError::new(
                "OTEL_TRACES_SAMPLER",
                value,
                "set it to always_on, always_off or traceidratio, with or without parentbased_ before it",
            ));
        }
    };
    Ok((parent_based, sampler))
}

fn batch(env: &Env, prefix: &str, default_delay: Duration) -> Result<Batch, EnvError> {
    let name = |suffix: &str| format!("{prefix}_{suffix}");
    let queue = env.number(&name("MAX_QUEUE_SIZE"), 1)?.unwrap_or(2048);
    let size = env.number(&name("MAX_EXPORT_BATCH_SIZE"), 1)?;
    if let Some(size) = size.filter(|size| *size > queue) {
        return Err(EnvError::new(
            &name("MAX_EXPORT_BATCH_SIZE"),
            &size.to_string(),
            format!("set it to at most {queue}, the value of {}", name("MAX_QUEUE_SIZE")),
        ));
    }
    Ok(Batch {
        queue,
        batch: size.unwrap_or(512).min(queue),
        delay: env.millis(&[&name("SCHEDULE_DELAY")])?.unwrap_or(default_delay),
        timeout: env.millis(&[&name("EXPORT_TIMEOUT")])?.unwrap_or(Duration::from_secs(30)),
    })
}

fn temporality(env: &Env) -> Result<Temporality, EnvError> {
    let name = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
    match env.get(name).map(str::to_ascii_lowercase).as_deref() {
        None | Some("cumulative") => Ok(Temporality::Cumulative),
        Some("delta") => Ok(Temporality::Delta),
        Some("lowmemory") => Ok(Temporality::LowMemory),
        Some(value) => Err(EnvError::new(name, value, "set it to cumulative, delta or lowmemory")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use opentelemetry_otlp::Compression;
    use proptest::prelude::*;

    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Config, EnvError> {
        Config::parse(&variables.iter().copied().collect())
    }

    fn only_otlp(exporters: &[Exporter]) -> &Otlp {
        match exporters {
            [Exporter::Otlp(otlp)] => otlp,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_the_specification() {
        let config = parse(&[]).unwrap();
        for (exporters, signal) in [(&config.traces, "traces"), (&config.metrics, "metrics"), (&config.logs, "logs")] {
            assert_eq!(only_otlp(exporters).endpoint, "http://localhost:4317", "{signal}");
            assert_eq!(only_otlp(exporters).protocol, Protocol::Grpc);
            assert_eq!(only_otlp(exporters).timeout, Duration::from_secs(10));
        }
        assert_eq!(config.propagators, [Propagator::TraceContext, Propagator::Baggage]);
        assert_eq!((config.parent_based, config.sampler), (true, Sampler::AlwaysOn));
        assert_eq!((config.spans.queue, config.spans.batch, config.spans.delay), (2048, 512, Duration::from_secs(5)));
        assert_eq!(config.metric_interval, Duration::from_secs(60));
        assert_eq!(config, parse(&[("OTEL_TRACES_EXPORTER", ""), ("OTEL_SDK_DISABLED", " ")]).unwrap());
    }

    #[test]
    fn variables_of_a_signal_override_general_ones() {
        let config = parse(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/base/"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces/own"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "logs:4317"),
            ("OTEL_EXPORTER_OTLP_LOGS_INSECURE", "true"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,b=x%20y"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=2"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "250"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_METRICS_EXPORTER", "otlp"),
        ])
        .unwrap();
        assert_eq!(only_otlp(&config.metrics).endpoint, "http://collector:4318/base/v1/metrics");
        assert_eq!(only_otlp(&config.metrics).timeout, Duration::from_millis(250));
        assert_eq!(only_otlp(&config.traces).endpoint, "https://traces/own");
        assert_eq!(only_otlp(&config.traces).headers.get("a").unwrap(), "2");
        assert_eq!(only_otlp(&config.traces).headers.get("b").unwrap(), "x y");
        assert_eq!(only_otlp(&config.logs).endpoint, "http://logs:4317");
        assert_eq!(only_otlp(&config.logs).protocol, Protocol::Grpc);
        assert_eq!(only_otlp(&config.logs).compression, Some(Compression::Gzip));
    }

    #[test]
    fn variables_are_parsed() {
        let config = parse(&[
            ("OTEL_SDK_DISABLED", "TRUE"),
            ("OTEL_TRACES_EXPORTER", "console"),
            ("OTEL_METRICS_EXPORTER", "prometheus,console"),
            ("OTEL_LOGS_EXPORTER", "none"),
            ("OTEL_PROPAGATORS", "baggage"),
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=by-attribute, team = red"),
            ("LOG_LEVEL", "debug"),
        ])
        .unwrap();
        assert!(config.disabled);
        assert_eq!(config.traces, [Exporter::Console]);
        assert_eq!(config.metrics, [Exporter::Prometheus, Exporter::Console]);
        assert_eq!(config.logs, []);
        assert_eq!(config.propagators, [Propagator::Baggage]);
        assert_eq!((config.parent_based, config.sampler), (false, Sampler::Ratio(0.25)));
        assert_eq!((config.spans.queue, config.spans.batch), (100, 100));
        assert_eq!(config.service_name.as_deref(), Some("by-attribute"));
        assert_eq!(config.resource.last().unwrap(), &("team".to_owned(), "red".to_owned()));
        assert_eq!(config.log_filter.unwrap(), ("LOG_LEVEL".to_owned(), "debug".to_owned()));
        let named = parse(&[("OTEL_SERVICE_NAME", "by-name"), ("OTEL_RESOURCE_ATTRIBUTES", "service.name=other")]);
        assert_eq!(named.unwrap().service_name.as_deref(), Some("by-name"));
    }

    #[test]
    fn error_names_the_variable_and_the_fix() {
        let invalid = [
            ("OTEL_SDK_DISABLED", "yes"),
            ("OTEL_TRACES_EXPORTER", "jaeger"),
            ("OTEL_TRACES_EXPORTER", "prometheus"),
            ("OTEL_METRICS_EXPORTER", "otlp,none"),
            ("OTEL_PROPAGATORS", "b3"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096"),
            ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "-1"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon"),
            ("OTEL_RESOURCE_ATTRIBUTES", "team"),
            ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "newest"),
            ("LOG_FORMAT", "xml"),
        ];
        let texts: Vec<_> = invalid
            .iter()
            .map(|(name, value)| {
                let error = parse(&[(name, value)]).unwrap_err();
                assert_eq!((error.variable.as_str(), error.value.as_str()), (*name, *value));
                error.to_string()
            })
            .collect();
        insta::assert_snapshot!(texts.join("\n"));
        let ratio = parse(&[("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "1.5")]);
        assert_eq!(ratio.unwrap_err().variable, "OTEL_TRACES_SAMPLER_ARG");
    }

    #[test]
    fn debug_output_does_not_contain_secrets() {
        let env =
            [("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret-token"), ("OTEL_TRACES_EXPORTER", "otlp,console")];
        let text = format!("{:?}", parse(&env).unwrap());
        assert!(text.contains("authorization") && !text.contains("secret-token"), "{text}");
        let text = format!("{:?}", env.iter().copied().collect::<Env>());
        assert!(!text.contains("secret-token"), "{text}");
    }

    #[test]
    fn errors_do_not_contain_secrets() {
        for headers in ["authorization", "bad name=secret-token", "k=secret-token\u{7}"] {
            let error = parse(&[("OTEL_EXPORTER_OTLP_HEADERS", headers)]).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
            assert_eq!(error.value, "(hidden)");
        }
        let error = parse(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:secret@collector:4317")]).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    proptest! {
        #[test]
        fn no_value_causes_a_panic(value in "\\PC{0,40}") {
            for name in [
                "OTEL_TRACES_EXPORTER", "OTEL_PROPAGATORS", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS",
                "OTEL_RESOURCE_ATTRIBUTES", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_TRACES_SAMPLER",
            ] {
                let _ = parse(&[(name, &value)]);
            }
        }
    }
}
