//! The OTLP exporter of a signal, from the variables `OTEL_EXPORTER_OTLP_*`.

use std::{path::PathBuf, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use opentelemetry_otlp::Compression;

use super::{Signal, pairs};
use crate::env::{Env, EnvError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// How a signal is exported over OTLP.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Otlp {
    pub(crate) endpoint: String,
    pub(crate) protocol: Protocol,
    /// Their values are marked as sensitive, so that `Debug` hides them.
    pub(crate) headers: HeaderMap,
    /// The deadline of one request.
    pub(crate) timeout: Duration,
    pub(crate) compression: Option<Compression>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<PathBuf>,
    pub(crate) client_key: Option<PathBuf>,
}

impl Otlp {
    pub(super) fn parse(env: &Env, signal: Signal) -> Result<Self, EnvError> {
        let own = |suffix: &str| format!("OTEL_EXPORTER_OTLP_{}_{suffix}", signal.upper());
        let general = |suffix: &str| format!("OTEL_EXPORTER_OTLP_{suffix}");
        let read = |suffix: &str| {
            let (own, general) = (own(suffix), general(suffix));
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
        let mut headers = HeaderMap::new();
        for name in [general("HEADERS"), own("HEADERS")] {
            for (key, value) in pairs(env, &name)? {
                let (Ok(key), Ok(mut value)) = (HeaderName::try_from(&key), HeaderValue::try_from(&value)) else {
                    return Err(EnvError::new(
                        &name,
                        "(hidden)",
                        "set it to key=value pairs that are valid HTTP headers",
                    ));
                };
                value.set_sensitive(true);
                headers.insert(key, value);
            }
        }
        let file = |suffix: &str| read(suffix).map(|(_, path)| PathBuf::from(path));
        Ok(Self {
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
}

/// The endpoint of a signal. Over HTTP, the path of the signal is appended to the general endpoint, but not to the signal's own. Over gRPC both
/// are the address of the server.
fn endpoint(env: &Env, signal: Signal, protocol: Protocol, insecure: bool) -> Result<String, EnvError> {
    let own = format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.upper());
    let general = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let default = match protocol {
        Protocol::Grpc => "http://localhost:4317",
        Protocol::HttpProtobuf => "http://localhost:4318",
    };
    let (name, value) = env.first(&[&own, general]).unwrap_or((general, default));
    let fix = "set it to a URL with scheme and host, such as http://localhost:4317";
    let address = if value.contains("://") {
        value.to_owned()
    } else if protocol == Protocol::Grpc {
        // The scheme of a gRPC endpoint is optional. OTEL_EXPORTER_OTLP_INSECURE is its default.
        format!("{}://{value}", if insecure { "http" } else { "https" })
    } else {
        return Err(EnvError::new(name, value, fix));
    };
    let uri: Uri = address.parse().map_err(|_| EnvError::new(name, value, fix))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        return Err(EnvError::new(name, value, fix));
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        let fix = "set it to a URL without user and password, and put those in OTEL_EXPORTER_OTLP_HEADERS";
        return Err(EnvError::new(name, "(hidden)", fix));
    }
    if protocol == Protocol::HttpProtobuf && name == general {
        return Ok(format!("{}/v1/{}", address.trim_end_matches('/'), signal.lower()));
    }
    Ok(address)
}
