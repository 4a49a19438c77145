//! The exporters that the environment asks for.

use std::path::Path;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::metrics::Temporality;

use crate::config::{Otlp, Protocol, Signal};
use crate::start::Error;

/// The `otel.component.type` of an OTLP exporter.
pub(crate) fn component(signal: Signal, protocol: Protocol) -> &'static str {
    match (signal, protocol) {
        (Signal::Traces, Protocol::Grpc) => "otlp_grpc_span_exporter",
        (Signal::Traces, Protocol::HttpProtobuf) => "otlp_http_span_exporter",
        (Signal::Metrics, Protocol::Grpc) => "otlp_grpc_metric_exporter",
        (Signal::Metrics, Protocol::HttpProtobuf) => "otlp_http_metric_exporter",
        (Signal::Logs, Protocol::Grpc) => "otlp_grpc_log_exporter",
        (Signal::Logs, Protocol::HttpProtobuf) => "otlp_http_log_exporter",
    }
}

pub(crate) fn spans(otlp: &Otlp) -> Result<opentelemetry_otlp::SpanExporter, Error> {
    let builder = opentelemetry_otlp::SpanExporter::builder();
    match otlp.protocol {
        Protocol::Grpc => grpc(builder.with_tonic(), otlp)?.build(),
        Protocol::HttpProtobuf => http(builder.with_http(), otlp)?.build(),
    }
    .map_err(|error| Error::exporter(otlp, error))
}

pub(crate) fn logs(otlp: &Otlp) -> Result<opentelemetry_otlp::LogExporter, Error> {
    let builder = opentelemetry_otlp::LogExporter::builder();
    match otlp.protocol {
        Protocol::Grpc => grpc(builder.with_tonic(), otlp)?.build(),
        Protocol::HttpProtobuf => http(builder.with_http(), otlp)?.build(),
    }
    .map_err(|error| Error::exporter(otlp, error))
}

pub(crate) fn metrics(otlp: &Otlp, temporality: Temporality) -> Result<opentelemetry_otlp::MetricExporter, Error> {
    let builder = opentelemetry_otlp::MetricExporter::builder().with_temporality(temporality);
    match otlp.protocol {
        Protocol::Grpc => grpc(builder.with_tonic(), otlp)?.build(),
        Protocol::HttpProtobuf => http(builder.with_http(), otlp)?.build(),
    }
    .map_err(|error| Error::exporter(otlp, error))
}

fn grpc<B: WithExportConfig + WithTonicConfig>(builder: B, otlp: &Otlp) -> Result<B, Error> {
    let mut headers = HeaderMap::new();
    for (name, value) in &otlp.headers {
        // Both were checked when the environment was read.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
    let mut builder = builder
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout)
        .with_metadata(MetadataMap::from_headers(headers));
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
    // Fails only where somebody chose a provider before, which then is used.
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
    let mut builder = builder
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout)
        .with_headers(otlp.headers.clone())
        .with_http_client(client);
    if let Some(compression) = otlp.compression {
        builder = builder.with_compression(compression);
    }
    Ok(builder)
}

fn read(what: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| Error::File {
        variable: format!("OTEL_EXPORTER_OTLP_{what}"),
        path: path.to_owned(),
        error,
    })
}
