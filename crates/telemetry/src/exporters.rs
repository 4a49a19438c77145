//! The exporters that the configuration selects.

use std::path::Path;

use http::HeaderValue;
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{
    LogExporter, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::metrics::Temporality;

use crate::config::{Exporter, Otlp, Protocol, Signal};
use crate::error::Error;

/// The `otel.component.type` of an exporter.
pub(crate) fn component(signal: Signal, exporter: &Exporter) -> &'static str {
    let protocol = match exporter {
        Exporter::Otlp(otlp) => Some(otlp.protocol),
        Exporter::Console | Exporter::Prometheus => None,
    };
    match (signal, protocol) {
        (Signal::Traces, Some(Protocol::Grpc)) => "otlp_grpc_span_exporter",
        (Signal::Traces, Some(Protocol::HttpProtobuf)) => "otlp_http_span_exporter",
        (Signal::Traces, None) => "console_span_exporter",
        (Signal::Metrics, Some(Protocol::Grpc)) => "otlp_grpc_metric_exporter",
        (Signal::Metrics, Some(Protocol::HttpProtobuf)) => "otlp_http_metric_exporter",
        (Signal::Metrics, None) => "console_metric_exporter",
        (Signal::Logs, Some(Protocol::Grpc)) => "otlp_grpc_log_exporter",
        (Signal::Logs, Some(Protocol::HttpProtobuf)) => "otlp_http_log_exporter",
        (Signal::Logs, None) => "console_log_exporter",
    }
}

/// The exporter's destination, for messages and the debug page.
pub(crate) fn target(exporter: &Exporter) -> String {
    match exporter {
        Exporter::Otlp(otlp) => otlp.endpoint.clone(),
        Exporter::Console | Exporter::Prometheus => "console".to_owned(),
    }
}

/// The SDK has one builder for each signal, with the same methods and no common trait.
macro_rules! build {
    ($builder:expr, $otlp:expr) => {
        match $otlp.protocol {
            Protocol::Grpc => grpc($builder.with_tonic(), $otlp)?.build(),
            Protocol::HttpProtobuf => http($builder.with_http(), $otlp)?.build(),
        }
        .map_err(|error| Error::exporter($otlp, error))
    };
}

pub(crate) fn spans(otlp: &Otlp) -> Result<SpanExporter, Error> {
    build!(SpanExporter::builder(), otlp)
}

pub(crate) fn logs(otlp: &Otlp) -> Result<LogExporter, Error> {
    build!(LogExporter::builder(), otlp)
}

pub(crate) fn metrics(otlp: &Otlp, temporality: Temporality) -> Result<MetricExporter, Error> {
    build!(MetricExporter::builder().with_temporality(temporality), otlp)
}

fn grpc<B: WithExportConfig + WithTonicConfig>(builder: B, otlp: &Otlp) -> Result<B, Error> {
    let mut builder = builder
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout)
        .with_metadata(MetadataMap::from_headers(otlp.headers.clone()));
    if let Some(compression) = otlp.compression {
        builder = builder.with_compression(compression);
    }
    if otlp.endpoint.starts_with("https://") {
        let mut tls = ClientTlsConfig::new();
        tls = match &otlp.certificate {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read("CERTIFICATE", path)?)),
            None => tls.with_enabled_roots(),
        };
        if let (Some(certificate), Some(key)) = (&otlp.client_certificate, &otlp.client_key) {
            tls = tls.identity(Identity::from_pem(read("CLIENT_CERTIFICATE", certificate)?, read("CLIENT_KEY", key)?));
        }
        builder = builder.with_tls_config(tls);
    }
    Ok(builder)
}

fn http<B: WithExportConfig + WithHttpConfig>(builder: B, otlp: &Otlp) -> Result<B, Error> {
    // Fails only when the process has a provider already; that one is then used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::Client::builder().timeout(otlp.timeout).redirect(reqwest::redirect::Policy::none());
    if let Some(path) = &otlp.certificate {
        let certificate = reqwest::Certificate::from_pem(&read("CERTIFICATE", path)?);
        client = client.tls_certs_only([certificate.map_err(|error| Error::exporter(otlp, error))?]);
    }
    if let (Some(certificate), Some(key)) = (&otlp.client_certificate, &otlp.client_key) {
        let pem = [read("CLIENT_CERTIFICATE", certificate)?, read("CLIENT_KEY", key)?].concat();
        client = client.identity(reqwest::Identity::from_pem(&pem).map_err(|error| Error::exporter(otlp, error))?);
    }
    let client = client.build().map_err(|error| Error::exporter(otlp, error))?;
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let headers = otlp.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value)));
    let mut builder = builder
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout)
        .with_headers(headers.collect())
        .with_http_client(client);
    if let Some(compression) = otlp.compression {
        builder = builder.with_compression(compression);
    }
    Ok(builder)
}

/// Reads the file set in `OTEL_EXPORTER_OTLP_{suffix}`.
fn read(suffix: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| Error::File {
        variable: format!("OTEL_EXPORTER_OTLP_{suffix}"),
        path: path.to_owned(),
        error,
    })
}
