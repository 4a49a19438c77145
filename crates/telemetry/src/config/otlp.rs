//! `OTEL_EXPORTER_OTLP_*`: where and how a signal is sent.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use http::Uri;
use opentelemetry_otlp::Compression;

use super::{Signal, pairs};
use crate::env::{Env, EnvError};

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

impl Otlp {
    pub(super) fn parse(env: &Env, signal: Signal) -> Result<Self, EnvError> {
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
                    return Err(EnvError::new(
                        &name,
                        "(hidden)",
                        "set it to key=value pairs that are valid HTTP headers",
                    ));
                }
                headers.insert(key.to_ascii_lowercase(), value);
            }
        }
        let file = |what: &str| read(what).map(|(_, path)| PathBuf::from(path));
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
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        let fix = "set it to an address without a user and password, and put those in OTEL_EXPORTER_OTLP_HEADERS";
        return Err(EnvError::new(name, "(hidden)", fix));
    }
    if protocol == Protocol::HttpProtobuf && name == general {
        return Ok(format!("{}/v1/{}", address.trim_end_matches('/'), signal.lower()));
    }
    Ok(address)
}
