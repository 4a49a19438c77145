//! What the standard environment asks for, parsed whole before anything starts.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use opentelemetry_otlp::Compression;
use opentelemetry_sdk::metrics::Temporality;
use percent_encoding::percent_decode_str;

use crate::env::{Env, EnvError};

/// A kind of telemetry.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// Where and how a signal is sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Otlp {
    pub(crate) endpoint: String,
    pub(crate) protocol: Protocol,
    /// Secrets: never printed.
    pub(crate) headers: HashMap<String, String>,
    pub(crate) timeout: Duration,
    pub(crate) compression: Option<Compression>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<PathBuf>,
    pub(crate) client_key: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Exporter {
    Otlp(Otlp),
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
    pub(crate) queue: usize,
    pub(crate) batch: usize,
    pub(crate) delay: Duration,
    pub(crate) timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Human on a terminal, JSON otherwise.
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
    pub(crate) parent_based: bool,
    pub(crate) spans: Batch,
    pub(crate) records: Batch,
    pub(crate) metric_interval: Duration,
    pub(crate) metric_timeout: Duration,
    pub(crate) temporality: Temporality,
    pub(crate) span_attributes: Option<u32>,
    pub(crate) span_events: Option<u32>,
    pub(crate) span_links: Option<u32>,
    pub(crate) service_name: Option<String>,
    pub(crate) resource: Vec<(String, String)>,
    /// The filter of log lines and the variable it is from.
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
            "otlp" => Exporter::Otlp(otlp(env, signal)?),
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

fn otlp(env: &Env, signal: Signal) -> Result<Otlp, EnvError> {
    let own = |what: &str| format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.upper());
    let general = |what: &str| format!("OTEL_EXPORTER_OTLP_{what}");
    let read = |what: &str| {
        let (own, general) = (own(what), general(what));
        env.get(&own).map(|value| (own.clone(), value)).or_else(|| env.get(&general).map(|value| (general, value)))
    };

    let protocol = match read("PROTOCOL") {
        None | Some((_, "grpc")) => Protocol::Grpc,
        Some((_, "http/protobuf")) => Protocol::HttpProtobuf,
        Some((name, value)) => return Err(EnvError::new(&name, value, "set it to grpc or http/protobuf")),
    };
    let insecure = match read("INSECURE") {
        Some((name, _)) => env.flag(&name)?,
        None => false,
    };
    let compression = match read("COMPRESSION") {
        None | Some((_, "none")) => None,
        Some((_, "gzip")) => Some(Compression::Gzip),
        Some((name, value)) => return Err(EnvError::new(&name, value, "set it to gzip or none")),
    };
    let mut headers = HashMap::new();
    for name in [general("HEADERS"), own("HEADERS")] {
        for (key, value) in pairs(env, &name)? {
            let valid = http::HeaderName::try_from(&key).is_ok() && http::HeaderValue::try_from(&value).is_ok();
            if !valid {
                return Err(EnvError::new(&name, "(hidden)", "set it to key=value pairs that are valid HTTP headers"));
            }
            headers.insert(key.to_ascii_lowercase(), value);
        }
    }
    let file = |what: &str| read(what).map(|(_, path)| PathBuf::from(path));
    Ok(Otlp {
        endpoint: endpoint(env, signal, protocol, insecure)?,
        protocol,
        headers,
        timeout: env.millis(&[&own("TIMEOUT"), &general("TIMEOUT")])?.unwrap_or(Duration::from_secs(10)),
        compression,
        certificate: file("CERTIFICATE"),
        client_certificate: file("CLIENT_CERTIFICATE"),
        client_key: file("CLIENT_KEY"),
    })
}

/// The address of a signal. For HTTP the general endpoint is a base to which the signal's path is added, and the
/// signal's own endpoint is used as it stands; for gRPC both are the server.
fn endpoint(env: &Env, signal: Signal, protocol: Protocol, insecure: bool) -> Result<String, EnvError> {
    let own = format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.upper());
    let general = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let default = match protocol {
        Protocol::Grpc => "http://localhost:4317",
        Protocol::HttpProtobuf => "http://localhost:4318",
    };
    let (name, value) = env.first(&[&own, general]).unwrap_or((general, default));
    let fix = "set it to an address with scheme and host, such as http://localhost:4317";
    let address = if value.contains("://") {
        value.to_owned()
    } else if protocol == Protocol::Grpc {
        // A gRPC endpoint may come without a scheme; then OTEL_EXPORTER_OTLP_INSECURE decides.
        format!("{}://{value}", if insecure { "http" } else { "https" })
    } else {
        return Err(EnvError::new(name, value, fix));
    };
    let uri: Uri = address.parse().map_err(|_| EnvError::new(name, value, fix))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return Err(EnvError::new(name, value, fix));
    }
    if protocol == Protocol::HttpProtobuf && name == general {
        return Ok(format!("{}/v1/{}", address.trim_end_matches('/'), signal.lower()));
    }
    Ok(address)
}

/// `key=value` pairs, separated by commas, percent-encoded.
fn pairs(env: &Env, name: &str) -> Result<Vec<(String, String)>, EnvError> {
    let Some(text) = env.get(name) else { return Ok(Vec::new()) };
    let wrong = || {
        // What cannot be read may be a secret.
        let shown = if name.ends_with("HEADERS") { "(hidden)" } else { text };
        EnvError::new(
            name,
            shown,
            "set it to key=value pairs separated by commas, with special characters percent-encoded",
        )
    };
    let mut pairs = Vec::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        let value = percent_decode_str(value.trim()).decode_utf8().map_err(|_| wrong())?;
        let key = key.trim();
        if key.is_empty() {
            return Err(wrong());
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

fn batch(env: &Env, prefix: &str, delay: Duration) -> Result<Batch, EnvError> {
    let name = |what: &str| format!("{prefix}_{what}");
    let queue = env.number(&name("MAX_QUEUE_SIZE"), 1)?.unwrap_or(2048);
    let size = env.number(&name("MAX_EXPORT_BATCH_SIZE"), 1)?;
    if let Some(size) = size.filter(|size| *size > queue) {
        return Err(EnvError::new(
            &name("MAX_EXPORT_BATCH_SIZE"),
            &size.to_string(),
            format!("set it to at most {}, which is {queue}", name("MAX_QUEUE_SIZE")),
        ));
    }
    Ok(Batch {
        queue,
        batch: size.unwrap_or(512).min(queue),
        delay: env.millis(&[&name("SCHEDULE_DELAY")])?.unwrap_or(delay),
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
